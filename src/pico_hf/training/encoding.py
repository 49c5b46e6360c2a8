"""Encodes a whole retrieval split: one path for training, trials and final numbers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.modes import evaluation_mode
from pico_hf.core.moments import TokenMoments
from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.processes import ALONE, Processes
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.progress import progress_bar
from pico_hf.encoders import tokens as encoder_tokens
from pico_hf.encoders.inputs import image_inputs, text_inputs

Encoded = tuple[TokenFeatures | None, TokenFeatures | None]
BatchEncoder = Callable[[PreTrainedModel, Mapping[str, Any]], Encoded]


@dataclass(frozen=True)
class SplitEncoder:
    """Encodes rows batch by batch in eval mode and leaves the model's mode and random state alone.

    Args:
        model: The model.
        collate: Rows to batch.
        batch_size: Rows at a time, >= 1.
        num_workers: Processes that decode images.
        disable_tqdm: True shows no progress bar.
        max_bytes: Features of one side of a split that are held in memory; None: a third of what
            is free.
        multiprocessing_context: How the processes are started; None: as torch does.
        offload: True moves the features of every batch to the memory of the host, False keeps them
            on the model's device.
        processes: Share the work: each encodes some of the batches and gets the results of all.
    """

    model: PreTrainedModel
    collate: Callable[[list[Any]], Mapping[str, Any]]
    batch_size: int = 64
    num_workers: int = 0
    disable_tqdm: bool = False
    max_bytes: float | None = None
    multiprocessing_context: str | None = None
    offload: bool = False
    processes: Processes = ALONE

    def split(
        self,
        split: ImageTextDataset,
        description: str = "Encoding",
        encode: BatchEncoder | None = None,
    ) -> EncodedSplit:
        """Encodes every image and every caption of a split, once each; see `batches`.

        Features are kept once, without padding; what exceeds `max_bytes` per side goes to disk.
        """
        rows, captions = split.in_order()
        images = (images for images, _ in self.batches(rows, description, encode))
        texts = (texts for _, texts in self.batches(captions, description, encode))
        order, device = split.image_order, self.model.device
        return EncodedSplit(
            self.packed(images),
            self.packed(texts),
            split.ordered_text_to_image.to(device),
            split.gallery[order].to(device),
            split.image_ids[order].to(device),
            order.to(device),
            split.caption_order.to(device),
            self.processes,
            shows_progress=not self.disable_tqdm,
        )

    def packed(self, batches: Iterable[TokenFeatures]) -> PackedTokens:
        """Keeps the features of all batches, where and as long as memory allows."""
        placed = (batch.to("cpu") if self.offload else batch for batch in batches)
        return PackedTokens.collect(placed, self._limit)

    @property
    def _limit(self) -> float:
        return psutil.virtual_memory().available / 3 if self.max_bytes is None else self.max_bytes

    @torch.no_grad()
    def batches(
        self, rows: Dataset, description: str, encode: BatchEncoder | None = None
    ) -> Iterator[Encoded]:
        """Yields (images, texts) of each batch; None for the side the rows do not have.

        Args:
            rows: What to encode.
            description: Text of the progress bar.
            encode: From model and batch to tokens; None gives features in the columns that are
                weighted, [`encoder_columns`] in the encoder's, [`tower_states`] the towers' outputs
                before the projections.
        """
        size = self.batch_size
        batches = [range(n, min(n + size, len(rows))) for n in range(0, len(rows), size)]
        if not self.processes.several:
            yield from self._encoded(rows, batches, description, encode or encode_batch)
            return
        chosen = batches[self.processes.rank :: self.processes.count]
        own = self._encoded(rows, chosen, description, encode or encode_batch)
        on_host = (_moved(sides, "cpu") for sides in own)
        try:
            for sides in self.processes.in_turns(on_host, len(batches)):
                yield _moved(sides, self.model.device)
        finally:
            own.close()

    def _encoded(
        self, rows: Dataset, batches: list[range], description: str, encode: BatchEncoder
    ) -> Generator[Encoded, None, None]:
        loader = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            multiprocessing_context=self.multiprocessing_context if self.num_workers else None,
            generator=torch.Generator(),  # the default one belongs to the training run
        )
        with evaluation_mode(self.model):
            for batch in progress_bar(loader, description, hidden=self.disable_tqdm):
                yield encode(self.model, batch)


def _moved(sides: Encoded, device: torch.device | str) -> Encoded:
    images, texts = (None if side is None else side.to(device) for side in sides)
    return images, texts


def encode_batch(model: PreTrainedModel, batch: Mapping[str, Any]) -> Encoded:
    """Token features of both sides of a batch; None for a side the batch has no inputs of."""
    image, text = image_inputs(batch, model.device), text_inputs(batch, model.device)
    return (
        model.encode_images(**image) if image else None,
        model.encode_texts(**text) if text else None,
    )


def encoder_columns(model: PreTrainedModel, batch: Mapping[str, Any]) -> Encoded:
    """Token features in the encoder columns, whatever columns are weighted."""
    images, texts = encode_batch(model, batch)
    prototypes = model.prototypes
    return (
        None if images is None else prototypes.to_encoder_columns(images, "image"),
        None if texts is None else prototypes.to_encoder_columns(texts, "text"),
    )


def tower_states(model: PreTrainedModel, batch: Mapping[str, Any]) -> Encoded:
    """Outputs of both towers before the projections; None for a side without inputs."""
    image, text = image_inputs(batch, model.device), text_inputs(batch, model.device)
    kept = {"keep_special_tokens": model.config.keep_special_tokens}
    return (
        encoder_tokens.image_hidden_states(model.encoder, **image, **kept) if image else None,
        encoder_tokens.text_hidden_states(model.encoder, **text, **kept) if text else None,
    )


def pair_moments(
    encoder: SplitEncoder, split: ImageTextDataset, encode: BatchEncoder = encoder_columns
) -> PairMoments:
    """What the images and captions of a split vary in and share, in the encoder columns.

    Args:
        encoder: Model, collator and batch size.
        split: Images with their captions.
        encode: See `SplitEncoder.batches`: gives other features than the encoder columns.
    """
    rows, texts = split.in_order()
    images = encoder.batches(rows, "Moments of images", encode)
    captions = encoder.batches(texts, "Moments of captions", encode)
    return PairMoments(
        TokenMoments.of(image for image, _ in images),
        TokenMoments.of(text for _, text in captions),
        split.ordered_text_to_image,
    )
