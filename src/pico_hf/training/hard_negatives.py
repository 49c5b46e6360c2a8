"""Hard negatives across modalities: the images and captions of other things that score highest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.negatives import with_negatives
from pico_hf.data.progress import progress_bar
from pico_hf.training.encoding import SplitEncoder
from pico_hf.training.evaluation import packed_scores

DIRECTIONS = ("image_to_text", "text_to_image")
_BLOCK = 1024  # queries whose candidates are looked for at a time


class Encodes(Protocol):
    """A [`PicoRetriever`], or the [`SplitEncoder`] that a trainer has as `split_encoder`."""

    model: PreTrainedModel
    collate: Callable[[list[Any]], Mapping[str, Any]]
    batch_size: int
    num_workers: int


def mine_hard_negatives(
    encoder: Encodes,
    rows: datasets.Dataset | ImageTextDataset,
    *,
    per_pair: int = 1,
    margin: float = 0.05,
    depth: int = 50,
    directions: Sequence[str] = DIRECTIONS,
) -> datasets.Dataset:
    """Finds for every image the ones of other things that a model confuses with it.

    The images closest to each of its captions and the captions closest to it are looked for in its
    own gallery: the `depth` best by one mean vector each, then ordered by exact scores. The score
    of a pair that does not belong together counts by how little it is below the pair that does.
    Pairs that may belong together after all, *false negatives*, are left out: images of one
    `image_id`, images with a caption in common, and those that come too close to the score of the
    matching pair for any of the captions that are scored exactly.

    Args:
        encoder: A `PicoRetriever`, or a trainer's `split_encoder`, whose model has learned
            something: one that was trained without mined negatives, or an aligned one.
        rows: What is trained on: a `datasets.Dataset` with image and caption columns, or an
            `ImageTextDataset`, as a trainer has as `train_dataset` (with features that are cached).
        per_pair: At most so many negatives are kept of each image, >= 1, hardest first. A training
            pair brings one of them into its batch, another one in every epoch.
        margin: In [0, 1]: candidates that score more than `positive - margin · |positive|` are left
            out, where `positive` is the score of the matching pair (for captions as candidates: the
            best caption of the image).
        depth: Candidates of each query that are scored exactly, >= per_pair.
        directions: `"text_to_image"` looks for images by captions, `"image_to_text"` for captions
            by images.

    Returns:
        The rows, checked, one per image, with the column `negatives`: keys of images (see
        `pico_hf.data.negatives`), which stay valid if rows are shuffled or left out. Pass it to
        [`PicoTrainer`] as `train_dataset`; keep it with `save_to_disk` or `to_parquet`.

    Raises:
        ValueError: If an argument is out of its range, or if no image has a negative left.
    """
    _check(encoder, per_pair, margin, depth, directions)
    split = rows if isinstance(rows, ImageTextDataset) else ImageTextDataset(rows)
    encoder = _split_encoder(encoder)
    encoded = encoder.split(split, "Encoding what is mined")
    said = [{text.strip().casefold() for text in split.own_texts(n)} for n in range(len(split))]
    kept: list[list[int]] = [[] for _ in said]
    for candidates in _candidates(encoder.model, encoded, depth, directions, encoder.disable_tqdm):
        own = said[candidates.image]
        found = candidates.hardest(encoder.model, encoded, margin)
        kept[candidates.image] = [n for n in found if own.isdisjoint(said[n])][:per_pair]
    if not any(kept):
        raise ValueError(
            f"No image has a negative that scores less than its captions by `margin={margin}`. "
            "Pass a smaller `margin`, a larger `depth`, or a model that has learned more."
        )
    return with_negatives(split.rows, encoded.rows_of_images().tolist(), kept)


def _check(encoder: Any, per_pair: Any, margin: Any, depth: Any, directions: Sequence[str]) -> None:
    if not all(hasattr(encoder, name) for name in Encodes.__annotations__):
        raise ValueError(
            "`encoder` must be a PicoRetriever or a trainer's `split_encoder`, got "
            f"{type(encoder).__name__}. Pass `PicoRetriever(model, processor)`."
        )
    for name, value, least in (("per_pair", per_pair, 1), ("depth", depth, per_pair)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= 1:
        raise ValueError(
            f"`margin` must be a share of the positive score in [0, 1], got {margin!r}."
        )
    if isinstance(directions, str) or not directions or not set(directions) <= set(DIRECTIONS):
        raise ValueError(
            f"`directions` must hold one or both of {', '.join(map(repr, DIRECTIONS))}, got "
            f"{directions!r}."
        )


def _split_encoder(encoder: Any) -> SplitEncoder:
    if isinstance(encoder, SplitEncoder):
        return encoder
    return SplitEncoder(
        encoder.model,
        encoder.collate,
        encoder.batch_size,
        encoder.num_workers,
        disable_tqdm=not encoder.show_progress,
    )


@dataclass(frozen=True)
class _Candidates:
    """What may be confused with an image, in canonical order.

    Attributes:
        image: Its number.
        captions: (own,) its captions.
        images: (n,) other images that are close to one of them.
        texts: (m,) captions of other images that are close to the image.
    """

    image: int
    captions: Tensor
    images: Tensor
    texts: Tensor

    def hardest(self, model: PreTrainedModel, split: EncodedSplit, margin: float) -> list[int]:
        """The images among them that are no suspects, hardest first."""
        sides = model, split.images, split.texts
        image = torch.tensor([self.image])
        by_text = packed_scores(*sides, torch.cat([image, self.images]), self.captions).cpu()
        positive, scores = by_text[:1], by_text[1:]
        found = [(self.images, _above(scores, positive, margin).amax(dim=1))]
        if len(self.texts):
            scores = packed_scores(*sides, image, self.texts).cpu()[0]
            owners = split.text_to_image.cpu()[self.texts]
            found.append((owners, _above(scores, positive.amax(), margin)))
        hardness: dict[int, float] = {}
        for numbers, above in found:
            for number, value in zip(numbers.tolist(), above.tolist(), strict=True):
                hardness[number] = max(value, hardness.get(number, value))
        trusted = [number for number, value in hardness.items() if value <= 0]
        return sorted(trusted, key=lambda number: (-hardness[number], number))


def _above(scores: Tensor, positive: Tensor, margin: float) -> Tensor:
    """By how much scores exceed what is allowed, as a share of the positive score."""
    size = positive.abs().clamp_min(1e-6)
    return (scores - positive) / size + margin


@torch.no_grad()
def _candidates(
    model: PreTrainedModel, split: EncodedSplit, depth: int, directions: Sequence[str], hidden: bool
) -> Iterator[_Candidates]:
    """Candidates of every image, gallery by gallery."""
    short = _Shortlists.of(model, split, depth)
    owners, galleries = split.text_to_image.cpu(), split.gallery.cpu()
    nothing = torch.empty(0, dtype=torch.long)
    bar = progress_bar(None, "Mining", total=len(galleries), hidden=hidden)
    for gallery in galleries.unique():
        images = (galleries == gallery).nonzero().flatten()
        texts = (galleries[owners] == gallery).nonzero().flatten()
        to_images = short.images(images, texts) if "text_to_image" in directions else {}
        to_texts = short.texts(images, texts) if "image_to_text" in directions else {}
        captions: dict[int, list[int]] = {image: [] for image in images.tolist()}
        for text in texts.tolist():
            captions[int(owners[text])].append(text)
        for image, own in captions.items():
            near = torch.cat([to_images.get(text, nothing) for text in own]).unique()
            bar.update()
            yield _Candidates(image, torch.tensor(own), near, to_texts.get(image, nothing))
    bar.close()


@dataclass(frozen=True)
class _Shortlists:
    """What is closest by one mean vector each, of other identities.

    Attributes:
        score: From numbers of images and texts to the scores (images, texts) of their means.
        image_ids: (images,) identity of each image.
        text_ids: (texts,) identity of the image of each text.
        depth: At most so many of each query.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    image_ids: Tensor
    text_ids: Tensor
    depth: int

    @classmethod
    def of(cls, model: PreTrainedModel, split: EncodedSplit, depth: int) -> _Shortlists:
        own = torch.arange(len(split.images)) if split.image_ids is None else split.image_ids.cpu()
        score = partial(packed_scores, model, _means(split.images), _means(split.texts))
        return cls(score, own, own[split.text_to_image.cpu()], depth)

    def images(self, images: Tensor, texts: Tensor) -> dict[int, Tensor]:
        """Of each of some texts, the closest ones of some images."""
        found: dict[int, Tensor] = {}
        for own in texts.split(_BLOCK):
            same = self.text_ids[own].unsqueeze(1) == self.image_ids[images]
            found |= self._best(self.score(images, own).t(), same, own, images)
        return found

    def texts(self, images: Tensor, texts: Tensor) -> dict[int, Tensor]:
        """Of each of some images, the closest ones of some texts."""
        found: dict[int, Tensor] = {}
        for own in images.split(_BLOCK):
            same = self.image_ids[own].unsqueeze(1) == self.text_ids[texts]
            found |= self._best(self.score(own, texts), same, own, texts)
        return found

    def _best(
        self, scores: Tensor, same: Tensor, queries: Tensor, targets: Tensor
    ) -> dict[int, Tensor]:
        best = scores.cpu().masked_fill(same, -torch.inf).topk(min(self.depth, len(targets)), dim=1)
        rows = zip(queries.tolist(), best.values, best.indices, strict=True)
        return {query: targets[places[values > -torch.inf]] for query, values, places in rows}


def _means(side: PackedTokens) -> PackedTokens:
    """Every item as one token, the mean of its own."""

    def parts() -> Iterator[TokenFeatures]:
        for _, rows in side.blocks():
            tokens = side[rows]
            mean = tokens.mean().unsqueeze(1)
            mask = torch.ones(mean.shape[:2], dtype=torch.bool, device=mean.device)
            yield TokenFeatures(mean, mask, tokens.pooled)

    return PackedTokens.collect(parts())
