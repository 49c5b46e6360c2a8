"""The images of a folder's index that pass a filter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pico_hf.search.payload import Filter, check_filter, matches, payload_of
from pico_hf.search.queries import Queries
from pico_hf.search.vectors import Candidates, ShardVectors


class FileView:
    """Rows of mapped shards, see `View`.

    Args:
        records: Of every row.
        vectors: Of every row.
        has_summary: (rows,) bool.
        rows: Those that are meant, ascending.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        vectors: ShardVectors,
        has_summary: Tensor,
        rows: Tensor,
    ) -> None:
        self._records, self._vectors, self._rows = records, vectors, rows
        self._has_summary = has_summary

    def __len__(self) -> int:
        return len(self._rows)

    def keys(self) -> list[str]:
        """Ids of the images."""
        return [self._records[row]["id"] for row in self._rows.tolist()]

    def lacking_summary(self) -> int:
        """How many images have no pooled feature."""
        return int((~self._has_summary[self._rows]).sum())

    def blocks(self) -> Iterator[Candidates]:
        """All images; nothing is read before it is scored."""
        yield Candidates(self._records, self._vectors, self._rows)

    def nearest(self, queries: Queries, depth: int) -> Iterator[Candidates]:
        """The best of the first stage for every query."""
        for own in self._vectors.first_stage(self._rows, queries).t():
            near = own.topk(depth).indices.sort().values
            yield Candidates(self._records, self._vectors, self._rows[near])


def passing(records: Sequence[dict[str, Any]], rows: Tensor, chosen: Filter | None) -> Tensor:
    """Rows that pass a filter; ValueError for a field that no image has."""
    if chosen is None:
        return rows
    payloads = [payload_of(records[row]) for row in rows.tolist()]
    check_filter(chosen, payloads)
    return rows[torch.tensor([matches(p, chosen) for p in payloads], dtype=torch.bool)]
