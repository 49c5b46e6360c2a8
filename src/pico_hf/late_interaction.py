"""The two-direction late interaction and its gradient, without the 4-D tensor of products.

Forward: one matrix product per block of a few images × some texts, small enough to stay in the
cache while both maxima are read off it. For training only the positions of the maxima are kept,
one or two bytes each. Backward: a maximum passes its gradient to one patch and one word, so both
gradients are weighted sums of few rows ("bags"); no product is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pico_hf.packing import Chunk, Packing, Run

BLOCK_ELEMENTS = 2**19  # products alive at a time: 2 MB in float32, one core's share of cache
BLOCK_PATCHES = 256  # one image of a ViT, several of a coarse grid: enough columns per product
BAG_ENTRIES = 2**18  # (patch, word, weight) entries sorted at a time in the backward: 10 MB


@dataclass(frozen=True)
class Matches:
    """Which token won each maximum, counted inside its item. All axes are packed."""

    words: Int[Tensor, "texts patch_rows"]
    patches: Int[Tensor, "images word_rows"]

    @classmethod
    def empty(cls, images: Packing, texts: Packing) -> Matches:
        """Allocate the positions in the smallest integers that hold them."""
        device = images.order.device
        return cls(
            words=torch.empty(
                len(texts.order), images.size, dtype=_index_type(texts), device=device
            ),
            patches=torch.empty(
                len(images.order), texts.size, dtype=_index_type(images), device=device
            ),
        )


def _index_type(packing: Packing) -> torch.dtype:
    longest = int(packing.lengths[-1]) if len(packing.lengths) else 0
    if longest <= 256:
        return torch.uint8
    return torch.int16 if longest <= 2**15 else torch.int32


def interact(
    image_features: Float[Tensor, "images patches D"],
    text_features: Float[Tensor, "texts words D"],
    images: Packing,
    texts: Packing,
    matches: Matches | None = None,
    progress: bool = False,
) -> Float[Tensor, "images texts"]:
    """Score all pairs block by block; fill `matches` if given.

    Beside the scores and `matches` it holds one chunk of words, the products of one block and,
    for one chunk, one number per image and word.
    """
    dtype = working_type(image_features, text_features)
    tiles = list(images.runs(BLOCK_PATCHES))
    widest = max((tile.rows.stop - tile.rows.start for tile in tiles), default=1)
    chunks = texts.chunks(max(1, BLOCK_ELEMENTS // widest))
    scores = image_features.new_empty(len(images.order), len(texts.order), dtype=dtype)
    with tqdm(total=len(chunks) * len(tiles), disable=not progress, desc="similarity") as bar:
        for chunk in chunks:
            words = texts.take(text_features, chunk.rows, dtype)
            columns = scores.new_empty(len(images.order), chunk.items.stop - chunk.items.start)
            best_patch = scores.new_empty(len(words), len(images.order))
            for tile in tiles:
                patches = images.take(image_features, tile.rows, dtype)
                best_word, best_patch[:, tile.items] = maxima(words, patches, chunk, tile, matches)
                columns[tile.items] = best_word.mean(dim=2).T
                bar.update()
            for run in chunk.runs:
                by_text = best_patch[run.rows].unflatten(0, (-1, run.length))
                columns[:, run.items] += by_text.mean(dim=1).T
            scores[images.order.unsqueeze(1), texts.order[chunk.items]] = columns
    return scores


def working_type(image_features: Tensor, text_features: Tensor) -> torch.dtype:
    """Return float64 if either side is, else float32: half precision sums too coarsely."""
    both = torch.promote_types(image_features.dtype, text_features.dtype)
    return torch.promote_types(both, torch.float32)


def maxima(
    words: Float[Tensor, "word_rows D"],
    patches: Float[Tensor, "patch_rows D"],
    chunk: Chunk,
    tile: Run,
    matches: Matches | None,
) -> tuple[Float[Tensor, "texts images patches"], Float[Tensor, "word_rows images"]]:
    """Return the best word of every patch and the best patch of every word of one block."""
    products = words @ patches.T
    by_image = products.unflatten(1, (-1, tile.length))  # (word_rows, images, patches)
    best_patch = by_image.amax(dim=2)
    best_word = products.new_empty(chunk.items.stop - chunk.items.start, len(patches))
    for run in chunk.runs:
        by_text = products[run.rows].unflatten(0, (-1, run.length))  # (texts, words, patch_rows)
        torch.amax(by_text, dim=1, out=best_word[run.items])
    if matches is not None:
        scratch = torch.empty_like(products)
        found = first_maximum(by_image, best_patch, 2, scratch)
        matches.patches[tile.items, chunk.rows] = found.T
        target = matches.words[chunk.items, tile.rows]
        for run in chunk.runs:
            by_text = products[run.rows].unflatten(0, (-1, run.length))
            best = best_word[run.items]
            target[run.items] = first_maximum(by_text, best, 1, scratch[run.rows])
    return best_word.unflatten(1, (-1, tile.length)), best_patch


def first_maximum(products: Tensor, best: Tensor, axis: int, scratch: Tensor) -> Tensor:
    """Return the first position of `best` along `axis`, in the dtype of `products`.

    Compare, multiply and amax each run vectorised; together they take a third of the time of
    `torch.max(dim)`, whose search for the index is a scalar loop. NaN yields some valid position.
    """
    size = products.shape[axis]
    shape = [size if a == axis else 1 for a in range(products.ndim)]
    countdown = torch.arange(size, 0, -1, dtype=products.dtype, device=products.device).view(shape)
    hits = torch.eq(products, best.unsqueeze(axis), out=scratch.view(products.shape))
    return size - hits.mul_(countdown).amax(dim=axis).clamp_(min=1)


class LateInteraction(torch.autograd.Function):
    """Scores of all pairs; the gradient goes to the winner of each maximum, the first on ties."""

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Float[Tensor, "images patches D"],
        text_features: Float[Tensor, "texts words D"],
        images: Packing,
        texts: Packing,
        progress: bool,
    ) -> Float[Tensor, "images texts"]:
        """Score all pairs and keep the positions of the maxima."""
        matches = Matches.empty(images, texts)
        ctx.images, ctx.texts = images, texts
        ctx.save_for_backward(image_features, text_features, matches.words, matches.patches)
        return interact(image_features, text_features, images, texts, matches, progress)

    @staticmethod
    def backward(
        ctx: Any, gradient: Float[Tensor, "images texts"]
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Sum the rows that won; pairs without gradient (all but the hardest) cost nothing."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "`similarity` cannot be differentiated twice, got create_graph=True. Do call "
                "backward without it, or score with plain autograd operations."
            )
        image_features, text_features, *saved = ctx.saved_tensors
        images, texts, matches = ctx.images, ctx.texts, Matches(*saved)
        dtype = gradient.dtype
        words = texts.take(text_features, slice(0, texts.size), dtype)
        to_images = (
            words.new_zeros(images.size, words.shape[1]) if ctx.needs_input_grad[0] else None
        )
        to_texts = torch.zeros_like(words) if ctx.needs_input_grad[1] else None
        gradient = gradient[images.order.unsqueeze(1), texts.order]
        for block, entries in _entries(gradient, images, texts, matches):
            patch, word, weight = entries
            if to_images is not None:
                add_bags(to_images[block], words, word, patch - block.start, weight)
            if to_texts is not None:
                patches = images.take(image_features, block, dtype)
                add_bags(to_texts, patches, patch - block.start, word, weight)
        return (
            None if to_images is None else images.unpack(to_images, image_features),
            None if to_texts is None else texts.unpack(to_texts, text_features),
            None,
            None,
            None,
        )


def _entries(
    gradient: Float[Tensor, "images texts"], images: Packing, texts: Packing, matches: Matches
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
    """List (patch row, word row, weight) of every maximum of the pairs that carry gradient.

    Yields:
        Some images' range of patch rows with all entries of pairs of these images: bounded
        memory, and source rows that stay in the cache.
    """
    pairs = gradient.nonzero()
    per_pair = int(images.lengths[-1] + texts.lengths[-1]) if len(pairs) else 1
    for image, text in (part.unbind(1) for part in pairs.split(max(1, BAG_ENTRIES // per_pair))):
        block = slice(int(images.starts[image[0]]), int(images.ends[image[-1]]))
        value = gradient[image, text]
        owner, patch = images.tokens_of(image)
        best_word = texts.starts[text[owner]] + matches.words[text[owner], patch]
        other_owner, word = texts.tokens_of(text)
        best_patch = images.starts[image[other_owner]] + matches.patches[image[other_owner], word]
        weights = (value / images.lengths[image])[owner], (value / texts.lengths[text])[other_owner]
        yield (
            block,
            (torch.cat([patch, best_patch]), torch.cat([best_word, word]), torch.cat(weights)),
        )


def add_bags(
    total: Float[Tensor, "targets D"],
    table: Float[Tensor, "sources D"],
    source: Int[Tensor, " entries"],
    target: Int[Tensor, " entries"],
    weight: Float[Tensor, " entries"],
) -> None:
    """Add weight · table[source] to total[target] for every entry, in a fixed order.

    `index_add_` would first copy every source row; sorted by target, the entries are the bags
    that `embedding_bag` sums without a copy and, unlike atomics, always in the same order.
    """
    target, order = target.to(torch.int32).sort(stable=True)  # half the radix passes of int64
    targets = torch.arange(len(total), dtype=torch.int32, device=total.device)
    offsets = torch.searchsorted(target, targets)
    total += F.embedding_bag(
        source[order], table, offsets, mode="sum", per_sample_weights=weight[order]
    )
