"""What commands read: pairs, and the model that an index was made with."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any

from pico_hf.cli.answers import Failed

MODEL_FILE = "model.json"  # beside the manifest of an index


def load_pairs(source: str, split: str = "train", **columns: Any) -> Any:
    """Image-text pairs of a file, an imagefolder, or a data set of the Hub.

    Args:
        source: What is there as a file or folder; else the name of a data set.
        split: Of a named data set.
        columns: Of `load_image_text`.

    Raises:
        ValueError: If it cannot be read.
    """
    from pico_hf.data.loading import load_image_text

    if os.path.exists(source) or Path(source).suffix in (".csv", ".tsv", ".parquet", ".jsonl"):
        return load_image_text(files=source, **columns)
    return load_image_text(source, split=split, **columns)


def image_rows(source: str, split: str = "train") -> Any:
    """A folder or image as its path; rows of a table or of a data set.

    Args:
        source: What is there as a file or folder; else the name of a data set.
        split: Of a named data set.

    Raises:
        Failed: If it is neither.
    """
    from pico_hf.data.paths import BUILDERS, load_files, load_named_split

    if os.path.isdir(source):
        tables = any(any(Path(source).glob(f"**/*{kind}")) for kind in (".parquet", ".arrow"))
        return load_named_split(source, split) if tables else Path(source)
    table = Path(source).suffix in BUILDERS
    if os.path.isfile(source):
        return load_files([source]) if table else Path(source)
    if table or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise Failed(f"{source!r} is neither a file or folder that is there nor a data set's name.")
    return load_named_split(source, split)


def remember_model(index: Path, model: str) -> None:
    """Notes beside an index which model it was made with, for the commands that open it."""
    from pico_hf.hub.files import write_json

    name = str(Path(model).resolve()) if os.path.isdir(model) else model
    write_json(index / MODEL_FILE, {"model": name})


def model_of(index: str, given: str | None) -> str:
    """The model to open an index with: the one that is given, else the one it was made with.

    Raises:
        Failed: If neither is known.
    """
    if given is not None:
        return given
    path = Path(index) / MODEL_FILE
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise Failed(
            f"{str(path)!r} cannot be read ({error}). Name the model by --model."
        ) from error
    if not Path(index, "index.json").is_file():
        raise Failed(f"{index!r} holds no index. Make one: pico-hf index FOLDER {index} --model …")
    raise Failed(f"{index!r} does not say which model it was made with. Name it by --model.")


class Storage(StrEnum):
    """How tokens are stored."""

    float16 = "float16"
    float32 = "float32"
    int8 = "int8"
