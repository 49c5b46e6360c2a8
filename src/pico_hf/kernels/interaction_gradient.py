"""The gradient of the late interaction, computed from the positions of the maxima.

The gradient of a maximum goes to one patch and one word, so both gradients are weighted sums of a
few rows ("bags"). No product is computed again, and pairs without gradient take no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pico_hf.kernels.late_interaction import (
    Matches,
    fold,
    interact,
    refuse_second_derivative,
)
from pico_hf.kernels.packing import Packing, size

BAG_ENTRIES = 2**16  # (patch, word, weight) entries listed and sorted at a time: about 4 MB
BAG_PATCHES = 2**11  # patches whose gradients are summed at a time: 4 MB of 512 columns
BAG_COLUMNS = 128  # columns summed at a time: the table of sources then stays in the cache


class LateInteraction(torch.autograd.Function):
    """Scores of all pairs; the gradient of a maximum goes to its token, the first one of a tie."""

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Float[Tensor, "images patches D"],
        text_features: Float[Tensor, "texts words D"],
        images: Packing,
        texts: Packing,
        weights: Float[Tensor, " D"] | None,
        progress: bool,
    ) -> Float[Tensor, "images texts"]:
        """Score all pairs and keep the positions of the maxima."""
        matches = Matches.empty(images, texts)
        ctx.images, ctx.texts, ctx.weights = images, texts, weights
        ctx.save_for_backward(image_features, text_features, matches.words, matches.patches)
        return interact(image_features, text_features, images, texts, weights, matches, progress)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "images texts"]) -> tuple[Tensor | None, ...]:
        """Return the gradients of both features; pairs with gradient 0 are skipped."""
        refuse_second_derivative()
        image_features, text_features, *saved = ctx.saved_tensors
        sides = image_features, text_features, ctx.images, ctx.texts
        needs = ctx.needs_input_grad[:2]
        found = token_gradients(gradient, *sides, Matches(*saved), ctx.weights, needs)
        return (*found, *(None,) * 4)  # packings, weights and progress take no gradient


def token_gradients(
    gradient: Float[Tensor, "images texts"],
    image_features: Float[Tensor, "images patches D"],
    text_features: Float[Tensor, "texts words D"],
    images: Packing,
    texts: Packing,
    matches: Matches,
    weights: Float[Tensor, " D"] | None,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both features from that of the scores; None for a side that needs none."""
    dtype = gradient.dtype
    words = fold(texts.take(text_features, slice(0, texts.size), dtype), weights)
    needs_images, needs_texts = needs
    to_images = words.new_empty(images.size if needs_images else 0, words.shape[1])
    to_texts = torch.zeros_like(words)
    gradient = gradient[images.order.unsqueeze(1), texts.order]
    word_table = column_blocks(words) if needs_images else []
    for items in _image_groups(gradient, images, texts):
        block, patch, word, weight = _entries(gradient, items, images, texts, matches)
        if needs_images:
            for columns, sums in bags(word_table, word, patch, weight, size(block)):
                to_images[block, columns] = sums
        if needs_texts:
            patches = images.take(image_features, block, dtype)
            patch_table = column_blocks(patches)
            for columns, sums in bags(patch_table, patch, word, weight, texts.size):
                to_texts[:, columns] += sums
    return (
        images.unpack(to_images, image_features) if needs_images else None,
        texts.unpack(fold(to_texts, weights), text_features) if needs_texts else None,
    )


def _entries(
    gradient: Float[Tensor, "images texts"],
    items: slice,
    images: Packing,
    texts: Packing,
    matches: Matches,
) -> tuple[slice, Tensor, Tensor, Tensor]:
    """List every maximum of the pairs with gradient, for some neighbouring images.

    Returns:
        The packed patch rows of these images and, for each entry, the patch (counted from the
        first of these rows), the word and the weight.
    """
    image, text = gradient[items].nonzero(as_tuple=True)
    image = image + items.start
    value = gradient[image, text]
    block = slice(int(images.starts[items.start]), int(images.ends[items.stop - 1]))
    pair, patch = images.tokens_of(image)
    other, word = texts.tokens_of(text)
    # `index_select` is three times as fast as indexing with brackets.
    best_word = texts.starts[text].index_select(0, pair)
    best_word += _at(matches.words, text.index_select(0, pair), patch)
    best_patch = images.starts[image].index_select(0, other)
    best_patch += _at(matches.patches, image.index_select(0, other), word)
    weights = (
        (value / images.lengths[image]).index_select(0, pair),
        (value / texts.lengths[text]).index_select(0, other),
    )
    patches = torch.cat([patch, best_patch]) - block.start
    return block, patches, torch.cat([best_word, word]), torch.cat(weights)


def _at(table: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return table.view(-1).index_select(0, row * table.shape[1] + column)


def _image_groups(
    gradient: Float[Tensor, "images texts"], images: Packing, texts: Packing
) -> Iterator[slice]:
    """Cut the images into groups of at most `BAG_ENTRIES` entries and `BAG_PATCHES` patches.

    The first limit bounds the lists if the gradient is dense, the second the sums if it is sparse.
    A group holds at least one image, even one above the limits.
    """
    per_pair = images.lengths.unsqueeze(1) + texts.lengths
    entries = ((gradient != 0) * per_pair).sum(dim=1).tolist()
    start, listed, patches = 0, 0, 0
    for item, (count, length) in enumerate(zip(entries, images.lengths.tolist(), strict=True)):
        full = listed + count > BAG_ENTRIES or patches + length > BAG_PATCHES
        if full and item > start:
            yield slice(start, item)
            start, listed, patches = item, 0, 0
        listed, patches = listed + count, patches + length
    if entries:
        yield slice(start, len(entries))


def column_blocks(table: Float[Tensor, "sources D"]) -> list[Tensor]:
    """Copy a table in blocks of `BAG_COLUMNS` columns, each contiguous.

    Rows are read in random order hundreds of times, which is three times as fast from a block that
    fits into the cache as from the whole table.
    """
    return [block.contiguous() for block in table.split(BAG_COLUMNS, dim=1)]


def bags(
    table: list[Tensor],
    source: Int[Tensor, " entries"],
    target: Int[Tensor, " entries"],
    weight: Float[Tensor, " entries"],
    num_targets: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Sum weight · table[source] over the entries of every target, in a fixed order.

    `index_add_` would first copy every source row; sorted by target, the entries are the bags
    that `embedding_bag` sums without a copy and, unlike atomics, always in the same order.

    Args:
        table: `column_blocks` of the source rows.
        source: Row of the table, per entry.
        target: Row of the result, per entry.
        weight: Factor, per entry.
        num_targets: Rows of the result.

    Yields:
        Some columns and (targets, columns) their sums; zeros for a target without entries.

    Example:
        >>> table = column_blocks(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> source, target = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
        >>> [(columns, sums)] = bags(table, source, target, torch.tensor([1.0, 2.0, 3.0]), 2)
        >>> sums.tolist()
        [[0.0, 2.0], [1.0, 3.0]]
    """
    narrow = torch.int16 if num_targets <= 2**15 else torch.int32  # fewer passes of the radix sort
    target, order = target.to(narrow).sort(stable=True)
    targets = torch.arange(num_targets, dtype=narrow, device=target.device)
    offsets = torch.searchsorted(target, targets)
    source, weight = source.index_select(0, order), weight.index_select(0, order)
    first = 0
    for block in table:
        columns = slice(first, first + block.shape[1])
        sums = F.embedding_bag(source, block, offsets, mode="sum", per_sample_weights=weight)
        yield columns, sums
        first = columns.stop
