"""Scores an encoded split: one path for training, trials and final numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.metrics import retrieval_metrics
from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.processes import ALONE, Processes
from pico_hf.core.score_form import ScoreForm, column_weights
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.progress import BRIEF, progress_bar

Turn = Callable[[TokenFeatures], TokenFeatures]


def evaluate_retrieval(
    model: PreTrainedModel,
    split: EncodedSplit,
    form: ScoreForm | None = None,
) -> dict[str, float]:
    """Ranks all captions for every image and all images for every caption.

    Args:
        model: Scores.
        split: From [`SplitEncoder.split`].
        form: To try instead of the model's own; the split is in the encoder columns then.

    Returns:
        R@1/5/10 both ways in percent, median ranks, and rSum (see `pico_hf.core.metrics`), each the
        mean over galleries.
    """
    return mean_metrics([gallery.metrics() for gallery in gallery_scores(model, split, form)])


def predict_retrieval(
    model: PreTrainedModel, split: EncodedSplit
) -> tuple[Tensor, dict[str, float]]:
    """Gives all scores of a split, and the metrics that `evaluate_retrieval` gives.

    Args:
        model: Scores.
        split: From [`SplitEncoder.split`].

    Returns:
        Scores (images, texts) fp32 on the CPU in the order of the rows that the split was made of,
        -inf where an image and a text are in different galleries and therefore never ranked
        together; and the metrics.
    """
    image_rows, caption_rows = split.rows_of_images(), split.rows_of_captions()
    scores = torch.full((len(split.images), len(split.texts)), -torch.inf)
    per_gallery = []
    for gallery in gallery_scores(model, split):
        chosen = image_rows[gallery.images.cpu()], caption_rows[gallery.texts.cpu()]
        scores[chosen[0].unsqueeze(1), chosen[1]] = gallery.scores.cpu()
        per_gallery.append(gallery.metrics())
    return scores, mean_metrics(per_gallery)


@dataclass(frozen=True)
class GalleryScores:
    """The scores of images and texts that are ranked together.

    Attributes:
        images: (images,) bool, which images of the split are in the gallery.
        texts: (texts,) bool, likewise.
        scores: Of these images and texts.
        text_to_image: Row of `scores` that each of these texts belongs to.
        image_ids: Identities of these images, None if no two of them share one.
    """

    images: Tensor
    texts: Tensor
    scores: Tensor
    text_to_image: Tensor
    image_ids: Tensor | None

    def mixed(self, other: GalleryScores, share: float) -> GalleryScores:
        """The same gallery with (1 - share) of these scores and `share` of others."""
        return replace(self, scores=(1 - share) * self.scores + share * other.scores)

    def metrics(self) -> dict[str, float]:
        """See `pico_hf.core.metrics.retrieval_metrics`."""
        return retrieval_metrics(self.scores, self.text_to_image, self.image_ids)


def gallery_scores(
    model: PreTrainedModel,
    split: EncodedSplit,
    form: ScoreForm | None = None,
) -> Iterator[GalleryScores]:
    """Scores each gallery by itself; for the arguments see `evaluate_retrieval`."""
    for gallery in split.gallery.unique():
        rows = split.gallery == gallery
        texts = rows[split.text_to_image]
        row_of = rows.long().cumsum(0) - 1  # an image's row inside its gallery
        scores = split_scores(model, split, rows, texts, form)
        owners = row_of[split.text_to_image[texts]]
        yield GalleryScores(rows, texts, scores, owners, _shared(split.image_ids, rows))


def mean_metrics(per_gallery: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over galleries: an exact sum, whatever their order."""
    return {
        name: math.fsum(metrics[name] for metrics in per_gallery) / len(per_gallery)
        for name in per_gallery[0]
    }


def split_scores(
    model: PreTrainedModel,
    split: EncodedSplit,
    images: Tensor | None = None,
    texts: Tensor | None = None,
    form: ScoreForm | None = None,
) -> Tensor:
    """Scores block by block, so that no more than a block of tokens is padded at a time.

    Several processes score some of the images each and get all scores.

    Args:
        model: Gives scores.
        split: From [`SplitEncoder.split`].
        images: (images,) True = chosen; None chooses all.
        texts: (texts,) likewise.
        form: See `evaluate_retrieval`.

    Returns:
        (chosen images, chosen texts) fp32, on the model's device.
    """
    image_rows = _chosen(split.images, images)
    text_rows = _chosen(split.texts, texts)
    sides = split.images, split.texts
    rows = image_rows, text_rows
    return packed_scores(
        model, *sides, *rows, form, split.processes, show_progress=split.shows_progress
    )


@torch.no_grad()
def packed_scores(
    model: PreTrainedModel,
    images: PackedTokens,
    texts: PackedTokens,
    image_rows: Tensor | None = None,
    text_rows: Tensor | None = None,
    form: ScoreForm | None = None,
    processes: Processes = ALONE,
    show_progress: bool = False,
) -> Tensor:
    """Scores block by block.

    Args:
        model: Gives scores.
        images: All of them.
        texts: Likewise.
        image_rows: Numbers of those that are scored, in this order; None: all.
        text_rows: Likewise.
        form: See `evaluate_retrieval`.
        processes: Which share the images between them; each gets all scores.
        show_progress: True shows a progress bar if it takes long.

    Returns:
        (chosen images, chosen texts) fp32, on the model's device.
    """
    counts = [
        len(side) if rows is None else len(rows)
        for side, rows in ((images, image_rows), (texts, text_rows))
    ]
    weights, share, turn_images, turn_texts = _parts(form, model.device)
    scores = torch.zeros(*counts, device=model.device)
    blocks = list(images.blocks(image_rows))
    bar = progress_bar(blocks, "Scoring", hidden=not show_progress, delay=BRIEF)
    for number, (row, some_images) in enumerate(bar):
        if number % processes.count != processes.rank:
            continue  # another process scores them
        patches = turn_images(images[some_images].to(model.device))
        for column, some_texts in texts.blocks(text_rows):
            words = turn_texts(texts[some_texts].to(model.device))
            scores[row, column] = model.score(patches, words, weights, share)
    return processes.add(scores)  # exact: each score plus zeros


def _parts(form: ScoreForm | None, device: torch.device) -> tuple[Any, Any, Turn, Turn]:
    """Weights and share to try, None for the model's own, and what rotates images and texts."""
    if form is None:
        return None, None, _as_they_are, _as_they_are
    weights = column_weights(form.semantic_probability).to(device)
    turns = (
        _as_they_are if basis is None else partial(TokenFeatures.turned, matrix=basis)
        for basis in (form.image_basis, form.text_basis)
    )
    return weights, form.pooled_share, *turns


def _as_they_are(tokens: TokenFeatures) -> TokenFeatures:
    return tokens


def _chosen(side: PackedTokens, mask: Tensor | None) -> Tensor:
    return torch.arange(len(side)) if mask is None else mask.cpu().nonzero().flatten()


def _shared(image_ids: Tensor | None, rows: Tensor) -> Tensor | None:
    """Identities of a gallery's images, None if no two of them share one."""
    if image_ids is None:
        return None
    ids = image_ids[rows]
    return ids if len(ids.unique()) < len(ids) else None
