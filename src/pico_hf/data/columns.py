"""Finds the column of the images and the column of the captions, by type and by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
from PIL import Image

IMAGE_NAMES = ("image", "img", "picture", "photo", "image_path", "file_name")
CAPTION_NAMES = (
    "captions",
    "caption",
    "text",
    "texts",
    "label",
    "sentences",
    "sentence",
    "description",
    "txt",
)


def find_image_column(rows: datasets.Dataset) -> str:
    """Finds the image column: one of type Image, else one with a usual name.

    Raises:
        ValueError: If there is none, or several of type Image and none has a usual name.
    """
    typed = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    usual = [name for name in IMAGE_NAMES if name in (typed or rows.column_names)]
    if usual or len(typed) == 1:
        return (usual or typed)[0]
    raise not_found("image_column", rows.column_names, typed)


def find_caption_column(rows: datasets.Dataset) -> str:
    """Finds the caption column: texts, or lists of texts, under a usual name.

    Raises:
        ValueError: If there is none; class numbers called `label` are no captions.
    """
    for name in CAPTION_NAMES:
        if name in rows.column_names and _is_text(rows.features[name]):
            return name
    raise not_found("caption_column", rows.column_names, reason=_no_text(rows.features))


def find_in_row(row: Mapping[str, Any], image: str | None, caption: str | None) -> tuple[Any, Any]:
    """Finds the keys of the image and of the caption in one row; None where it has none.

    Args:
        row: A row as a data set gives it.
        image: The user's choice; None finds it.
        caption: Likewise.

    Raises:
        ValueError: If a chosen column is not there.
    """
    for argument, name in (("image_column", image), ("caption_column", caption)):
        if name is not None:
            require_column(row, argument, name)
    found = [name for name, value in row.items() if isinstance(value, Image.Image)]
    images = [name for name in IMAGE_NAMES if name in (found or row)] or found
    texts = [name for name in CAPTION_NAMES if isinstance(row.get(name), str | list | tuple)]
    return image or next(iter(images), None), caption or next(iter(texts), None)


def require_column(columns: Iterable[str], argument: str, name: str) -> None:
    """Raises ValueError if a column is not there, with the ones that are."""
    columns = list(columns)
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(
            f"`{argument}` must be a column of the data, got {name!r}. The columns there are: "
            f"{', '.join(columns)}.{hint}"
        )


def texts_of(row: int, value: Any) -> list[str]:
    """The captions of a row: one or several.

    Raises:
        ValueError: If the value is neither a text nor a list of texts, or if there is none.
    """
    if value is None or (isinstance(value, list | tuple) and not value):
        raise empty_caption(row)
    texts = list(value) if isinstance(value, list | tuple) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"Row {row} has a caption of type {type(text).__name__}. Captions must be texts or "
                "lists of texts, not nested deeper. Name another column with `caption_column`, or "
                "convert this one with `datasets.Dataset.map`."
            )
    return texts


def empty_caption(row: int) -> ValueError:
    """The error for a row without words."""
    return ValueError(
        f"Row {row} has an empty caption. Every image needs at least one caption, and every "
        "caption at least one word."
    )


def _no_text(features: Mapping[str, Any]) -> str:
    """Why a column with a usual name is not taken."""
    for name in CAPTION_NAMES:
        if name in features:
            kind = features[name]
            nested = isinstance(getattr(kind, "feature", None), datasets.List | datasets.Sequence)
            held = "lists of lists" if nested else getattr(kind, "dtype", type(kind).__name__)
            return (
                f" Column `{name}` has a usual name but holds {held}: captions are texts or lists "
                "of texts. Convert it with `datasets.Dataset.map` if it holds the captions."
            )
    return ""


def _is_text(kind: Any) -> bool:
    inner = getattr(kind, "feature", kind)  # of a list
    return getattr(inner, "dtype", None) in ("string", "large_string", "string_view")


def not_found(
    argument: str, columns: list[str], candidates: Iterable[str] = (), reason: str = ""
) -> ValueError:
    """The error for a column that is not named and not found."""
    several = ", ".join(candidates)
    problem = f"is one of {several}, and none has a usual name" if several else "could not be found"
    return ValueError(
        f"`{argument}` {problem}.{reason} The columns there are: {', '.join(columns)}. Name one "
        f"with `{argument}`."
    )
