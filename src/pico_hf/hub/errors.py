"""Turns errors of the Hub's client, and of what reads files, into one line that says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


@contextmanager
def plain_errors(repository: str | os.PathLike) -> Iterator[None]:
    """Turns errors of the Hub's client within the block into one line.

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
        if refused is None and not _is_ours(error) and not os.path.exists(repository):
            message = (
                f"'{os.fspath(repository)}' is no folder that is there. As a repository: {message}"
            )
        line = " ".join(message.split())
        if refused is None and line == str(error):
            raise
        raise OSError(line) from error


@contextmanager
def plain_build(path: str | os.PathLike, files: str = "files") -> Iterator[None]:
    """Turns whatever is raised when a model is built from files into one line.

    A value of the wrong type in a configuration is noticed wherever it is used first, as any kind
    of error of transformers or peft. Those of memory and missing packages stay what they are.

    Args:
        path: What is read, for the message.
        files: What of it is read.

    Raises:
        ValueError: For an error that says nothing of its file, or in several lines.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = shortened(error)
        if isinstance(error, ValueError) and line == str(error) and _is_ours(error):
            raise
        raise ValueError(
            f"'{os.fspath(path)}' cannot be built from its {files} ({type(error).__name__}: "
            f"{line}). Check its configuration, or the keywords that were passed."
        ) from error


def shortened(text: object, longest: int = 600) -> str:
    """A text in one line, cut where it repeats a file's content at length."""
    line = " ".join(str(text).split())
    return line if len(line) <= longest else f"{line[:longest]}…"


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised an error, so that it says what came and what to do."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == __name__.partition(".")[0]


def refuse_missing(path: str | os.PathLike) -> None:
    """Refuses what can only be a folder that is not there, before the Hub is asked for it.

    Args:
        path: A folder or repository that is to be read.

    Raises:
        OSError: If there is no such folder, or if it is a file.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        return
    if os.path.isfile(name):
        raise OSError(f"'{name}' is a file, not a folder. Pass the folder that holds it.")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise OSError(
            f"The folder '{name[:200]}' does not exist, and no Hub repository can have that name. "
            "Check the path."
        ) from None


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
