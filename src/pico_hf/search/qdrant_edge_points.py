"""A Qdrant collection in this process: qdrant-edge in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pico_hf.search.qdrant_points import (
    DATATYPES,
    POOLED,
    SUMMARY,
    TOKENS,
    Condition,
    Point,
    arrays,
)


def edge_library() -> Any:
    """The module; ImportError that says what to install."""
    try:
        import qdrant_edge
    except ImportError as error:
        raise ImportError(
            "An index with store='qdrant' needs qdrant-edge-py, which is not installed. Install "
            "it with: pip install 'pico-hf[qdrant]'"
        ) from error
    return qdrant_edge


class EdgePoints:
    """See `Points`.

    Args:
        folder: Of a shard that was made before.
    """

    truth_values = False  # qdrant-edge 0.9 takes MatchValue(True) for a number

    def __init__(self, folder: Path) -> None:
        self._edge, self._folder = edge_library(), folder
        self._kit = _kit(self._edge)
        try:
            self._shard: Any = self._edge.EdgeShard.load(str(folder))
        except Exception as error:  # the library has but this class
            if "WouldBlock" in str(error):
                raise TimeoutError(
                    f"Another process has the index {str(folder.parent)!r} open, and only one can. "
                    "Close it there, or keep the index on a Qdrant server or in files."
                ) from error
            raise ValueError(
                f"The index {str(folder.parent)!r} cannot be opened ({_first_line(error)}). "
                "Restore it from a copy, or make it anew."
            ) from error

    @classmethod
    def create(cls, folder: Path, width: int, dtype: str) -> EdgePoints:
        """An empty collection; what a killed process left in the folder goes."""
        edge = edge_library()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind = getattr(edge.VectorStorageDatatype, DATATYPES[dtype].capitalize())
        one = edge.EdgeVectorParams(size=width, distance=edge.Distance.Dot)
        tokens = edge.EdgeVectorParams(
            size=width,
            distance=edge.Distance.Dot,
            datatype=kind,
            multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
            hnsw_config=edge.HnswIndexConfig(m=0, ef_construct=4, full_scan_threshold=0),
        )
        config = edge.EdgeConfig(vectors={POOLED: one, TOKENS: tokens, SUMMARY: one})
        try:
            shard = edge.EdgeShard.create(str(folder), config)
            shard.flush()
            shard.close()
        except Exception as error:
            raise _not_written(error, folder) from error
        return cls(folder)

    def put(self, points: Sequence[Point]) -> None:
        """See `Points`."""
        own = [self._edge.Point(one.id, dict(one.vectors), one.payload) for one in points]
        self._update(self._edge.UpdateOperation.upsert_points(own))

    def put_payloads(self, payloads: Mapping[str, dict[str, Any]]) -> None:
        """See `Points`."""
        for key, payload in payloads.items():
            self._update(self._edge.UpdateOperation.overwrite_payload([key], payload))

    def delete(self, ids: Sequence[str]) -> None:
        """See `Points`."""
        self._update(self._edge.UpdateOperation.delete_points(list(ids)))

    def get(self, ids: Sequence[str], vectors: Sequence[str] = ()) -> list[Point]:
        """See `Points`."""
        return [_point(one) for one in self._shard.retrieve(list(ids), True, list(vectors))]

    def page(
        self, condition: Condition, after: Any, limit: int, vectors: Sequence[str] = ()
    ) -> tuple[list[Point], Any]:
        """See `Points`."""
        request = self._edge.ScrollRequest(
            offset=after,
            limit=limit,
            filter=condition.filter(self._kit),
            with_payload=True,
            with_vector=list(vectors),
        )
        found, following = self._shard.scroll(request)
        return [_point(one) for one in found], following

    def count(self, condition: Condition) -> int:
        """See `Points`."""
        request = self._edge.CountRequest(exact=True, filter=condition.filter(self._kit))
        return self._shard.count(request)

    def nearest(self, name: str, query: np.ndarray, condition: Condition, limit: int) -> list[str]:
        """See `Points`."""
        request = self._edge.QueryRequest(
            limit=limit,
            query=self._edge.Query.Nearest(query.tolist(), using=name),
            filter=condition.filter(self._kit),
        )
        return [str(one.id) for one in self._shard.query(request)]

    def settle(self) -> None:
        """See `Points`."""
        self._do(self._shard.flush)
        self._do(self._shard.optimize)

    def close(self) -> None:
        """See `Points`."""
        self._shard.close()

    def _update(self, operation: Any) -> None:
        self._do(lambda: self._shard.update(operation))
        self._do(self._shard.flush)

    def _do(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # the library has but this class
            raise _not_written(error, self._folder) from error


def _point(one: Any) -> Point:
    return Point(str(one.id), one.payload or {}, arrays(one.vector))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _not_written(error: Exception, folder: Path) -> OSError:
    return OSError(
        f"The index {str(folder.parent)!r} could not be written ({_first_line(error)}). What it "
        "held before is still there; make room and run the same call again."
    )


def _kit(edge: Any) -> SimpleNamespace:
    """What `Condition.filter` is built from."""
    return SimpleNamespace(
        truth_values=False,
        Filter=lambda must: edge.Filter(must=must),
        AnyOf=lambda conditions: edge.Filter(should=conditions),
        Equal=lambda field, value: edge.FieldCondition(field, match=edge.MatchValue(value)),
        Between=lambda field, low, high: edge.FieldCondition(
            field, range=edge.RangeFloat(gte=low, lte=high)
        ),
        Ids=lambda ids: edge.HasIdCondition(set(ids)),
    )
