"""The points of a Qdrant collection that pass a filter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pico_hf.search.payload import Filter, check_filter, matches, payload_of
from pico_hf.search.qdrant_filter import condition_of
from pico_hf.search.qdrant_points import POOLED, SUMMARY, TOKENS, Condition, Point, Points
from pico_hf.search.queries import Queries
from pico_hf.search.shards import StoredImage
from pico_hf.search.vectors import Candidates

PAGE, PAGE_RECORDS = 64, 1000  # points that are read at a time, with vectors and without


class QdrantView:
    """See `View`. What a filter asks that Qdrant cannot check is checked with all payloads.

    Args:
        points: None: there are none.
        chosen: See `PicoIndex.search`.

    Raises:
        ValueError: If it names a field that no image has.
    """

    def __init__(self, points: Points | None, chosen: Filter | None) -> None:
        self._points = points
        self._condition, whole = condition_of(chosen, points is not None and points.truth_values)
        if points is not None and chosen is not None:
            if not whole:
                self._condition = self._passing(points, chosen)
            elif not points.count(self._condition):
                check_filter(chosen, (payload_of(one.payload) for one in _some(points)))

    def _passing(self, points: Points, chosen: Filter) -> Condition:
        """The ids of what passes a filter that Qdrant cannot check alone."""
        seen = [one for page in pages(points, self._condition) for one in page]
        payloads = [payload_of(one.payload) for one in seen]
        check_filter(chosen, payloads)
        passed = zip(seen, payloads, strict=True)
        return Condition(ids=frozenset(one.id for one, own in passed if matches(own, chosen)))

    def __len__(self) -> int:
        return 0 if self._points is None else self._points.count(self._condition)

    def keys(self) -> list[str]:
        """See `View`."""
        return [one.payload["id"] for page in self._pages() for one in page]

    def lacking_summary(self) -> int:
        """See `View`."""
        if self._points is None:
            return 0
        return self._points.count(self._condition.having("has_summary", [0]))

    def blocks(self) -> Iterator[Candidates]:
        """See `View`."""
        for page in self._pages((POOLED, TOKENS, SUMMARY)):
            yield Candidates.of([stored_image(one) for one in page])

    def nearest(self, queries: Queries, depth: int) -> Iterator[Candidates]:
        """By mean tokens, by pooled features, or the best of both, whichever the score has.

        Pooled features are ranked without the images' lengths in weighted columns.
        """
        assert self._points is not None
        means, pooled = queries.tokens.mean(), queries.tokens.pooled
        for number in range(len(queries)):
            ids: list[str] = []
            if queries.share < 1.0:
                ids += self._best(POOLED, means[number], depth)
            if queries.share > 0.0:
                assert pooled is not None
                ids += self._best(SUMMARY, pooled[number], depth)
            found = self._points.get(list(dict.fromkeys(ids)), (POOLED, TOKENS, SUMMARY))
            yield Candidates.of([stored_image(one) for one in sorted(found, key=lambda p: p.id)])

    def _best(self, name: str, query: torch.Tensor, depth: int) -> list[str]:
        assert self._points is not None
        return self._points.nearest(name, query.numpy(), self._condition, depth)

    def _pages(self, vectors: Sequence[str] = ()) -> Iterator[list[Point]]:
        return iter(()) if self._points is None else pages(self._points, self._condition, vectors)


def pages(
    points: Points, condition: Condition, vectors: Sequence[str] = ()
) -> Iterator[list[Point]]:
    """All points that pass, some at a time, in the order of their ids."""
    after: Any = None
    while True:
        found, after = points.page(condition, after, PAGE if vectors else PAGE_RECORDS, vectors)
        if found:
            yield found
        if after is None:
            return


def _some(points: Points) -> list[Point]:
    """Enough points to say which fields payloads have."""
    return points.page(Condition(), None, PAGE_RECORDS)[0]


def stored_image(point: Point) -> StoredImage:
    """What a point keeps of an image, in fp32."""
    tokens = torch.from_numpy(point.vectors[TOKENS])
    summary = point.vectors.get(SUMMARY)
    record = {key: point.payload[key] for key in ("id", "digest", "paths", "payload")}
    return StoredImage(
        record,
        torch.from_numpy(point.vectors[POOLED]),
        tokens,
        torch.ones(len(tokens)),
        None if summary is None else torch.from_numpy(summary),
    )
