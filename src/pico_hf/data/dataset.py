"""A retrieval split: images with their captions, as training pairs and for ranking."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pico_hf.data.loading import COLUMNS, checked_rows


class _Rows(Dataset):
    """One column's values as rows `{key: value}`."""

    def __init__(self, key: str, values: Sequence[Any]) -> None:
        self.key, self.values = key, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {self.key: self.values[row]}


class _Probe(Dataset):
    """The first images, each with its first caption, in fixed order."""

    def __init__(self, images: Dataset, captions: Dataset, first_caption: Sequence[int]) -> None:
        self.images, self.captions, self.first_caption = images, captions, first_caption

    def __len__(self) -> int:
        return len(self.first_caption)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.images[row], **self.captions[self.first_caption[row]]}


class ImageTextDataset(Dataset):
    """A retrieval split: images with one or several captions each.

    As a sequence it gives training pairs: one caption per image and epoch, chosen by a function of
    (seed, epoch, row) alone, so that an interrupted run resumes exactly.

    Args:
        rows: From `load_image_text`, or any data set with an image and a caption column.
        seed: Seed of the choice of captions.
        image_column: None finds it.
        caption_column: None finds it.

    Attributes:
        text_to_image: (captions,) row of the image each caption belongs to.
        image_ids: (images,) identity; images of one identity are no negatives of each other.
        gallery: (images,) which images are ranked together.

    Raises:
        ValueError: If a column is missing, an image unreadable or a caption empty.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        seed: int = 0,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        if getattr(rows, "column_names", None) != COLUMNS:
            rows = checked_rows(rows, image_column=image_column, caption_column=caption_column)
        self.rows = rows
        self.seed, self.epoch = seed, 0
        captions = rows["captions"]
        self._texts = [text for texts in captions for text in texts]
        counts = torch.tensor([len(texts) for texts in captions])
        self.text_to_image: Tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self.image_ids = _codes(rows["image_id"])
        self.gallery = _codes(rows["gallery"])
        self._counts = counts.tolist()
        self._starts = (counts.cumsum(0) - counts).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One training pair, with the identity of its image as `image_ids`."""
        caption = self.captions()[self._starts[row] + self._choice(row)]
        return {**self.images()[row], **caption, "image_ids": int(self.image_ids[row])}

    @property
    def fingerprint(self) -> str:
        """Changes with the data."""
        return self.rows._fingerprint

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the captions of an epoch; accelerate's data loaders call it."""
        self.epoch = epoch

    def images(self) -> Dataset:
        """Every image once, as rows `{"image": PIL image}`."""
        return _Rows("image", self.rows["image"])

    def captions(self) -> Dataset:
        """Every caption once, as rows `{"caption": str}`."""
        return _Rows("caption", self._texts)

    def sample(self, images: int) -> ImageTextDataset:
        """So many images with all their captions, always the same; this split if it has no more."""
        if images >= len(self):
            return self
        return ImageTextDataset(self.rows.select(self._drawn(images)), self.seed)

    def _drawn(self, images: int) -> list[int]:
        """At random: even steps through rows in which styles take turns may meet one style only."""
        return sorted(random.Random(0).sample(range(len(self)), images))

    def probe(self, size: int) -> Dataset:
        """The first `size` images with their first captions, whatever the epoch."""
        return _Probe(self.images(), self.captions(), self._starts[:size])

    def _choice(self, row: int) -> int:
        key = f"{self.seed}/{self.epoch}/{row}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % self._counts[row]


def _codes(values: Sequence[str]) -> Tensor:
    """(rows,) equal numbers for equal values, counted from 0 in order of appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])
