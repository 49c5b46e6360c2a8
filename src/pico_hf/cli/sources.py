"""What commands read: pairs and images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pico_hf.cli.answers import Failed


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
