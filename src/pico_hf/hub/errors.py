"""Turns the errors of the Hub's client into one line that says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


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
