"""Reads every image once: what it holds as a digest, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets

from pico_hf.data.columns import find_in_row, not_found
from pico_hf.data.identity import content_digest, pixel_digest
from pico_hf.data.image_files import file_bytes
from pico_hf.data.images import as_rgb, image_problem, is_url, reason
from pico_hf.data.progress import BRIEF, progress_bar

_READ_TWICE = 8  # rows: an image that is flipped every other time changes in one of them


class Read(NamedTuple):
    """What was found where an image should be.

    Attributes:
        problem: None if the image is good.
        digest: Equal for equal content; empty where nothing could be read.
        key: Equal for one image: of its path, or of its content where it has none.
    """

    problem: str | None
    digest: str = ""
    key: str = ""


class EncodedReader:
    """Reads encoded images; a path or a content that comes again is not read again."""

    def __init__(self) -> None:
        self._paths: dict[str, Read] = {}
        self._problems: dict[str, str | None] = {}

    def read(self, value: dict[str, Any] | None) -> Read:
        """One value of a `datasets.Image(decode=False)` column."""
        if value is None or (value["bytes"] is None and not value["path"]):
            return Read("there is none")
        if value["bytes"] is not None:
            return self._content(value["bytes"])
        path = value["path"]
        if path not in self._paths:
            self._paths[path] = self._file(path)
        return self._paths[path]

    def _file(self, path: str) -> Read:
        if is_url(path):
            return Read(image_problem({"bytes": None, "path": path}))
        try:
            return self._content(file_bytes(path))._replace(key=_path_key(path))
        except Exception as error:  # as of any image that cannot be read
            return Read(reason(error))

    def _content(self, content: bytes) -> Read:
        digest = content_digest(content)
        if digest not in self._problems:
            problem = image_problem({"bytes": content, "path": None})
            self._problems[digest] = problem
        return Read(self._problems[digest], digest, digest)


def read_encoded(values: Sequence[dict[str, Any] | None]) -> list[Read]:
    """Reads an `Image(decode=False)` column from its first to its last row."""
    reader = EncodedReader()
    return [reader.read(value) for value in _with_progress(values, len(values))]


class MadeRow(NamedTuple):
    """A row as the user's transform makes it."""

    image: Read
    captions: Any
    identity: Any
    gallery: Any


def read_made(
    rows: datasets.Dataset, image: str, caption: str, identity: str | None, gallery: str | None
) -> Iterator[MadeRow]:
    """Reads rows through their transform, as training will.

    An image is known by its pixels as the transform makes them (a row's own crop of a photo is an
    image of its own), or by what is stored where the transform draws them anew each time.
    """
    stored = _stored(rows, image) if _changes(rows, image) else None
    for number in _with_progress(range(len(rows)), len(rows)):
        try:
            row = rows[number]
            pixels = pixel_digest(as_rgb(row[image]))
            found = None if stored is None else _stored_read(stored[number])
        except (OSError, SyntaxError, ValueError) as error:  # of PIL, or of the transform
            yield MadeRow(Read(reason(error)), None, None, None)
            continue
        others = (None if name is None else row[name] for name in (identity, gallery))
        yield MadeRow(found or Read(None, pixels, pixels), row[caption], *others)


class MadeImages:
    """Row numbers → images as the user's transform makes them, for a data set of checked rows.

    Args:
        rows: The user's, with their transform.
        column: Where the transform puts the image.
    """

    def __init__(self, rows: datasets.Dataset, column: str) -> None:
        self.rows, self.column = rows, column

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Replaces numbers in the column `image`, if it is asked for."""
        if "image" not in batch:
            return batch
        images = [self.rows[number][self.column] for number in batch["image"]]
        return {**batch, "image": images}


def is_made_on_the_fly(rows: datasets.Dataset) -> bool:
    """Whether rows have a transform of the user's."""
    kind, options = rows.format["type"], rows.format["format_kwargs"]
    return kind == "custom" and not isinstance(options.get("transform"), MadeImages)


def made_columns(rows: datasets.Dataset, image: str | None, caption: str | None) -> tuple[str, str]:
    """Which columns of a row made on the fly hold image and captions."""
    row = rows[0]
    image, caption = find_in_row(row, image, caption)
    for argument, name in (("image_column", image), ("caption_column", caption)):
        if name is None:
            raise not_found(argument, list(row))
    return image, caption


def _changes(rows: datasets.Dataset, image: str) -> bool:
    """Whether the transform makes other pixels when a row is read again."""
    for number in range(min(_READ_TWICE, len(rows))):
        try:
            first, second = (pixel_digest(as_rgb(rows[number][image])) for _ in range(2))
        except (OSError, SyntaxError, ValueError):
            continue  # answered when this row is read
        if first != second:
            return True
    return False


def _stored(rows: datasets.Dataset, image: str) -> Sequence[dict[str, Any] | None] | None:
    """The stored images that the transform starts from; None if there is no one such column."""
    raw = rows.with_format(None)
    typed = [name for name, kind in raw.features.items() if isinstance(kind, datasets.Image)]
    if image not in typed and len(typed) != 1:
        return None
    name = image if image in typed else typed[0]
    return raw.cast_column(name, datasets.Image(decode=False))[name]


def _stored_read(value: dict[str, Any] | None) -> Read | None:
    """Of an image that was good as the transform made it."""
    if value is None or (value["bytes"] is None and not value["path"]):
        return None
    if value["bytes"] is not None:
        digest = content_digest(value["bytes"])
        return Read(None, digest, digest)
    return Read(None, content_digest(file_bytes(value["path"])), _path_key(value["path"]))


def _path_key(path: str) -> str:
    return content_digest(os.path.normpath(os.path.abspath(path)))


def _with_progress(values: Iterable[Any], total: int) -> Iterable[Any]:
    return progress_bar(values, "Checking images", total=total, delay=BRIEF)
