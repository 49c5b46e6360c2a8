"""Files, folders and Hub data sets → checked rows of one image and its captions."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from pico_hf.data.columns import (
    IMAGE_NAMES,
    empty_caption,
    find_caption_column,
    find_image_column,
    require_column,
    texts_of,
)
from pico_hf.data.images import image_problem, is_url

logger = logging.getLogger(__name__)

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
        return {
            name: [value if is_url(value) else str(folder / value) for value in batch[name]]
            for name in paths
        }

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
    _check_kind(rows)
    image_column = image_column or find_image_column(rows)
    caption_column = caption_column or find_caption_column(rows)
    named = {
        "image_column": image_column,
        "caption_column": caption_column,
        "image_id_column": image_id_column,
        "gallery_column": gallery_column,
    }
    for argument, name in named.items():
        if name is not None:
            require_column(rows.column_names, argument, name)
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


def _check_kind(rows: Any) -> None:
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


def _captions(row: int, value: Any) -> list[str]:
    captions = texts_of(row, value)
    if not all(text.strip() for text in captions):
        raise empty_caption(row)
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
