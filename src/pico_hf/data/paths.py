"""Files of rows → one data set, with image paths relative to the file that names them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc

from pico_hf.data.columns import find_image_column, require_column
from pico_hf.data.images import is_url

BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
OPTIONS: dict[str, dict[str, Any]] = {".tsv": {"sep": "\t"}}
_OTHER_TEXTS = ("large_string", "string_view")


def load_named_split(
    name: str, split: str, image_column: str | None = None
) -> datasets.Dataset | datasets.DatasetDict:
    """A split of a data set folder or Hub repository, its image paths resolved.

    Args:
        name: A folder or a Hub repository.
        split: A split or a part of one, such as `"train[:100]"`.
        image_column: See `load_image_text`.
    """
    tables = _tables(name, split.split("[")[0])
    if not tables:
        return _at_address(datasets.load_dataset(name, split=split), name, image_column)
    rows = load_files(tables, image_column)
    part = datasets.ReadInstruction.from_spec(split).to_absolute({split.split("[")[0]: len(rows)})
    chosen = (range(len(rows))[piece.from_ : piece.to] for piece in part)
    return rows.select(list(itertools.chain.from_iterable(chosen)))


def _tables(name: str, split: str) -> list[str]:
    """Files of rows in a local folder that name their images; none for other data sets."""
    if not Path(name).is_dir():
        return []
    # A folder with more images than tables is an imagefolder to datasets, which then reads no
    # table; only what is called metadata is its own.
    for source in ({"path": name}, {"path": "csv", "data_dir": name}):
        files = datasets.load_dataset_builder(**source).config.data_files or {}
        paths = [Path(str(file)) for file in files.get(split, ())]
        tables = [path for path in paths if path.suffix in BUILDERS]
        if tables:
            own = any(path.stem == "metadata" for path in tables)
            return [] if own else [str(path) for path in tables]
    return []


def _at_address(rows: datasets.Dataset, name: str, image_column: str | None) -> datasets.Dataset:
    """Marks paths inside of a repository as such: they name no file of this machine."""
    folder = str(Path(name).absolute()) if Path(name).is_dir() else f"hf://datasets/{name}"
    try:
        column = image_column or find_image_column(rows)
    except ValueError:
        return rows  # answered with all columns when they are checked
    return resolve_paths(rows, column, folder) if column in rows.column_names else rows


def load_files(files: Sequence[str], image_column: str | None = None) -> datasets.Dataset:
    """Rows of all files, in order.

    Args:
        files: Of the kinds in `BUILDERS`, existing ones or addresses.
        image_column: See `load_image_text`.

    Raises:
        ValueError: If the columns of the files differ in type.
    """
    parts = [
        _load_group(suffix, folder, list(group), image_column)
        for (suffix, folder), group in itertools.groupby(files, _kind_and_folder)
    ]
    if len(parts) == 1:
        return parts[0]
    try:
        return datasets.concatenate_datasets([_plain_texts(part) for part in parts])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`files` must have columns of the same types, and they differ ({error}). Load each "
            "kind of file alone, and join what comes with `datasets.concatenate_datasets`."
        ) from error


def _kind_and_folder(file: str) -> tuple[str, str]:
    # Links are not followed: a cache of links to files elsewhere keeps images beside the links.
    folder = file.rpartition("/")[0] if is_url(file) else str(Path(file).absolute().parent)
    return Path(file).suffix, folder


def _load_group(
    suffix: str, folder: str, files: list[str], image_column: str | None
) -> datasets.Dataset:
    rows = _read_tables(suffix, files)
    if image_column is not None:
        require_column(rows.column_names, "image_column", image_column)
    return resolve_paths(rows, image_column or find_image_column(rows), folder)


def _read_tables(suffix: str, files: list[str]) -> datasets.Dataset:
    """Rows of files of one kind; ValueError in one line whatever their reader raises."""
    try:
        return datasets.load_dataset(
            BUILDERS[suffix], data_files=files, split="train", **OPTIONS.get(suffix, {})
        )
    except (FileNotFoundError, PermissionError, ConnectionError):
        raise
    except Exception as error:  # of datasets, pyarrow, pandas, json
        cause = error.__cause__ or error.__context__ or error
        line = " ".join(str(cause).split())[:400]
        several = f" or one of {len(files) - 1} more" if len(files) > 1 else ""
        raise ValueError(
            f"`files` must hold rows, and '{files[0]}'{several} cannot be read as "
            f"{BUILDERS[suffix]} ({type(cause).__name__}: {line}). Write it again, or repair the "
            "line that is named."
        ) from error


def resolve_paths(rows: datasets.Dataset, column: str, folder: str) -> datasets.Dataset:
    """Makes the paths in an image column relative to a folder; images as bytes stay as they are.

    Args:
        rows: As loaded from a file.
        column: Texts of any Arrow type, bytes, or both as `{"bytes", "path"}`.
        folder: Where the file lies, or its address.
    """
    if getattr(rows.features[column], "dtype", None) in _OTHER_TEXTS:
        rows = rows.cast_column(column, datasets.Value("string"))
    if not _holds_images(rows.features[column]):
        return rows
    rows = rows.cast_column(column, datasets.Image(decode=False))
    content, paths = (pc.struct_field(rows.data.column(column), part) for part in (0, 1))
    if not pc.any(pc.and_(pc.is_null(content), pc.is_valid(paths))).as_py():
        return rows

    def resolve(batch: dict[str, list[dict[str, Any] | None]]) -> dict[str, list[Any]]:
        return {column: [_resolved(value, folder) for value in batch[column]]}

    return rows.map(resolve, batched=True, keep_in_memory=True, desc="Resolving image paths")


def _plain_texts(rows: datasets.Dataset) -> datasets.Dataset:
    """One type for all texts: writers of files differ in it."""
    for name, feature in rows.features.items():
        if getattr(feature, "dtype", None) in _OTHER_TEXTS:
            rows = rows.cast_column(name, datasets.Value("string"))
    return rows


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    kinds = ("string", "binary", "large_binary", "null")
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in kinds


def _resolved(value: dict[str, Any] | None, folder: str) -> dict[str, Any] | None:
    if value is None or value["bytes"] is not None or not value["path"] or is_url(value["path"]):
        return value
    path = f"{folder}/{value['path']}" if is_url(folder) else str(Path(folder) / value["path"])
    return {"bytes": None, "path": path}
