"""A retrieval split → token features → metrics, the same for training, trials and final numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pico_hf.core.canonical import PairMoments
from pico_hf.core.metrics import retrieval_metrics
from pico_hf.core.moments import TokenMoments
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.encoders import tokens as encoder_tokens
from pico_hf.encoders.inputs import image_inputs, text_inputs

Encoded = tuple[TokenFeatures | None, TokenFeatures | None]
IMAGES_AT_A_TIME = 256  # of features that wait in the memory of the host
BatchEncoder = Callable[[PreTrainedModel, Mapping[str, Any]], Encoded]


@dataclass(frozen=True)
class EncodedSplit:
    """A whole split as token features.

    Attributes:
        images: All images, once each.
        texts: All captions.
        text_to_image: (texts,) row of `images` that each caption belongs to.
        gallery: (images,) which images are ranked together.
    """

    images: TokenFeatures
    texts: TokenFeatures
    text_to_image: Tensor
    gallery: Tensor


@dataclass(frozen=True)
class SplitEncoder:
    """Encodes rows batch by batch in eval mode and leaves the model's mode and random state alone.

    Args:
        model: The model.
        collate: Rows to batch.
        batch_size: Rows at a time, >= 1.
        num_workers: Processes that decode images.
        disable_tqdm: True shows no progress bar.
        accumulation_steps: Batches of features of a split that are kept on the model's device
            before they are moved to the memory of the host, >= 1; None keeps all of them there.
        multiprocessing_context: How those processes are started; None: as torch does.
    """

    model: PreTrainedModel
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    batch_size: int = 64
    num_workers: int = 0
    disable_tqdm: bool = False
    accumulation_steps: int | None = None
    multiprocessing_context: str | None = None

    def split(
        self,
        split: ImageTextDataset,
        description: str = "Encoding",
        encode: BatchEncoder | None = None,
    ) -> EncodedSplit:
        """Encodes every image and every caption of a split, once each; see `batches`."""
        images = self._gather(
            images for images, _ in self.batches(split.images(), description, encode)
        )
        texts = self._gather(
            texts for _, texts in self.batches(split.captions(), description, encode)
        )
        device = images.features.device
        return EncodedSplit(images, texts, split.text_to_image.to(device), split.gallery.to(device))

    def _gather(self, batches: Iterator[TokenFeatures]) -> TokenFeatures:
        """All batches as one, on the model's device or in the memory of the host."""
        done: list[TokenFeatures] = []
        for number, batch in enumerate(batches, start=1):
            done.append(batch)
            if self.accumulation_steps and number % self.accumulation_steps == 0:
                done = [TokenFeatures.concatenate([part.to("cpu") for part in done])]
        if self.accumulation_steps:
            done = [part.to("cpu") for part in done]
        return TokenFeatures.concatenate(done)

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
    images = encoder.batches(split.images(), "Moments of images", encoder_columns)
    captions = encoder.batches(split.captions(), "Moments of captions", encoder_columns)
    return PairMoments(
        TokenMoments.of(image for image, _ in images),
        TokenMoments.of(text for _, text in captions),
        split.text_to_image,
    )


def evaluate_form(model: PreTrainedModel, split: EncodedSplit, form: Tensor) -> dict[str, float]:
    """Metrics of a split with scores vᵀBt in place of weighted columns.

    Args:
        model: Scores.
        split: In the encoder columns, see [`encoder_columns`].
        form: B (D, D), as `pico_hf.core.canonical.bilinear_form` gives it.
    """
    words = split.texts.features @ form.t().to(split.texts.features)
    uniform = torch.ones(len(form), device=words.device)
    met = replace(split, texts=TokenFeatures(words, split.texts.mask))
    return evaluate_retrieval(model, met, uniform)


def evaluate_retrieval(
    model: PreTrainedModel, split: EncodedSplit, column_weights: Tensor | None = None
) -> dict[str, float]:
    """Ranks all captions for every image and all images for every caption.

    Args:
        model: Gives the column weights, unless others are tried.
        split: From [`SplitEncoder.split`].
        column_weights: (D,) weights to try instead of the model's own.

    Returns:
        R@1/5/10 both ways in percent, median ranks, and rSum (see `pico_hf.core.metrics`), each the
        mean over galleries.
    """
    ranked = gallery_scores(model, split, column_weights)
    return mean_metrics([retrieval_metrics(scores, own) for _, _, scores, own in ranked])


def predict_retrieval(
    model: PreTrainedModel, split: EncodedSplit
) -> tuple[Tensor, dict[str, float]]:
    """All scores of a split, and the metrics that `evaluate_retrieval` gives.

    Args:
        model: The model.
        split: From [`SplitEncoder.split`].

    Returns:
        Scores (images, texts) fp32 on the CPU, -inf where an image and a text are in different
        galleries and therefore never ranked together; and the metrics.
    """
    scores = torch.full((len(split.images), len(split.texts)), -torch.inf)
    per_gallery = []
    for rows, columns, block, own in gallery_scores(model, split):
        scores[rows.cpu().unsqueeze(1) & columns.cpu().unsqueeze(0)] = block.flatten().cpu()
        per_gallery.append(retrieval_metrics(block, own))
    return scores, mean_metrics(per_gallery)


@torch.no_grad()
def gallery_scores(
    model: PreTrainedModel, split: EncodedSplit, column_weights: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Scores each gallery by itself.

    Args:
        model: Gives the column weights, unless others are tried.
        split: From [`SplitEncoder.split`].
        column_weights: (D,) weights to try instead of the model's own.

    Yields:
        Which images (images,) and which texts (texts,) of the split are in the gallery, bool; their
        scores; and the row of the scores that each of these texts belongs to.
    """
    for gallery in split.gallery.unique():
        rows = split.gallery == gallery
        columns = rows[split.text_to_image]
        row_of = rows.long().cumsum(0) - 1  # an image's row inside its gallery
        scores = _scores(model, split.images[rows], split.texts[columns], column_weights)
        yield rows, columns, scores, row_of[split.text_to_image[columns]]


def _scores(
    model: PreTrainedModel, images: TokenFeatures, texts: TokenFeatures, weights: Tensor | None
) -> Tensor:
    """Scores where the features are; the model's device takes the images of one block at a time."""
    place, home = model.device, images.features.device
    if place == home:
        return model.score(images, texts, weights)
    words = texts.to(place)
    weights = None if weights is None else weights.to(place)
    starts = range(0, len(images), IMAGES_AT_A_TIME)
    blocks = (images[start : start + IMAGES_AT_A_TIME].to(place) for start in starts)
    return torch.cat([model.score(block, words, weights).to(home) for block in blocks])


def mean_metrics(per_gallery: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over galleries."""
    return {
        name: sum(metrics[name] for metrics in per_gallery) / len(per_gallery)
        for name in per_gallery[0]
    }
