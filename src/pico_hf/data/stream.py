"""Training pairs of a stream: data that is read row by row and has no length."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from torch.utils.data import IterableDataset

from pico_hf.data.columns import (
    find_caption_column,
    find_image_column,
    find_in_row,
    require_column,
    texts_of,
)
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.negatives import refuse_reading_anew

ROWS_OF_IDENTITY = 16


class ImageTextStream(IterableDataset):
    """Gives training pairs of a stream, one caption per image, and begins anew when it ends.

    The order is that of the stream: shuffle it with `rows.shuffle(seed=…, buffer_size=…)`, which
    orders every pass differently and always alike. A run that resumes reads from the beginning up
    to where it was, so that it continues exactly.

    Args:
        rows: A `datasets.IterableDataset`, as `load_dataset(…, streaming=True)` gives it, also of
            webdataset archives.
        seed: Seed of the choice of captions.
        image_column: None finds it by its type or name.
        caption_column: One caption or a list of captions per row; None finds it by its name.
        image_id_column: Rows of one value show the same thing and are no negatives of each other;
            None goes by the content of images.

    Raises:
        ValueError: If a column is missing or the stream is empty; while pairs are taken, if a row
            has no image or no caption.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        seed: int = 0,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        image_id_column: str | None = None,
    ) -> None:
        self.seed, self.image_id_column = seed, image_id_column
        rows = rows.with_format(None)
        first = next(iter(rows), None)
        if first is None:
            raise ValueError("The stream has no rows. Pass one with at least two pairs.")
        refuse_reading_anew(first)
        columns = {"image_column": image_column, "caption_column": caption_column}
        for argument, name in {**columns, "image_id_column": image_id_column}.items():
            if name is not None:
                require_column(first, argument, name)
        if rows.features is None:
            self.columns = find_in_row(first, image_column, caption_column)
            if None in self.columns:
                raise ValueError(
                    "The stream has no image or no caption in its first row, only: "
                    f"{', '.join(first)}. Name the columns with `image_column` and "
                    "`caption_column` of `ImageTextStream`."
                )
        else:
            image = image_column or find_image_column(rows)
            self.columns = image, caption_column or find_caption_column(rows)
            # Decoded by the collator, like images of a split.
            rows = rows.cast_column(image, datasets.Image(decode=False))
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Training pairs without end, with the identity of an image as `image_ids`."""
        for number in range(2**63):
            self.rows.set_epoch(number)
            pairs = self._pass(number)
            first = next(pairs, None)
            if first is None:  # a worker process without a share of the files
                return
            yield first
            yield from pairs

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: passes are counted here, since all steps of a run are one epoch."""

    @property
    def identity(self) -> str:
        """Changes with the first rows: nobody has seen all of them."""
        digest = hashlib.sha256()
        self.rows.set_epoch(0)
        for row, values in enumerate(islice(self.rows, ROWS_OF_IDENTITY)):
            _, captions = self._checked(row, values)
            digest.update(repr((self._identity(values), captions)).encode())
        return digest.hexdigest()

    def first(self, images: int) -> ImageTextDataset:
        """The first rows as a split, which statistics are taken from.

        Args:
            images: At most so many rows, >= 1.
        """
        if images not in self._first:
            self._first[images] = self._stored(images)
        return self._first[images]

    sample = first

    def probe(self, size: int) -> Any:
        """The first `size` images with their first captions."""
        return self.first(size).probe(size)

    @cached_property
    def _first(self) -> dict[int, ImageTextDataset]:
        return {}

    def _pass(self, number: int) -> Iterator[dict[str, Any]]:
        """Pairs of one pass through the stream."""
        for row, values in enumerate(self.rows):
            image, captions = self._checked(row, values)
            key = f"{self.seed}/{number}/{row}"
            caption = captions[_hashed(key.encode()) % len(captions)]
            yield {"image": image, "caption": caption, "image_ids": self._identity(values)}

    def _checked(self, row: int, values: Mapping[str, Any]) -> tuple[Any, list[str]]:
        image, caption = self.columns
        if values[image] is None:
            raise ValueError(
                f"Row {row} of the stream has no image. Leave such rows out with "
                f"`rows.filter(lambda row: row[{image!r}] is not None)`."
            )
        return values[image], texts_of(row, values[caption])

    def _identity(self, values: Mapping[str, Any]) -> int:
        """A number that is equal for rows of one image, whenever and wherever they are read."""
        named = values[self.image_id_column] if self.image_id_column else None
        if named is not None:
            return _hashed(str(named).encode())
        image = values[self.columns[0]]
        if isinstance(image, dict):
            image = image["bytes"] if image.get("bytes") is not None else image["path"]
        if isinstance(image, Image.Image):
            image = image.tobytes()
        return _hashed(image if isinstance(image, bytes) else os.fspath(image).encode())

    def _stored(self, images: int) -> ImageTextDataset:
        """The first rows in a temporary file, which memory is mapped to."""
        text = datasets.Value("string")
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "captions": datasets.List(text),
                "image_id": text,
            }
        )
        folder = tempfile.mkdtemp(prefix="pico-hf-")
        path = os.path.join(folder, "first.arrow")
        writer = ArrowWriter(path=path, features=features)
        self.rows.set_epoch(0)
        for row, values in enumerate(islice(self.rows, images)):
            image, captions = self._checked(row, values)
            number = str(self._identity(values))
            writer.write({"image": image, "captions": captions, "image_id": number})
        writer.finalize()
        split = ImageTextDataset(datasets.Dataset.from_file(path), self.seed)
        weakref.finalize(split, shutil.rmtree, folder, ignore_errors=True)
        return split


def _hashed(content: bytes) -> int:
    """A number below 2^63, which fits a tensor."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1
