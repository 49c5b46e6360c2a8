"""Batches without padding: items sorted by length, so that items of one length form one block.

Padding then takes no time, and its values (NaN included) cannot reach a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Neighbouring items of equal length."""

    items: slice
    rows: slice
    length: int


@dataclass(frozen=True)
class Chunk:
    """Neighbouring runs that are multiplied together; the slices in `runs` count from its start."""

    items: slice
    rows: slice
    runs: list[Run]


class Packing:
    """Order of the real tokens of a batch, without padding and with the items sorted by length.

    Args:
        mask: True = real token; at least one per item. All index tensors are on its device.

    Example:
        >>> packing = Packing(torch.tensor([[True, True], [False, True]]))
        >>> packing.order.tolist(), packing.lengths.tolist(), packing.rows.tolist()
        ([1, 0], [1, 2], [3, 0, 1])
    """

    def __init__(self, mask: Bool[Tensor, "n tokens"]) -> None:
        self.lengths, self.order = mask.sum(dim=1).sort(stable=True)
        self.ends = self.lengths.cumsum(dim=0)
        self.starts = self.ends - self.lengths
        self.size = mask.numel()
        self.rows: Tensor | None = None  # None = no padding, every token keeps its place
        if not mask.all():
            positions = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
            self.rows = positions[self.order][mask[self.order]]
            self.size = self.rows.numel()

    def take(
        self, features: Float[Tensor, "n tokens D"], rows: slice, dtype: torch.dtype
    ) -> Float[Tensor, "rows D"]:
        """Return the packed tokens `rows`, converted to `dtype`."""
        flat = features.view(-1, features.shape[2])
        chosen = flat[rows] if self.rows is None else flat[self.rows[rows]]
        return chosen.to(dtype)

    def unpack(
        self, packed: Float[Tensor, "rows D"], features: Float[Tensor, "n tokens D"]
    ) -> Float[Tensor, "n tokens D"]:
        """Return packed gradients with the shape and dtype of `features`; padding gets 0."""
        packed = packed.to(features.dtype)
        if self.rows is not None:
            flat = packed.new_zeros(features.shape[0] * features.shape[1], features.shape[2])
            packed = flat.index_copy_(0, self.rows, packed)
        return packed.view(features.shape)

    def tokens_of(self, items: Int[Tensor, " pairs"]) -> tuple[Tensor, Tensor]:
        """List the packed tokens of `items`, item by item.

        Returns:
            For every token the index of its item in `items`, and its packed row.
        """
        lengths = self.lengths[items]
        owner = torch.arange(len(items), device=items.device).repeat_interleave(lengths)
        # Row minus place in the list is the same for all tokens of an item.
        offset = self.starts[items] - (lengths.cumsum(dim=0) - lengths)
        return owner, torch.arange(len(owner), device=items.device) + offset.index_select(0, owner)

    def runs(self, max_rows: int) -> Iterator[Run]:
        """Cut the items into runs of equal length with at most `max_rows` tokens (or one item)."""
        item, row = 0, 0
        lengths, counts = torch.unique_consecutive(self.lengths, return_counts=True)
        for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
            step = max(1, max_rows // length)
            for first in range(0, count, step):
                size = min(step, count - first)
                yield Run(slice(item, item + size), slice(row, row + size * length), length)
                item, row = item + size, row + size * length

    def chunks(self, max_rows: int) -> list[Chunk]:
        """Group the runs into chunks of at most `max_rows` tokens (or one item)."""
        groups: list[list[Run]] = []
        for run in self.runs(max_rows):
            if not groups or run.rows.stop - groups[-1][0].rows.start > max_rows:
                groups.append([])
            groups[-1].append(run)
        return [_chunk(runs) for runs in groups]


def size(part: slice) -> int:
    """Return the number of entries of a slice that has a start and a stop."""
    return part.stop - part.start


def _chunk(runs: list[Run]) -> Chunk:
    first, last = runs[0], runs[-1]
    local = [
        Run(
            items=slice(run.items.start - first.items.start, run.items.stop - first.items.start),
            rows=slice(run.rows.start - first.rows.start, run.rows.stop - first.rows.start),
            length=run.length,
        )
        for run in runs
    ]
    items = slice(first.items.start, last.items.stop)
    return Chunk(items, slice(first.rows.start, last.rows.stop), local)
