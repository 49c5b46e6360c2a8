"""The images of an index in a Qdrant collection: in this process, on a server, on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pico_hf.search.payload import Filter, check_filter
from pico_hf.search.qdrant_points import POOLED, SUMMARY, TOKENS, Condition, Point, Points, point_id
from pico_hf.search.qdrant_view import PAGE_RECORDS, QdrantView, pages, stored_image
from pico_hf.search.shards import StoredImage, grouped

Make = Callable[[dict[str, Any]], Points]


class QdrantStore:
    """See `Store`. An image is a point whose id is made from its own, so nothing is there twice.

    A change adds or replaces images first and deletes others then: a process that is killed in
    between leaves what the next run deletes.

    Args:
        place: Folder or address.
        facts: See `Store`.
        points: None until the width is known.
        make: Makes the collection from facts with a width.
    """

    dtype = "float32"

    def __init__(self, place: str, facts: dict[str, Any], points: Points | None, make: Make):
        self.place, self._facts = place, facts
        self._points, self._make = points, make
        self._records: dict[str, dict[str, Any] | None] = {}  # what was looked up
        self._owners: dict[str, list[str]] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """See `Store`."""
        return self._facts

    def __len__(self) -> int:
        return 0 if self._points is None else self._points.count(Condition())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Nothing is locked: a folder has one process anyway, and a server orders changes."""
        self.refresh()
        yield

    def refresh(self) -> None:
        """Forgets what was looked up."""
        self._records, self._owners = {}, {}

    def compact(self) -> None:
        """Lets the engine join its segments."""
        if self._points is not None:
            self._points.settle()

    def verify(self) -> None:
        """Counts the points: the engine reads its files and says what it cannot read."""
        len(self)

    def close(self) -> None:
        """See `Store`."""
        if self._points is not None:
            self._points.close()

    def keys(self) -> list[str]:
        """Ids in the order of the collection."""
        return self.view(None).keys()

    def look_up(self, keys: Sequence[str], paths: Sequence[str]) -> None:
        """Asks for many at a time."""
        self.refresh()
        points = self._points
        if points is None:
            return
        self._records = dict.fromkeys(keys)
        self._owners = {path: [] for path in paths}
        names = [point_id(key) for key in keys]
        parts = (names[n : n + PAGE_RECORDS] for n in range(0, len(names), PAGE_RECORDS))
        found = [point for part in parts for point in points.get(part)]
        if paths:
            owned = Condition().having("paths", sorted(set(paths)))
            found += [point for page in pages(points, owned) for point in page]
        for point in found:
            key = point.payload["id"]
            self._records[key] = point.payload
            for path in point.payload["paths"]:
                owners = self._owners.get(path)
                if owners is not None and key not in owners:
                    owners.append(key)

    def record(self, key: str) -> dict[str, Any] | None:
        """See `Store`."""
        stored = self._stored(key)
        return None if stored is None else _record(stored)

    def has_summary(self, key: str) -> bool:
        """See `Store`."""
        stored = self._stored(key)
        return stored is not None and bool(stored["has_summary"])

    def _stored(self, key: str) -> dict[str, Any] | None:
        if key not in self._records and self._points is not None:
            found = self._points.get([point_id(key)])
            self._records[key] = found[0].payload if found else None
        return self._records.get(key)

    def owner(self, path: str, besides: str) -> str | None:
        """See `Store`; two may have it where a process was killed."""
        if path not in self._owners and self._points is not None:
            owned = Condition().having("paths", [path])
            found = [point for page in pages(self._points, owned) for point in page]
            self._owners[path] = [point.payload["id"] for point in found]
        return next((key for key in self._owners.get(path, []) if key != besides), None)

    def change(self, puts: Sequence[StoredImage | dict[str, Any]], deleted: Iterable[str]) -> None:
        """See `Store`."""
        images = [put for put in puts if isinstance(put, StoredImage)]
        records = [put for put in puts if not isinstance(put, StoredImage)]
        if images:
            self._ready(images[0].tokens.shape[1]).put([_point(image) for image in images])
        if records:
            payloads = {
                point_id(one["id"]): {**one, "has_summary": int(self.has_summary(one["id"]))}
                for one in records
            }
            assert self._points is not None
            self._points.put_payloads(payloads)
        gone = [point_id(key) for key in deleted]
        if gone and self._points is not None:
            self._points.delete(gone)
        self.refresh()

    @classmethod
    def create(
        cls, place: str, facts: dict[str, Any], points: Points | None, make: Make
    ) -> QdrantStore:
        """A new collection, made at once if the width is known."""
        store = cls(place, facts, points, make)
        if facts["width"] is not None:
            store._ready(facts["width"])
        return store

    def _ready(self, width: int) -> Points:
        if self._points is None:
            facts = {**self._facts, "width": width}
            self._points = self._make(facts)
            self._facts = facts
        return self._points

    def view(self, chosen: Filter | None) -> QdrantView:
        """See `Store`."""
        check_filter(chosen, [])
        return QdrantView(self._points, chosen)

    def groups(self) -> Iterator[list[StoredImage]]:
        """See `Store`."""
        names = (POOLED, TOKENS, SUMMARY)
        if self._points is None:
            return iter(())
        found = (point for page in pages(self._points, Condition(), names) for point in page)
        return grouped(stored_image(point).stored_as(self._facts["dtype"]) for point in found)


def _record(stored: dict[str, Any]) -> dict[str, Any]:
    return {key: stored[key] for key in ("id", "digest", "paths", "payload")}


def _point(image: StoredImage) -> Point:
    vectors = {POOLED: image.pooled.numpy(), TOKENS: image.in_fp32().numpy()}
    if image.summary is not None:
        vectors[SUMMARY] = image.summary.numpy()
    payload = {**image.record, "has_summary": int(image.summary is not None)}
    return Point(point_id(image.record["id"]), payload, vectors)
