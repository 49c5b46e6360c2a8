"""Lists and deletes cached features."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import constants

from pico_hf.hub.files import read_json

ABOUT_FILE = "about.json"
PARTIAL = ".partial"  # ends the name of a folder that is being written


def default_cache_dir() -> Path:
    """Where features are cached unless an argument says otherwise: all runs share it.

    `PICO_HF_CACHE` names another folder.
    """
    return Path(os.environ.get("PICO_HF_CACHE") or Path(constants.HF_HOME) / "pico_hf")


@dataclass(frozen=True)
class CacheEntry:
    """Features of one split under one encoder.

    Attributes:
        key: Name of its folder.
        encoder: `model_type` of the encoder; "damaged" if the entry does not say it.
        images: How many images there are.
        captions: How many captions there are.
        size: Bytes on disk.
    """

    key: str
    encoder: str
    images: int
    captions: int
    size: int


def cache_entries(folder: Path) -> list[CacheEntry]:
    """The complete entries of a cache folder, the largest first.

    Args:
        folder: Parent of the entries; it need not exist.
    """
    entries = []
    for file in folder.glob(f"*/{ABOUT_FILE}"):
        if file.parent.suffix != PARTIAL:
            about = _about(file)
            size = sum(part.stat().st_size for part in file.parent.rglob("*") if part.is_file())
            entries.append(CacheEntry(file.parent.name, **about, size=size))
    return sorted(entries, key=lambda entry: -entry.size)


def _about(file: Path) -> dict[str, Any]:
    """What is in an entry; a damaged one says so, to be listed and deleted all the same."""
    try:
        about = read_json(file)
    except (ValueError, OSError):
        about = {}
    kinds = {"encoder": str, "images": int, "captions": int}
    if about.keys() == kinds.keys() and all(type(about[k]) is kind for k, kind in kinds.items()):
        return {**about, "encoder": about["encoder"][:80]}
    return {"encoder": "damaged", "images": 0, "captions": 0}


def clear_cache(folder: Path, key: str | None = None) -> list[CacheEntry]:
    """Deletes one entry, or all of them and what killed runs have left.

    Args:
        folder: Parent of the entries.
        key: Of the entry; None deletes all.

    Returns:
        What was deleted.

    Raises:
        ValueError: If there is no such entry.
    """
    entries = [entry for entry in cache_entries(folder) if key in (None, entry.key)]
    if key is not None and not entries:
        raise ValueError(f"`key` must name an entry of {folder}, got {key!r}. List them first.")
    for entry in entries:
        shutil.rmtree(folder / entry.key)
        (folder / f"{entry.key}.lock").unlink(missing_ok=True)
    if key is None:
        clear_leftovers(folder)
    return entries


def clear_leftovers(folder: Path) -> None:
    """Deletes half caches of runs that were killed; those of running ones are locked.

    Args:
        folder: Parent of the entries; it need not exist.
    """
    for partial in folder.glob(f"*{PARTIAL}"):
        lock = FileLock(folder / f"{partial.stem}.lock")
        with suppress(Timeout), lock.acquire(timeout=0):
            shutil.rmtree(partial, ignore_errors=True)
