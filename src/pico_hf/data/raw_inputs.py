"""Images and texts as users hand them over: as lists, and as rows for the collator."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pico_hf.data.image_files import short
from pico_hf.data.images import as_rgb


def image_list(images: Any) -> Sequence[Any]:
    """A list of images, also of one that was given by itself."""
    alone = isinstance(images, str | os.PathLike | bytes | dict | Image.Image)
    array = isinstance(images, np.ndarray | Tensor)
    return _some([images] if alone or (array and images.ndim < 4) else images, "images")


def text_list(texts: Any) -> Sequence[str]:
    """A list of texts, also of one that was given by itself."""
    return _some([texts] if isinstance(texts, str) else texts, "texts")


def image_rows(images: Sequence[Any], background: tuple[int, int, int]) -> RawRows:
    """Rows of one image each, which are read when they are asked for.

    Args:
        images: Paths, PIL images, bytes or arrays of pixels.
        background: Colour behind transparent pixels.

    Returns:
        Rows that raise ValueError for an image that cannot be read; it is named by its place.
    """
    return RawRows(images, partial(_readable, background=background))


def caption_rows(texts: Sequence[str]) -> RawRows:
    """Rows of one caption each; they raise ValueError for one that is empty or no string."""
    return RawRows(texts, _caption)


def _some(items: Any, name: str) -> Sequence[Any]:
    if isinstance(items, Mapping):
        raise ValueError(f"`{name}` must be a list, got {type(items).__name__}.")
    try:
        items = items if hasattr(items, "__getitem__") else list(items)
        count = len(items)
    except TypeError:
        raise ValueError(f"`{name}` must be a list, got {type(items).__name__}.") from None
    if count == 0:
        raise ValueError(f"`{name}` must hold at least one item, got none.")
    return items


class RawRows(Dataset):
    """Items one by one, as the collator takes them."""

    def __init__(self, items: Sequence[Any], row: Callable[[int, Any], dict[str, Any]]) -> None:
        self.items, self.row = items, row

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.row(number, self.items[number])


def _readable(number: int, image: Any, background: tuple[int, int, int]) -> dict[str, Any]:
    try:
        return {"image": as_rgb(image, background)}
    except ValueError as error:
        name = f" ({short(repr(os.fspath(image)))})" if isinstance(image, str | os.PathLike) else ""
        raise ValueError(f"`images`[{number}]{name}: {error}") from error


def _caption(number: int, text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise ValueError(f"`texts`[{number}] must be a string, got {type(text).__name__}.")
    if not text.strip():
        raise ValueError(f"`texts`[{number}] is empty. Give it words, or leave it out.")
    return {"caption": text}
