"""Copies the images of a store to a new one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pico_hf.search.protocol import Store


def copy_whole(store: Store, target: Path, create: Callable[[Path], Store]) -> None:
    """Writes all images of a store to a new folder, which appears when it is complete.

    Args:
        store: What is copied, without what was deleted.
        target: New or empty.
        create: Makes the new store in a folder.

    Raises:
        ValueError: If it holds files.
        OSError: If the disk is full; then there is no folder.
    """
    partial = target.with_name(target.name + ".partial")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {str(target)!r}.")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        copied = create(partial)
        for images in store.groups():
            copied.change(images, ())
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
