"""A run's checkpoints: whole or not there, one run to a folder, the newest whole one found.

A checkpoint is written beside its place, in `_saving`, and renamed when all of it is on the disk.
Names with a leading underscore are never uploaded.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from pico_hf.hub.errors import shortened
from pico_hf.hub.files import read_json

logger = logging.getLogger(__name__)

MANIFEST = "pico_checkpoint.json"
SAVING = "_saving"
_REMOVING = "_removing-"
_LOCK = "_run.lock"
_WAIT = 6.0  # seconds: workers of a killed run hold its lock until they notice
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lets one run at a time write to a folder; the lock of a process that died does not hold.

    Args:
        folder: `output_dir`, created if need be.

    Raises:
        ValueError: If another run is writing there.
        OSError: If the folder cannot be written to.
    """
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_WAIT)
    except Timeout as error:
        raise ValueError(
            f"Another run is writing to `output_dir` '{folder}'. Wait for its end, or choose "
            "another `output_dir`."
        ) from error
    except OSError as error:
        raise OSError(
            f"`output_dir` '{folder}' cannot be written to ({error.strerror}). Choose a folder "
            "that can."
        ) from error
    try:
        yield
    finally:
        lock.release()


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name, None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


# ---- writing -----------------------------------------------------------------------------------


@contextmanager
def saving(run: Path, name: str) -> Iterator[Path]:
    """Gives the folder that a checkpoint is written in; nothing of it stays after an error.

    Args:
        run: The run's folder.
        name: `checkpoint-{step}`.

    Raises:
        OSError: If it could not be written; the message names the newest whole checkpoint.
    """
    staged = run / SAVING
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        yield staged / name
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)  # first: the disk may be full
        reason = " ".join(str(error).split("\n")[0].split())
        raise OSError(
            f"{name} could not be saved in '{run}' ({reason}). {_newest_text(run)}"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def put_in_place(staged: Path, run: Path, facts: Mapping[str, Any]) -> Path:
    """Writes the manifest of a checkpoint whose files are all there, and gives it its name.

    Args:
        staged: From `saving`.
        run: The run's folder.
        facts: What else the manifest says.

    Returns:
        The checkpoint's folder.
    """
    sizes = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        sizes[path.relative_to(staged).as_posix()] = path.stat().st_size
        _to_disk(path)
    text = json.dumps({**facts, "files": sizes}, indent=2) + "\n"
    (staged / MANIFEST).write_text(text, encoding="utf-8")
    _to_disk(staged / MANIFEST)
    _to_disk(staged)
    done = run / staged.name
    if done.exists():  # a run that was resumed from an earlier step comes by again
        remove(done)
    staged.rename(done)
    _to_disk(run)
    return done


def _to_disk(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(number)
    except OSError as error:  # some network file systems cannot
        logger.debug("No fsync of %s: %s", path, error)
    finally:
        os.close(number)


def remove(folder: Path) -> None:
    """Removes a checkpoint: first its name, so that no part of it ever passes for the whole."""
    doomed = folder.with_name(f"{_REMOVING}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(run: Path, limit: int | None, *kept: str | os.PathLike | None) -> None:
    """Removes the oldest checkpoints until no more than `limit` are left.

    Args:
        run: The run's folder.
        limit: `save_total_limit`; None or 0 removes none.
        kept: Checkpoints that stay, however many they are.
    """
    if not limit or limit < 0:
        return
    found = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True)]
    found = [path for path in found if step_of(path) is not None]
    safe = {Path(path).resolve() for path in kept if path is not None}
    loose = [path for path in found if path.resolve() not in safe]
    surplus = len(found) - max(limit, len(found) - len(loose))
    for path in loose[: max(surplus, 0)]:
        try:
            remove(path)
        except OSError as error:
            logger.warning("%s could not be removed (%s).", path.name, error.strerror)


# ---- finding -----------------------------------------------------------------------------------


def damage(folder: Path, *, sizes: bool = True) -> str | None:
    """What a checkpoint lacks, None if it is whole.

    Args:
        folder: Of the checkpoint.
        sizes: False asks only whether every file is there, for who reads them anyway.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return f"has no {MANIFEST}"
    try:
        files = read_json(path).get("files")
    except ValueError as error:
        return f"cannot be read: {error}"
    if not isinstance(files, dict) or "trainer_state.json" not in files:
        return f"has no list of files in {MANIFEST}"
    for name, size in files.items():
        there = folder / name
        if not there.is_file():
            return f"lacks {name}"
        if sizes and there.stat().st_size != size:
            return f"has {there.stat().st_size} of {size} bytes of {name}"
    return None


def checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run's folder by their steps, the newest first."""
    found = [path for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: step for path in found if (step := step_of(path)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def newest_whole(run: Path) -> Path:
    """The newest checkpoint that is whole; one line of warning says what was passed over.

    Args:
        run: The run's folder.

    Raises:
        ValueError: If there is none.
    """
    passed: list[str] = []
    for folder in checkpoints(run):
        reason = damage(folder)
        if reason is None:
            if passed:
                logger.warning("Resuming from %s; passed over %s.", folder.name, "; ".join(passed))
            return folder
        passed.append(f"{folder.name}, which {shortened(reason)}")
    found = f" It has {'; '.join(passed)}." if passed else ""
    raise ValueError(
        f"`output_dir` '{run}' has no whole checkpoint to resume from.{found} Leave "
        "`resume_from_checkpoint` out to train from the beginning."
    )


def _newest_text(run: Path) -> str:
    whole = next((path.name for path in checkpoints(run) if damage(path) is None), None)
    if whole is None:
        return "There is no earlier checkpoint."
    return f"{whole} is whole: go on from it with `resume_from_checkpoint=True`."


def tidy(run: Path) -> None:
    """Finishes or removes what a killed run was writing or removing; only under its lock.

    A whole checkpoint that had only to be renamed gets its name.
    """
    for staged in sorted((run / SAVING).glob("*")):
        done = run / staged.name
        if step_of(staged) is not None and not done.exists() and damage(staged) is None:
            staged.rename(done)
    for rest in [run / SAVING, *run.glob(f"{_REMOVING}*")]:
        shutil.rmtree(rest, ignore_errors=True)
