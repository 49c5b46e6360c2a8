"""Finds and checks files of a folder or Hub repository; an error is one line that says what to do.

Only safetensors are read: a pickle file can run code when it is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from pico_hf.hub.errors import plain_errors, refuse_missing, shortened

HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)
_CONVERTER = "SFconvertbot"
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_file(
    path: str | os.PathLike, name: str, options: dict[str, Any], *, required: bool = False
) -> Path | None:
    """Finds a file of a folder or Hub repository, downloaded if necessary; None if there is none.

    Args:
        path: Folder or repository.
        name: File name inside it.
        options: The caller's keywords; those of HUB_OPTIONS are used.
        required: False takes a file that is not in the cache for missing when the Hub is out of
            reach.

    Raises:
        OSError: If there is no such repository or no access to it.
    """
    if os.path.isdir(path):
        local = Path(path) / (options.get("subfolder") or "") / name
        return local if local.is_file() else None
    refuse_missing(path)
    given = {key: options[key] for key in HUB_OPTIONS if options.get(key) not in (None, "")}
    with plain_errors(path):
        try:
            return Path(hf_hub_download(os.fspath(path), name, **given))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError:
            if required:
                raise
            return None


class NoSafetensorsError(OSError):
    """A folder or repository without weights that may be read."""


def refuse_pickle(path: str | os.PathLike, wanted: str) -> NoReturn:
    """Raises NoSafetensorsError for a folder or repository that lacks a safetensors file.

    Args:
        path: Folder or repository.
        wanted: The file it lacks.
    """
    there = os.listdir(path) if os.path.isdir(path) else []
    pickles = sorted(name for name in there if name.endswith(_PICKLE))
    found = f" There is {', '.join(pickles)}." if pickles else ""
    raise NoSafetensorsError(
        f"'{os.fspath(path)}' has no {wanted}.{found} Pickle files (.bin, .pt, .ckpt) are never "
        "read, because they can run code. Save the weights as safetensors with `save_pretrained`."
    )


def converted_revision(path: str | os.PathLike, options: dict[str, Any]) -> str | None:
    """Finds the Hub bot's conversion to safetensors of a repository that has pickle files only.

    Args:
        path: Folder or repository.
        options: The caller's keywords.

    Returns:
        The reference of the bot's open pull request on top of the newest commit, None without one.
    """
    if os.path.isdir(path) or options.get("revision") not in (None, "main"):
        return None
    api, repository = HfApi(token=options.get("token")), os.fspath(path)
    try:
        newest = api.list_repo_commits(repository)[0].commit_id
        for request in api.get_repo_discussions(repository, author=_CONVERTER):
            if request.author == _CONVERTER and request.git_reference and request.status == "open":
                commits = api.list_repo_commits(repository, revision=request.git_reference)
                if len(commits) > 1 and commits[1].commit_id == newest:
                    return request.git_reference
    except (HTTPError, OSError):  # offline, or a mirror without pull requests
        return None
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ValueError: If the file holds anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # no UTF-8, no JSON, huge numbers
        raise ValueError(
            f"{path.name} is not valid JSON ({shortened(error)}). Download it again."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(values).__name__}.")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object beside its place and moves it there.

    Args:
        path: The file, replaced if it exists.
        values: The object.
    """
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    beside.replace(path)
