"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(target: str | os.PathLike) -> None:
    """Refuses a target that holds something.

    Args:
        target: Folder that is to be written.

    Raises:
        ValueError: If it is a file or a folder with files.
    """
    folder = Path(target).resolve()
    if folder.is_file():
        raise ValueError(f"`target` must be a folder, got the file '{target}'. Choose a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"`target` must be a new or an empty folder, got '{target}', which holds files that "
            "would be replaced or mixed with the new ones. Choose another folder."
        )


@contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Lets a folder be written beside its place, and moves it there if the block ends well.

    Args:
        target: A new or an empty folder.

    Yields:
        The folder to write to.

    Raises:
        ValueError: If the target is a file or a folder with files.
    """
    check_new(target)
    place = Path(target).resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder is private; the one inside has the rights that any new folder gets.
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as private:
        folder = Path(private, place.name or "folder")
        folder.mkdir()
        yield folder
        check_new(target)  # someone else may have been faster
        if not place.exists():
            folder.rename(place)
            return
        for part in folder.iterdir():  # an empty folder may be where somebody works or a mount
            part.rename(place / part.name)
