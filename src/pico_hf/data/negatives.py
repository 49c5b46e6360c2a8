"""Mined hard negatives of a split: how rows name them, and how pairs bring them into a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

# Column of mined rows: for each image the keys of its negatives, hardest first.
NEGATIVES = "negatives"
_MINED = {"image", "captions", "image_id", "gallery", "digest", NEGATIVES}


def refuse_reading_anew(columns: Iterable[str]) -> None:
    """Raises ValueError for the columns of mined rows: their negatives would be lost in silence."""
    if set(columns) >= _MINED:
        raise ValueError(
            "The rows have mined `negatives`, which are lost where rows are read anew. Pass the "
            "`datasets.Dataset` as it was mined, with no column more, from `load_from_disk(…)` or "
            "`datasets.Dataset.from_parquet(…)`, or remove the column."
        )


def image_keys(facts: Mapping[str, Any]) -> list[str]:
    """(rows,) a name for each image that depends on what it is and not on where its row stands.

    Args:
        facts: Columns `digest`, `gallery` and `image_id` of checked rows.
    """
    parts = zip(facts["digest"], facts["gallery"], facts["image_id"], strict=True)
    return [_digest(repr(part), 16).hex() for part in parts]


def with_negatives(
    rows: datasets.Dataset, order: Sequence[int], numbers: Sequence[Sequence[int]]
) -> datasets.Dataset:
    """Checked rows with the column `NEGATIVES`, in place of one that is there.

    Args:
        rows: Checked rows.
        order: Row of each pair.
        numbers: (pairs,) the negatives of each pair, by their numbers, hardest first.
    """
    rows = rows.remove_columns([name for name in rows.column_names if name == NEGATIVES])
    keys = image_keys(rows.with_format(None))
    named: list[list[str]] = [[] for _ in keys]
    for row, own in zip(order, numbers, strict=True):
        named[row] = [keys[order[number]] for number in own]
    return rows.add_column(NEGATIVES, named, feature=datasets.List(datasets.Value("string")))


@dataclass(frozen=True)
class Negatives:
    """Which pairs of a split are hard negatives of which.

    Attributes:
        keys: (pairs,) of the images, in canonical order.
        numbers: (pairs,) the negatives of each pair, by their numbers, hardest first.
    """

    keys: Sequence[str]
    numbers: Sequence[Sequence[int]]

    @classmethod
    def of(cls, rows: Any, order: Sequence[int]) -> Negatives | None:
        """Reads the column `NEGATIVES`; None if the rows have none.

        What is not among the rows (any more) is left out, and so is what became one identity with
        the image itself.

        Args:
            rows: Checked rows.
            order: Row of each pair.
        """
        if NEGATIVES not in rows.column_names:
            return None
        facts = rows.with_format(None)
        keys, names, named = image_keys(facts), list(facts["image_id"]), list(facts[NEGATIVES])
        number_of = {keys[row]: number for number, row in enumerate(order)}
        numbers = [
            [n for key in named[row] or () if (n := number_of.get(key)) is not None]
            for row in order
        ]
        apart = [
            [n for n in own if names[order[n]] != names[row]]
            for row, own in zip(order, numbers, strict=True)
        ]
        return cls([keys[row] for row in order], apart)

    @property
    def are_missing(self) -> bool:
        """Whether no pair has a negative that is among the rows."""
        return not any(self.numbers)

    @property
    def per_pair(self) -> float:
        """How many negatives a pair has on average."""
        return sum(map(len, self.numbers)) / max(1, len(self.numbers))

    def joined(self, batch: Sequence[int], draw: str) -> list[int]:
        """A batch of pairs, and after them one negative of each pair.

        A pair brings the one of its negatives that is drawn, or the next one that is not in the
        batch yet. If all are, it brings none.

        Args:
            batch: Numbers of pairs.
            draw: What the choice depends on besides the image.

        Example:
            >>> Negatives(["a", "b", "c"], [[2], [0, 2], []]).joined([0, 1, 2], "")
            [0, 1, 2]
            >>> Negatives(["a", "b", "c"], [[2], [0, 2], []]).joined([0, 1], "")
            [0, 1, 2]
        """
        found = dict.fromkeys(batch)  # in order, and a set
        for number in batch:
            own = self.numbers[number]
            first = _drawn(f"{draw}/{self.keys[number]}") % len(own) if own else 0
            new = (n for n in (*own[first:], *own[:first]) if n not in found)
            if (negative := next(new, None)) is not None:
                found[negative] = None
        return [*batch, *list(found)[len(set(batch)) :]]


def _drawn(key: str) -> int:
    return int.from_bytes(_digest(key, 8))


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()
