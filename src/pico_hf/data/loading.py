"""Loads image-text pairs from files, folders and Hub data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from pico_hf.data.checking import checked_rows
from pico_hf.data.paths import BUILDERS, load_files, load_named_split


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

    Paths of images are relative to the file that names them. Rows of one image, by its
    path, else by its content, become one row with all their captions in order of appearance.

    Args:
        dataset_name: A data set folder or Hub repository.
        files: Instead of it: parquet, jsonl, csv or tsv files, or one imagefolder.
        split: Which split of `dataset_name`.
        image_column: None finds it by its type or name.
        caption_column: One caption or a list of captions per row; None finds it by its name.
        image_id_column: Images with the same value show the same thing: they are no negatives of
            each other in the loss and no competitors in a ranking. Where it is missing (None, NaN
            or empty), and where no column is named, every image is its own.
        gallery_column: Images with the same value are ranked among themselves, and metrics are
            averaged over galleries (COCO's five folds; one gallery per drawing style).
        max_samples: Keep the first rows only.
        skip_bad_images: True leaves unreadable images out and logs how many.

    Returns:
        One row per image with the columns `image` (decoded lazily), `captions` (list of str),
        `image_id`, `gallery` and `digest` (of the image's content; all three str).

    Raises:
        ValueError: If neither or both sources are given, a column is missing, an image cannot be
            read, a caption is empty, or there are no rows; the message names column or row.
    """
    if (dataset_name is None) == (files is None):
        raise ValueError("Give either `dataset_name` or `files`, and not both.")
    with _utf8_only():
        if dataset_name is not None:
            rows = load_named_split(dataset_name, split, image_column)
        else:
            rows = _load([files] if isinstance(files, str | Path) else list(files), image_column)
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


@contextmanager
def _utf8_only() -> Iterator[None]:
    """Says in one line that a table holds text in another encoding, wherever it is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The rows hold text that is not UTF-8 ({error}). Save them again as UTF-8."
        ) from error


def _load(files: list[str | Path], image_column: str | None) -> datasets.Dataset:
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"`files` must name files that exist, got {path}, which does not exist. Correct "
                "the path."
            )
    if len(paths) == 1 and paths[0].is_dir():
        return datasets.load_dataset("imagefolder", data_dir=str(paths[0]), split="train")
    kinds = {path.suffix for path in paths}
    if not kinds or not kinds <= BUILDERS.keys():
        raise ValueError(
            f"`files` must be one folder of images or files of these kinds: {', '.join(BUILDERS)}. "
            f"Got {', '.join(sorted(kinds)) or 'nothing'}."
        )
    return load_files([str(path) for path in paths], image_column)
