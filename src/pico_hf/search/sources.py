"""What images are added from: a folder, files, images in memory, or a data set."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pico_hf.data.identity import content_digest, pixel_digest
from pico_hf.data.image_files import READ_FORMATS, file_bytes
from pico_hf.data.images import as_rgb
from pico_hf.search.payload import Payload, checked_payload

READ_IMAGES, READ_BYTES = 64, 2**27  # that are read ahead


@dataclass(frozen=True)
class SourceImage:
    """One image that is to be added.

    Attributes:
        name: Of it in messages.
        value: A path, bytes, a PIL image or an array.
        path: Where its file is; None for images in memory.
        payload: What is kept beside it; None leaves what an index has.
        key: Its id as the user names it; None takes its content.
    """

    name: str
    value: Any
    path: str | None = None
    payload: Payload | None = None
    key: str | None = None

    def read(self) -> tuple[str, Any]:
        """(digest of the content, the content).

        Raises:
            ValueError: If it cannot be read.
            OSError: Likewise.
        """
        if self.path is not None:
            content = file_bytes(self.path)
            return content_digest(content), content
        if isinstance(self.value, bytes):
            return content_digest(self.value), self.value
        image = as_rgb(self.value)
        return pixel_digest(image), image


ReadImage = tuple[SourceImage, tuple[str, Any] | Exception]  # with its digest and content


def read_ahead(images: Iterable[SourceImage]) -> Iterator[list[ReadImage]]:
    """Images with their contents, some at a time; an image that cannot be read with its error."""
    group: list[ReadImage] = []
    size = 0
    for image in images:
        read: tuple[str, Any] | Exception
        try:
            read = image.read()
            size += _bytes(read[1])
        except (ValueError, OSError) as error:
            read = error
        group.append((image, read))
        if len(group) >= READ_IMAGES or size >= READ_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _bytes(content: Any) -> int:
    return len(content) if isinstance(content, bytes) else content.width * content.height * 3


def images_of(
    source: Any,
    ids: Sequence[str] | None = None,
    payloads: Sequence[Mapping[str, Any]] | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
) -> Sequence[SourceImage]:
    """What a source holds, in a fixed order; nothing is read yet.

    Args:
        source: See `PicoIndex.add`.
        ids: Of each image, all different.
        payloads: Of each image.
        image_column: Of a data set.
        id_column: Of a data set.

    Raises:
        ValueError: If there are no images, or `ids` or `payloads` do not fit them.
    """
    rows = getattr(source, "rows", source)  # of an ImageTextDataset
    if hasattr(rows, "column_names") and hasattr(rows, "features"):
        images: Sequence[SourceImage] = _Rows(rows, image_column, id_column)
    elif isinstance(source, str | Path) and Path(source).is_dir():
        images = [_file(path) for path in _image_files(Path(source))]
    elif isinstance(source, list | tuple):
        images = [_single(value, number) for number, value in enumerate(source)]
    else:
        images = [_single(source, 0)]
    if not len(images):
        raise ValueError("`source` must hold at least one image, got none.")
    return _named(images, ids, payloads) if ids is not None or payloads is not None else images


def _image_files(folder: Path) -> list[Path]:
    """Files of a folder and its subfolders that look like images, in order of their paths."""
    Image.init()
    readable = {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind in READ_FORMATS
    }
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(folder).parts)
    ]
    images = [path for path in files if path.suffix.lower() in readable]
    if not images:
        others = sorted({path.suffix or path.name for path in files})[:5]
        held = f"{len(files)} files ({', '.join(others)})" if files else "nothing"
        raise ValueError(
            f"`source` must hold images, got the folder {str(folder)!r} with {held} and no image. "
            "Name a folder with .jpg, .png or other image files."
        )
    return images


def _file(path: str | Path) -> SourceImage:
    absolute = os.path.abspath(path)
    return SourceImage(str(path), absolute, absolute)


def _single(value: Any, number: int) -> SourceImage:
    if isinstance(value, str | Path):
        return _file(value)
    return SourceImage(f"image {number}", value)


def _named(
    images: Sequence[SourceImage],
    ids: Sequence[str] | None,
    payloads: Sequence[Mapping[str, Any]] | None,
) -> list[SourceImage]:
    for name, values in (("ids", ids), ("payloads", payloads)):
        if values is not None and len(values) != len(images):
            raise ValueError(
                f"`{name}` must have one entry for each of {len(images)} images, got {len(values)}."
            )
    if ids is not None and len(set(ids)) < len(ids):
        twice = next(key for key in ids if list(ids).count(key) > 1)
        raise ValueError(f"`ids` must all be different, got {twice!r} more than once.")
    return [
        SourceImage(
            image.name,
            image.value,
            image.path,
            image.payload if payloads is None else checked_payload(payloads[row], image.name),
            image.key if ids is None else str(ids[row]),
        )
        for row, image in enumerate(images)
    ]


class _Rows(Sequence[SourceImage]):
    """Rows of a data set; every column that JSON can hold becomes payload."""

    def __init__(self, rows: Any, image_column: str | None, id_column: str | None) -> None:
        import datasets  # costs seconds, and only data sets need it

        from pico_hf.data.columns import find_image_column, require_column

        for argument, name in (("image_column", image_column), ("id_column", id_column)):
            if name is not None:
                require_column(rows.column_names, argument, name)
        self.column = image_column or find_image_column(rows)
        self.id_column = id_column
        rows = rows.with_format(None)
        for name, kind in rows.features.items():
            if isinstance(kind, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        images = [n for n, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        left_out = {self.column, "digest", *images}
        self.fields = [name for name in rows.column_names if name not in left_out]
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self) -> list[Any]:
        """Of all rows, without reading their images."""
        return list(self.rows[self.id_column])

    def __iter__(self) -> Iterator[SourceImage]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: Any) -> Any:
        row = self.rows[number]
        value, name = row[self.column], f"row {number}"
        path = None
        if isinstance(value, dict):
            content = value.get("bytes")
            path, value = (value.get("path"), None) if content is None else (None, content)
        elif isinstance(value, str):
            path = value
        payload = checked_payload({column: row[column] for column in self.fields}, name)
        key = None if self.id_column is None else str(row[self.id_column])
        return SourceImage(name, value, os.path.abspath(path) if path else None, payload, key)


class Share(Sequence[SourceImage]):
    """The images of one of several processes.

    Args:
        images: Of all.
        rank: Number of the process, from 0.
        count: How many processes there are.
        by_id: True if images may have the same id: those go to one process.
    """

    def __init__(self, images: Sequence[SourceImage], rank: int, count: int, by_id: bool) -> None:
        numbers: Sequence[int] = range(rank, len(images), count)
        if by_id and count > 1:
            keys = images.ids() if isinstance(images, _Rows) else [one.key for one in images]
            hashes = (zlib.crc32(str(key).encode()) for key in keys)
            numbers = [number for number, own in enumerate(hashes) if own % count == rank]
        self._images, self._numbers = images, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: Any) -> Any:
        return self._images[self._numbers[number]]
