"""Encodes a retrieval split and scores it: one path for training, trials and final numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pico_hf.core.canonical import PairMoments
from pico_hf.core.metrics import retrieval_metrics
from pico_hf.core.moments import TokenMoments
from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.encoders import tokens as encoder_tokens
from pico_hf.encoders.inputs import image_inputs, text_inputs

Encoded = tuple[TokenFeatures | None, TokenFeatures | None]
BatchEncoder = Callable[[PreTrainedModel, Mapping[str, Any]], Encoded]


@dataclass(frozen=True)
class EncodedSplit:
    """A whole split as token features, in canonical order (see [`ImageTextDataset`]).

    Attributes:
        images: All images, once each.
        texts: All captions.
        text_to_image: (texts,) row of `images` that each caption belongs to.
        gallery: (images,) which images are ranked together.
        image_ids: (images,) identity; images of one identity do not compete. None = all different.
        image_rows: (images,) row of each image in `ImageTextDataset.images()`; None = the same.
        caption_rows: (texts,) row of each text in `ImageTextDataset.captions()`; None = the same.
    """

    images: PackedTokens
    texts: PackedTokens
    text_to_image: Tensor
    gallery: Tensor
    image_ids: Tensor | None = None
    image_rows: Tensor | None = None
    caption_rows: Tensor | None = None


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
    """

    model: PreTrainedModel
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    batch_size: int = 64
    num_workers: int = 0
    disable_tqdm: bool = False
    max_bytes: float | None = None
    multiprocessing_context: str | None = None
    offload: bool = False

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
            PackedTokens.collect(map(self._placed, images), self._limit),
            PackedTokens.collect(map(self._placed, texts), self._limit),
            split.ordered_text_to_image.to(device),
            split.gallery[order].to(device),
            split.image_ids[order].to(device),
            order.to(device),
            split.caption_order.to(device),
        )

    def _placed(self, batch: TokenFeatures) -> TokenFeatures:
        return batch.to("cpu") if self.offload else batch

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
        encode = encode or encode_batch
        loader = DataLoader(
            rows,
            batch_size=self.batch_size,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            multiprocessing_context=self.multiprocessing_context if self.num_workers else None,
            generator=torch.Generator(),  # the default one belongs to the training run
        )
        training = self.model.training
        self.model.eval()
        try:
            for batch in tqdm(loader, desc=description, disable=self.disable_tqdm, leave=False):
                yield encode(self.model, batch)
        finally:
            self.model.train(training)


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
    return (
        encoder_tokens.image_hidden_states(model.encoder, **image) if image else None,
        encoder_tokens.text_hidden_states(model.encoder, **text) if text else None,
    )


def pair_moments(encoder: SplitEncoder, split: ImageTextDataset) -> PairMoments:
    """What the images and captions of a split vary in and share, in the encoder columns."""
    rows, texts = split.in_order()
    images = encoder.batches(rows, "Moments of images", encoder_columns)
    captions = encoder.batches(texts, "Moments of captions", encoder_columns)
    return PairMoments(
        TokenMoments.of(image for image, _ in images),
        TokenMoments.of(text for _, text in captions),
        split.ordered_text_to_image,
    )


def evaluate_form(model: PreTrainedModel, split: EncodedSplit, form: Tensor) -> dict[str, float]:
    """Metrics of a split with scores vᵀBt in place of weighted columns.

    Args:
        model: Scores.
        split: In the encoder columns, see [`encoder_columns`].
        form: B (D, D), as `pico_hf.core.canonical.bilinear_form` gives it.
    """
    return evaluate_retrieval(model, split, torch.ones(len(form), device=model.device), form)


def evaluate_retrieval(
    model: PreTrainedModel,
    split: EncodedSplit,
    column_weights: Tensor | None = None,
    form: Tensor | None = None,
) -> dict[str, float]:
    """Ranks all captions for every image and all images for every caption.

    Args:
        model: Gives the column weights, unless others are tried.
        split: From [`SplitEncoder.split`].
        column_weights: (D,) weights to try instead of the model's own.
        form: B (D, D) that words are multiplied with first; None is the identity.

    Returns:
        R@1/5/10 both ways in percent, median ranks, and rSum (see `pico_hf.core.metrics`), each the
        mean over galleries.
    """
    ranked = gallery_scores(model, split, column_weights, form)
    return _mean([metrics for _, _, _, metrics in ranked])


def predict_retrieval(
    model: PreTrainedModel, split: EncodedSplit
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Gives all scores of a split, and the metrics that `evaluate_retrieval` gives.

    Args:
        model: Scores.
        split: From [`SplitEncoder.split`].

    Returns:
        Scores (images, texts) fp32 on the CPU, in the order of `ImageTextDataset.images()` and
        `captions()`, -inf where an image and a text are in different galleries and therefore never
        ranked together; the row (texts,) of the image of each text; and the metrics.
    """
    image_rows = _rows(split.image_rows, len(split.images))
    caption_rows = _rows(split.caption_rows, len(split.texts))
    scores = torch.full((len(image_rows), len(caption_rows)), -torch.inf)
    per_gallery = []
    for images, texts, block, metrics in gallery_scores(model, split):
        scores[image_rows[images].unsqueeze(1), caption_rows[texts].unsqueeze(0)] = block.cpu()
        per_gallery.append(metrics)
    owners = torch.empty_like(caption_rows)
    owners[caption_rows] = image_rows[split.text_to_image.cpu()]
    return scores, owners, _mean(per_gallery)


@torch.no_grad()
def gallery_scores(
    model: PreTrainedModel,
    split: EncodedSplit,
    column_weights: Tensor | None = None,
    form: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, float]]]:
    """Scores each gallery by itself; for the arguments see `evaluate_retrieval`.

    Yields:
        Which images (images,) and which texts (texts,) of the split are in the gallery, bool on the
        CPU; their scores; and their metrics.
    """
    for gallery in split.gallery.unique():
        rows = split.gallery == gallery
        columns = rows[split.text_to_image]
        row_of = rows.long().cumsum(0) - 1  # an image's row inside its gallery
        scores = split_scores(model, split, rows, columns, column_weights, form)
        owners = row_of[split.text_to_image[columns]]
        metrics = retrieval_metrics(scores, owners, _shared(split.image_ids, rows))
        yield rows.cpu(), columns.cpu(), scores, metrics


def _mean(per_gallery: Sequence[Mapping[str, float]]) -> dict[str, float]:
    # An exact sum: the order of galleries changes no bit of it.
    return {
        name: math.fsum(metrics[name] for metrics in per_gallery) / len(per_gallery)
        for name in per_gallery[0]
    }


def _rows(rows: Tensor | None, count: int) -> Tensor:
    return torch.arange(count) if rows is None else rows.cpu()


@torch.no_grad()
def split_scores(
    model: PreTrainedModel,
    split: EncodedSplit,
    images: Tensor | None = None,
    texts: Tensor | None = None,
    column_weights: Tensor | None = None,
    form: Tensor | None = None,
) -> Tensor:
    """Scores block by block, so that no more than a block of tokens is padded at a time.

    Args:
        model: Gives scores, and the column weights unless others are tried.
        split: From [`SplitEncoder.split`].
        images: (images,) True = chosen; None chooses all.
        texts: (texts,) likewise.
        column_weights: See `evaluate_retrieval`.
        form: See `evaluate_retrieval`.

    Returns:
        (chosen images, chosen texts) fp32, on the model's device.
    """
    image_rows = _chosen(split.images, images)
    text_rows = _chosen(split.texts, texts)
    scores = torch.empty(len(image_rows), len(text_rows), device=model.device)
    for row, some_images in split.images.blocks(image_rows):
        patches = split.images[some_images].to(model.device)
        for column, some_texts in split.texts.blocks(text_rows):
            words = split.texts[some_texts].to(model.device)
            if form is not None:
                words = TokenFeatures(words.features @ form.t().to(words.features), words.mask)
            scores[row, column] = model.score(patches, words, column_weights)
    return scores


def _chosen(side: PackedTokens, mask: Tensor | None) -> Tensor:
    return torch.arange(len(side)) if mask is None else mask.cpu().nonzero().flatten()


def _shared(image_ids: Tensor | None, rows: Tensor) -> Tensor | None:
    """Identities of a gallery's images, None if no two of them share one."""
    if image_ids is None:
        return None
    ids = image_ids[rows]
    return ids if len(ids.unique()) < len(ids) else None
