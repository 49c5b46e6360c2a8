"""Points of a Qdrant collection, in this process or on a server, in one vocabulary.

A point has named vectors `pooled` (mean of the tokens), `tokens` (compared by MaxSim) and, where
it is known, `summary` (the encoder's pooled feature). Its id is made from the image's id.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

POOLED, TOKENS, SUMMARY = "pooled", "tokens", "summary"
# How each storage type is called by Qdrant; its own 8 bits have a scale per vector as ours do.
DATATYPES = {"float16": "float16", "float32": "float32", "int8": "turbo8"}


def point_id(key: str) -> str:
    """The id of an image's point."""
    return str(uuid.UUID(bytes=hashlib.blake2b(key.encode(), digest_size=16).digest()))


@dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        id: See `point_id`.
        payload: The image's record.
        vectors: By name: (D,) or (tokens, D) fp32. Empty: not asked for.
    """

    id: str
    payload: dict[str, Any]
    vectors: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Condition:
    """Which points are meant.

    Attributes:
        fields: Field of the record → values; a point passes if one of them is the field's or among
            its entries.
        ids: If not None, only these points.
    """

    fields: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    ids: frozenset[str] | None = None

    def having(self, field: str, values: Sequence[Any]) -> Condition:
        """Likewise, with one more field."""
        return Condition((*self.fields, (field, tuple(values))), self.ids)

    def filter(self, kit: SimpleNamespace) -> Any:
        """In a library's own terms.

        Args:
            kit: `Filter(must)`, `AnyOf(conditions)`, `Equal(field, value)`, `Between(field, low,
                high)`, `Ids(ids)` and `truth_values`.
        """
        must = [kit.AnyOf(self._values(kit, *own)) for own in self.fields]
        if self.ids is not None:
            must.append(kit.Ids(self.ids))
        return kit.Filter(must) if must else None

    @staticmethod
    def _values(kit: SimpleNamespace, field: str, values: Sequence[Any]) -> list[Any]:
        """Numbers are equal whatever their type is, as in Python: True is 1 is 1.0."""
        found = []
        for value in values:
            if isinstance(value, str):
                found.append(kit.Equal(field, value))
                continue
            found.append(kit.Between(field, float(value), float(value)))
            if value in (0, 1) and kit.truth_values:
                found.append(kit.Equal(field, bool(value)))
        return found


class Points(Protocol):
    """A collection; every method raises OSError if it cannot be reached or written.

    Attributes:
        truth_values: Whether conditions can tell True and False, which 1 and 0 are equal to.
    """

    truth_values: bool

    def put(self, points: Sequence[Point]) -> None:
        """Adds points or replaces them as a whole."""

    def put_payloads(self, payloads: Mapping[str, dict[str, Any]]) -> None:
        """Replaces payloads of points that are there."""

    def delete(self, ids: Sequence[str]) -> None:
        """Deletes points; those that are not there are passed over."""

    def get(self, ids: Sequence[str], vectors: Sequence[str] = ()) -> list[Point]:
        """Points by id, in any order; those that are not there are left out."""

    def page(
        self, condition: Condition, after: Any, limit: int, vectors: Sequence[str] = ()
    ) -> tuple[list[Point], Any]:
        """Some points in the order of ids, and where the next page starts; None: it was the last.

        Args:
            condition: Which points.
            after: What the page before gave; None: the first page.
            limit: Points of a page.
            vectors: Names of vectors that come along.
        """

    def count(self, condition: Condition) -> int:
        """How many points pass."""

    def nearest(self, name: str, query: np.ndarray, condition: Condition, limit: int) -> list[str]:
        """Ids of the points whose named vector has the largest product with (D,)."""

    def settle(self) -> None:
        """Makes what was written last, and builds what speeds up a search."""

    def close(self) -> None:
        """Lets go of files and connections."""


def arrays(vectors: Any) -> dict[str, np.ndarray]:
    """Vectors as libraries give them, in fp32."""
    return {name: np.asarray(value, dtype=np.float32) for name, value in (vectors or {}).items()}
