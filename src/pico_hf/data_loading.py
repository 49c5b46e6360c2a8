"""Files, folders and Hub data sets → checked rows of one image and its captions."""

from __future__ import annotations

import difflib
import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

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
)
COLUMNS = ["image", "captions", "image_id", "gallery"]
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_image_text(
    dataset_name: str | None = None,
    files: str | Path | Iterable[str | Path] | None = None,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    image_id_column: str | None = None,
    gallery_column: str | None = None,
    max_samples: int | None = None,
    skip_bad_images: bool = False,
) -> datasets.Dataset:
    """Loads image-text pairs and checks every row before anything is trained or written.

    Args:
        dataset_name: A data set folder or Hub repository.
        files: Instead of it: parquet, jsonl or csv files, or one imagefolder.
        split: Which split of `dataset_name`.
        image_column: None finds it by its type or name.
        caption_column: One caption or a list of captions per row; None finds it by its name.
        image_id_column: Rows with the same value show the same thing and are no negatives of each
            other in the loss.
        gallery_column: Rows with the same value are ranked among themselves, and metrics are
            averaged over galleries (COCO's five folds; one gallery per drawing style).
        max_samples: Keep the first rows only.
        skip_bad_images: True leaves unreadable images out and logs how many.

    Returns:
        Rows with the columns `image` (decoded lazily), `captions` (list of str), `image_id` and
        `gallery` (str).

    Raises:
        ValueError: If neither or both sources are given, a column is missing, an image cannot be
            read, or a caption is empty; the message names column or row.
    """
    if (dataset_name is None) == (files is None):
        raise ValueError("Give either `dataset_name` or `files`, and not both.")
    if dataset_name is not None:
        rows = datasets.load_dataset(dataset_name, split=split)
    else:
        rows = _load_files([files] if isinstance(files, str | Path) else list(files or []))
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    return checked_rows(
        rows,
        image_column=image_column,
        caption_column=caption_column,
        image_id_column=image_id_column,
        gallery_column=gallery_column,
        skip_bad_images=skip_bad_images,
    )


def _load_files(files: list[str | Path]) -> datasets.Dataset:
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.exists():
            raise ValueError(f"`files` names {path}, which does not exist.")
    if len(paths) == 1 and paths[0].is_dir():
        return datasets.load_dataset("imagefolder", data_dir=str(paths[0]), split="train")
    kinds = {path.suffix for path in paths}
    if len(kinds) != 1 or not kinds <= BUILDERS.keys():
        raise ValueError(
            f"`files` must be one folder of images or files of one kind ({', '.join(BUILDERS)}), "
            f"got {', '.join(sorted(kinds)) or 'nothing'}."
        )
    rows = datasets.load_dataset(
        BUILDERS[kinds.pop()], data_files=[str(path) for path in paths], split="train"
    )
    return _resolve_paths(rows, paths[0].parent)


def _resolve_paths(rows: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """Makes image paths in a jsonl or csv file relative to the file, not to the working folder."""
    paths = [
        name
        for name in rows.column_names
        if name in IMAGE_NAMES and getattr(rows.features[name], "dtype", None) == "string"
    ]

    def resolve(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        return {name: [str(folder / value) for value in batch[name]] for name in paths}

    if paths:
        rows = rows.map(resolve, batched=True, keep_in_memory=True, desc="Resolving image paths")
    return rows


def checked_rows(
    rows: datasets.Dataset,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_id_column: str | None = None,
    gallery_column: str | None = None,
    skip_bad_images: bool = False,
) -> datasets.Dataset:
    """The rows with exactly the columns of `COLUMNS`, every row readable.

    Args:
        rows: Any data set with an image and a caption column.
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
    image_column = image_column or _find_image_column(rows)
    caption_column = caption_column or _find_column(rows, "caption_column", CAPTION_NAMES)
    named = {
        "image_column": image_column,
        "caption_column": caption_column,
        "image_id_column": image_id_column,
        "gallery_column": gallery_column,
    }
    for argument, name in named.items():
        if name is not None:
            _require_column(rows, argument, name)
    captions = [_captions(row, value) for row, value in enumerate(rows[caption_column])]
    ids = rows[image_id_column] if image_id_column else range(len(rows))
    galleries = rows[gallery_column] if gallery_column else [""] * len(rows)
    images = rows.select_columns(image_column)
    if image_column != "image":
        images = images.rename_column(image_column, "image")
    images = images.cast_column("image", datasets.Image(decode=True))
    good = _readable(images, skip_bad_images)
    text = datasets.Value("string")
    checked = images.add_column("captions", captions, feature=datasets.List(text))
    checked = checked.add_column("image_id", [str(value) for value in ids], feature=text)
    checked = checked.add_column("gallery", [str(value) for value in galleries], feature=text)
    return checked if len(good) == len(checked) else checked.select(good)


def _find_image_column(rows: datasets.Dataset) -> str:
    typed = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    return typed[0] if typed else _find_column(rows, "image_column", IMAGE_NAMES)


def _find_column(rows: datasets.Dataset, argument: str, names: tuple[str, ...]) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise ValueError(
        f"`{argument}` could not be found. The columns there are: {', '.join(rows.column_names)}. "
        f"Name one with `{argument}`."
    )


def _require_column(rows: datasets.Dataset, argument: str, name: str) -> None:
    if name not in rows.column_names:
        near = difflib.get_close_matches(name, rows.column_names, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(
            f"`{argument}` must be a column of the data, got {name!r}. The columns there are: "
            f"{', '.join(rows.column_names)}.{hint}"
        )


def _captions(row: int, value: Any) -> list[str]:
    captions = [value] if isinstance(value, str) else list(value or [])
    if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
        raise ValueError(
            f"Row {row} has an empty caption. Every image needs at least one caption, and every "
            "caption at least one word."
        )
    return captions


def _readable(images: datasets.Dataset, skip_bad_images: bool) -> list[int]:
    """Rows whose image decodes to the last byte."""
    raw = images.cast_column("image", datasets.Image(decode=False))
    good: list[int] = []
    bad: list[int] = []
    for row, value in enumerate(raw["image"]):
        problem = image_problem(value)
        if problem and not skip_bad_images:
            raise ValueError(
                f"Row {row} has an image that cannot be read ({problem}). Repair it, or leave such "
                "rows out with `skip_bad_images`."
            )
        (bad if problem else good).append(row)
    if bad:
        logger.warning("Left out %d unreadable images, rows %s.", len(bad), bad[:10])
    return good


def image_problem(value: dict[str, Any] | None) -> str | None:
    """What is wrong with an encoded image (`{"bytes", "path"}`), None if it decodes."""
    if value is None:
        return "no image"
    source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value.get("path")
    try:
        with Image.open(source) as image:
            image.load()
    except (OSError, UnidentifiedImageError, SyntaxError, AttributeError) as error:
        return str(error) or type(error).__name__
    return None
