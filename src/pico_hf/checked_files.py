"""Folder or Hub repository in, checked files out; every refusal is one line that says what to do.

Only safetensors are read: a pickle file can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

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


@contextmanager
def plain_errors(repository: str | os.PathLike) -> Iterator[None]:
    """Turns what the Hub's client says about an access that failed into one line.

    Args:
        repository: What was to be read or written, for the message.
    """
    try:
        yield
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):
            raise OSError(_refusal(error, os.fspath(repository))) from error
        raise ConnectionError(
            f"The connection to {constants.ENDPOINT} broke off at '{os.fspath(repository)}' "
            f"({' '.join(str(error).split())}). Nothing here was changed; do it again."
        ) from error
    except OSError as error:
        refused = _http_error(error)
        message = _refusal(refused, os.fspath(repository)) if refused else str(error)
        line = " ".join(message.split())
        if refused is None and line == str(error):
            raise
        raise OSError(line) from error


def _http_error(error: BaseException | None) -> HfHubHTTPError | None:
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__ or error.__context__
    return error


def _refusal(error: HfHubHTTPError, repository: str) -> str:
    status = error.response.status_code
    log_in = "log in with `hf auth login` or pass `token=…`"
    if isinstance(error, GatedRepoError):
        return f"'{repository}' is gated (HTTP {status}): ask for access on its page, {log_in}."
    if isinstance(error, RevisionNotFoundError):
        return f"'{repository}' has no such `revision` (HTTP {status}): name a branch, tag, commit."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"'{repository}' is neither a folder here nor a repository you may see on "
            f"{constants.ENDPOINT} (HTTP {status}). Check the name; if it is private, {log_in}."
        )
    if status == 401:
        return f"The Hub does not accept the token used for '{repository}' (HTTP 401): {log_in}."
    if status == 403:
        reason = error.server_message or "no permission"
        return (
            f"The token used may not do this with '{repository}' (HTTP 403: {reason}). Use one "
            f"with that permission: {log_in}; or ask the owner."
        )
    return f"The Hub refused '{repository}': {error}"


def find_file(
    path: str | os.PathLike, name: str, options: dict[str, Any], *, required: bool = False
) -> Path | None:
    """A file of a folder or of a Hub repository, downloaded if need be; None if there is none.

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
    """Where the Hub's own bot has put safetensors of a repository that has pickle files only.

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
    """Reads a model's weights once before anything is built from them.

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
    """A JSON object from a file.

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
    """Reads a safetensors file tensor by tensor and refuses one that cannot be right.

    Args:
        path: The file.

    Returns:
        Name → shape.

    Raises:
        ValueError: If it is cut short, differs from the hash the Hub announced, or holds NaN.
    """
    _check_announced_hash(path)
    return {name: tuple(tensor.shape) for name, tensor in read_tensors(path)}


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file, one at a time; see `check_safetensors`."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
                    raise ValueError(f"`{name}` in {path.name} contains NaN; nothing was loaded.")
                yield name, tensor
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is not a whole safetensors file ({error}). Download or save it again."
        ) from error


def _check_announced_hash(path: Path) -> None:
    """The Hub's cache keeps a large file under its SHA-256, which the client never checks."""
    blob = path.resolve()
    if blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name):
        return
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != blob.name:
        raise ValueError(
            f"{path.name} is not what the Hub announced (SHA-256 {digest[:12]}… instead of "
            f"{blob.name[:12]}…). Download it again with `force_download=True`."
        )
