"""Finds and checks files of a folder or Hub repository; an error is one line that says what to do.

Only safetensors are read: a pickle file can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pico_hf.hub.errors import plain_errors

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
_SHA256 = re.compile(r"[0-9a-f]{64}")


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


def check_model_files(
    path: str | os.PathLike, options: dict[str, Any], named: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Reads a model's weights once and checks them, before anything is built from them.

    Args:
        path: Folder or repository.
        options: The caller's keywords (Hub options, `variant`).
        named: The weights' file if the configuration names one itself.

    Returns:
        Name → shape.

    Raises:
        OSError: If there are no safetensors.
        ValueError: If a file is cut short, differs from what the Hub announced, holds NaN, or if
            a file outside of the folder is named.
    """
    variant = f".{options['variant']}" if options.get("variant") else ""
    for name in (
        (named,)
        if named
        else (
            f"model{variant}.safetensors",
            f"model.safetensors.index{variant}.json",
        )
    ):
        _check_name(name, "config.json", (".safetensors", ".safetensors.index.json", ".json"))
        found = find_file(path, name, options)
        if found is not None:
            break
    else:
        refuse_pickle(path, named or f"model{variant}.safetensors")
    if found.suffix == ".safetensors":
        return check_safetensors(found)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _shards(found):
        shard = find_file(path, name, options)
        if shard is None:
            raise OSError(f"'{os.fspath(path)}' lacks {name}, which {found.name} names.")
        shapes |= check_safetensors(shard)
    return shapes


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.name} must have a `weight_map` from weights to files.")
    for name in weight_map.values():
        _check_name(name, index.name, (".safetensors",))
    return sorted(set(weight_map.values()))


def _check_name(name: Any, origin: str, suffixes: tuple[str, ...]) -> None:
    """Refuses a file name that leads out of the model's folder, on any system."""
    if isinstance(name, str) and name.endswith(suffixes):
        windows, posix = PureWindowsPath(name), PurePosixPath(name)
        inside = not windows.anchor and not posix.anchor
        if inside and ".." not in {*windows.parts, *posix.parts}:
            return
    raise ValueError(
        f"{origin} names the weights' file {name!r}, which is not a safetensors file inside the "
        "model's own folder. Do not trust this repository."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ValueError: If the file holds anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(values).__name__}.")
    return values


def check_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file that passes all checks of `checked_tensors`.

    Args:
        path: The file.
    """
    return {name: tuple(tensor.shape) for name, tensor in checked_tensors(path)}


def checked_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Reads a safetensors file once, tensor by tensor, and refuses one that cannot be right.

    The Hub's cache keeps a large file under its SHA-256, which the client never checks: it is
    computed from the same reading, so a file that differs is refused after the last tensor.

    Args:
        path: The file.

    Yields:
        Name and tensor.

    Raises:
        ValueError: If the file is cut short, holds NaN, or differs from what the Hub announced.
    """
    blob = path.resolve()
    announced = blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None
    digest = hashlib.sha256(_header(path) if announced else b"")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():  # in the order of the file, which has no gaps
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
                    raise ValueError(f"`{name}` in {path.name} contains NaN; nothing was loaded.")
                if announced:
                    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                yield name, tensor
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is not a whole safetensors file ({error}). Download or save it again."
        ) from error
    if announced and digest.hexdigest() != announced:
        raise ValueError(
            f"{path.name} is not what the Hub announced (SHA-256 {digest.hexdigest()[:12]}… "
            f"instead of {announced[:12]}…). Download it again with `force_download=True`."
        )


def _header(path: Path) -> bytes:
    """The bytes of a safetensors file before the first tensor: a length and that much JSON."""
    with path.open("rb") as file:
        length = file.read(8)
        size = min(int.from_bytes(length, "little"), path.stat().st_size)
        return length + file.read(size)
