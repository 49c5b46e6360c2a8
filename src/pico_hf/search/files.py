"""Files of an index: written beside and renamed, so that a reader sees a whole file or none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pico_hf.search.checks import check_manifest

PARTIAL = ".partial"
MANIFEST = "index.json"
LOCK_SECONDS = 10.0
# Version 2 has a summary of every image beside its tokens; version 1 is read as one without any.
FORMAT, VERSION, READABLE = "pico-index", 2, (1, 2)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file that is there as a whole or not at all, also if power fails.

    Raises:
        OSError: If it cannot be written, for example on a full disk; says that nothing is lost.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        _flush_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{error.strerror or error}: {len(content) / 1e6:.1f} MB could not be written to the "
            "index. What it held before is still there; make room and run the same call again",
            str(path),
        ) from error


def _flush_folder(folder: Path) -> None:
    """A rename lasts once its folder has reached the disk; Windows cannot open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_digest(path: Path) -> str:
    """BLAKE2 digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def bytes_digest(content: bytes) -> str:
    """The digest that `file_digest` gives of a file with this content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return bytes_digest(json.dumps(manifest, sort_keys=True).encode())


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes a change of the index valid: what the manifest does not name is not there."""
    content = {"format": FORMAT, "version": VERSION, "digest": _digest(manifest), **manifest}
    write_file(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads what an index consists of.

    Raises:
        ValueError: If the folder has no index, a damaged one, or one of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"`folder` must hold an index, got {str(folder)!r}, which has no {MANIFEST}. Make one "
            "with `PicoIndex.create`."
        )
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        if content.pop("format") != FORMAT:
            raise ValueError("it is of another kind")
        version, digest = content.pop("version"), content.pop("digest")
        if not isinstance(version, int):
            raise ValueError("its version is no number")
        if version in READABLE:
            if digest != _digest(content):
                raise ValueError("it was changed or cut")
            check_manifest(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is no readable index file ({_line(error)}). Restore it from a copy, or "
            "make the index anew."
        ) from error
    if version not in READABLE:
        raise ValueError(
            f"{str(path)!r} is of version {version}, this package reads up to {VERSION}. Update "
            "pico_hf."
        )
    return content


def new_folder(folder: Path) -> None:
    """Makes the folder of an index; ValueError if it holds an index or other files."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in folder.iterdir())
    if MANIFEST in there:
        raise ValueError(
            f"`folder` {str(folder)!r} holds an index already. Open it with `PicoIndex.open`, "
            "or name another folder."
        )
    if there:
        raise ValueError(
            f"`folder` must be new or empty, got {str(folder)!r} with {', '.join(there[:3])}. "
            "Name another folder for the index; images are added with `add`."
        )


def _line(error: Exception) -> str:
    """What is wrong, in one short line; a KeyError is its key alone."""
    lacks = "it lacks " if isinstance(error, KeyError) else ""
    return f"{lacks}{' '.join(str(error).split())[:200]}"


@contextmanager
def changing(lock: FileLock, folder: Path) -> Iterator[None]:
    """Holds the lock of an index; TimeoutError if another process does not let go of it."""
    try:
        held = lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise TimeoutError(
            f"Another process has been changing the index {str(folder)!r} for more than "
            f"{LOCK_SECONDS:.0f} s. Wait for it to end."
        ) from error
    with held:
        yield
