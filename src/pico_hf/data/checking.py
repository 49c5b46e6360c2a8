"""Rows of any data set → checked rows of one image and its captions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from pico_hf.data.columns import (
    empty_caption,
    find_caption_column,
    find_image_column,
    require_column,
    texts_of,
)
from pico_hf.data.identity import identity_name, rows_of_images
from pico_hf.data.reading import (
    MadeImages,
    Read,
    is_made_on_the_fly,
    made_columns,
    read_encoded,
    read_made,
)

logger = logging.getLogger(__name__)

COLUMNS = ["image", "captions", "image_id", "gallery", "digest"]


def checked_rows(
    rows: datasets.Dataset,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_id_column: str | None = None,
    gallery_column: str | None = None,
    skip_bad_images: bool = False,
) -> datasets.Dataset:
    """One row per image with exactly the columns of `COLUMNS`, every image readable.

    Args:
        rows: Any data set with an image and a caption column. One with a transform is read through
            it, once for its captions and each time for its images.
        image_column: See [`load_image_text`].
        caption_column: See [`load_image_text`].
        image_id_column: See [`load_image_text`].
        gallery_column: See [`load_image_text`].
        skip_bad_images: See [`load_image_text`].

    Returns:
        Checked rows.

    Raises:
        ValueError: See [`load_image_text`].
    """
    check_kind(rows)
    if set(COLUMNS[:4]) <= set(rows.column_names) <= set(COLUMNS):  # checked before
        image_id_column, gallery_column = image_id_column or "image_id", gallery_column or "gallery"
    names = (image_column, caption_column, image_id_column, gallery_column)
    found = _made(rows, *names) if is_made_on_the_fly(rows) else _stored(rows, *names)
    good = readable_rows(found.reads, skip_bad_images)
    return _one_row_per_image(found, good)


@dataclass(frozen=True)
class _Found:
    """What was found in every row, before rows of one image are joined.

    Attributes:
        images: Column `image` of every row.
        reads: Content of each image, or what is wrong with it.
        captions: As the data gives them.
        names: Identities, None where they are missing.
        galleries: Empty where they are missing.
        transform: Makes images on the fly from the numbers that `images` holds.
    """

    images: datasets.Dataset
    reads: Sequence[Read]
    captions: Sequence[Any]
    names: Sequence[str | None]
    galleries: Sequence[str]
    transform: MadeImages | None = None


def _stored(
    rows: datasets.Dataset,
    image: str | None,
    caption: str | None,
    identity: str | None,
    gallery: str | None,
) -> _Found:
    """What is found in rows as they are stored, whatever format they are handed out in."""
    rows = rows.with_format(None)
    image = image or find_image_column(rows)
    caption = caption or find_caption_column(rows)
    _require_all(rows.column_names, image, caption, identity, gallery)
    images, reads = stored_images(rows, image)
    return _Found(
        images,
        reads,
        rows[caption],
        _names(rows[identity] if identity else [None] * len(rows)),
        _galleries(rows[gallery] if gallery else [None] * len(rows)),
    )


def stored_images(rows: datasets.Dataset, image: str) -> tuple[datasets.Dataset, list[Read]]:
    """The images of a column as a column `image` of their own, and what is in each.

    Args:
        rows: As they are stored, without a format.
        image: Column of images, paths or bytes.
    """
    images = rows.select_columns(image)
    if image != "image":
        images = images.rename_column(image, "image")
    try:
        if getattr(images.features["image"], "dtype", None) == "string_view":
            images = images.cast_column("image", datasets.Value("string"))
        encoded = images.cast_column("image", datasets.Image(decode=False))
        images = images.cast_column("image", datasets.Image(decode=True))
    except Exception as error:  # of datasets, pyarrow, numpy, Pillow
        line = " ".join(str(error).split())[:300]
        raise ValueError(
            f"Column `{image}` must hold images, paths or bytes, and cannot be read as such "
            f"({type(error).__name__}: {line}). Name another with `image_column`."
        ) from error
    return images, read_encoded(encoded["image"])


def _made(
    rows: datasets.Dataset,
    image: str | None,
    caption: str | None,
    identity: str | None,
    gallery: str | None,
) -> _Found:
    """What is found in rows as their transform makes them."""
    image, caption = made_columns(rows, image, caption)
    _require_all(rows[0].keys(), image, caption, identity, gallery)
    made = list(read_made(rows, image, caption, identity, gallery))
    return _Found(
        datasets.Dataset.from_dict({"image": list(range(len(rows)))}),
        [row.image for row in made],
        [row.captions for row in made],
        _names([row.identity for row in made]),
        _galleries([row.gallery for row in made]),
        MadeImages(rows, image),
    )


def _one_row_per_image(found: _Found, good: list[int]) -> datasets.Dataset:
    """The readable rows, those of one image joined."""
    captions = {row: _captions(row, found.captions[row]) for row in good}
    groups = rows_of_images(
        [found.reads[row].key for row in good],
        [found.names[row] for row in good],
        [found.galleries[row] for row in good],
    )
    facts: dict[str, list[Any]] = {name: [""] * len(found.reads) for name in COLUMNS[2:]}
    facts["captions"] = [[] for _ in found.reads]
    kept = []
    for group in groups:
        rows = [good[number] for number in group]
        first = rows[0]
        kept.append(first)
        names = [name for row in rows if (name := found.names[row]) is not None]
        facts["captions"][first] = [caption for row in rows for caption in captions[row]]
        facts["image_id"][first] = names[0] if names else f"image {found.reads[first].key}"
        facts["gallery"][first] = found.galleries[first]
        facts["digest"][first] = found.reads[first].digest
    # Columns are added before rows are chosen: afterwards every image would be copied.
    checked, text = found.images, datasets.Value("string")
    for name in COLUMNS[1:]:
        feature = datasets.List(text) if name == "captions" else text
        checked = checked.add_column(name, facts[name], feature=feature)
    checked = checked if len(kept) == len(checked) else checked.select(kept)
    return checked if found.transform is None else checked.with_transform(found.transform)


def _names(values: Iterable[Any]) -> list[str | None]:
    return [identity_name(value) for value in values]


def _galleries(values: Iterable[Any]) -> list[str]:
    return [identity_name(value) or "" for value in values]


def _require_all(
    columns: Iterable[str], image: str, caption: str, identity: str | None, gallery: str | None
) -> None:
    columns = list(columns)
    require_column(columns, "image_column", image)
    require_column(columns, "caption_column", caption)
    for argument, name in (("image_id_column", identity), ("gallery_column", gallery)):
        if name is not None:
            require_column(columns, argument, name)


def check_kind(rows: Any) -> None:
    """Raises ValueError for what is no `datasets.Dataset` with at least one row."""
    if isinstance(rows, datasets.DatasetDict):
        raise ValueError(
            f"The data must be one split, got a DatasetDict of {', '.join(rows)}. Choose one, as "
            f"in `data[{next(iter(rows), 'train')!r}]`, or load it with `split=…`."
        )
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(
            f"The data must be a `datasets.Dataset`, got {type(rows).__name__}. Ranking needs all "
            "rows of a split: load it without `streaming`, or build it with "
            "`datasets.Dataset.from_list`."
        )
    if len(rows) == 0:
        raise ValueError(
            "The data must have at least one row, got an empty split. Load another split, or look "
            "at what was filtered out."
        )


def _captions(row: int, value: Any) -> list[str]:
    captions = texts_of(row, value)
    if not all(text.strip() for text in captions):
        raise empty_caption(row)
    return captions


def readable_rows(reads: Sequence[Read], skip_bad_images: bool) -> list[int]:
    """Rows whose image decodes to the last byte."""
    bad = [row for row, read in enumerate(reads) if read.problem]
    if not bad:
        return list(range(len(reads)))
    first = f"Row {bad[0]} has an image that cannot be read ({reads[bad[0]].problem})"
    if not skip_bad_images:
        raise ValueError(f"{first}. Repair it, or leave such rows out with `skip_bad_images=True`.")
    if len(bad) == len(reads):
        raise ValueError(
            f"{first}, and so has every other row: with `skip_bad_images` nothing is left. Name "
            "the column of the images with `image_column`, or correct their paths."
        )
    logger.warning("Left out %d unreadable images, rows %s.", len(bad), bad[:10])
    return [row for row, read in enumerate(reads) if not read.problem]
