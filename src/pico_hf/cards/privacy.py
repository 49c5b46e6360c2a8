"""What a model card may say: names instead of the paths of a machine, and nothing secret."""

from __future__ import annotations

import re
import shlex

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# An absolute path, a home folder, a parent folder, a drive, a network share, a file address.
_PATH = re.compile(r"(?:file://|~|/|\\\\|[A-Za-z]:[\\/]|\.\.(?:[\\/]|$))")
_SECRET_OPTION = re.compile(r"--?\w*(?:token|password|secret|api_key)", flags=re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_\w{8,}")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "…"


def public_name(value: str) -> str:
    """A value without the folders that it lies in on somebody's machine, and without secrets.

    Args:
        value: Anything that enters a card: a name, a path, an address, an argument's value.

    Example:
        >>> public_name("/home/me/models/clip"), public_name("openai/clip-vit-base-patch32")
        ('clip', 'openai/clip-vit-base-patch32')
    """
    value = _LOGIN.sub(f"{HIDDEN}@", _TOKEN.sub(HIDDEN, value))
    if not _PATH.match(value):
        return value
    return re.split(r"[\\/]+", value.rstrip("\\/"))[-1].removeprefix("~") or HIDDEN


def public_command(command: str) -> str:
    """A command line whose paths are names and whose secrets are hidden.

    Args:
        command: As a shell would take it.

    Example:
        >>> public_command("python run.py --data '/home/me/My Data/t.csv' --hub_token hf_12345678")
        'python run.py --data t.csv --hub_token …'
    """
    words, hide = [], False
    for word in shlex.split(command):
        option, given, value = word.partition("=")
        if hide and not word.startswith("-"):
            words.append(HIDDEN)
        elif given and option.startswith("-"):
            secret = _SECRET_OPTION.fullmatch(option)
            words.append(f"{option}={HIDDEN if secret else public_name(value)}")
        else:
            words.append(public_name(word))
        hide = not given and bool(_SECRET_OPTION.fullmatch(word))
    return " ".join(word if word == HIDDEN else shlex.quote(word) for word in words)


def is_hub_id(name: str) -> bool:
    """True if the Hub would take the name as the id of a model or data set.

    Example:
        >>> is_hub_id("org/pairs"), is_hub_id("My Data (v1)")
        (True, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def data_set_id(name: str) -> str | None:
    """An id of the Hub that stands for a data set's name, None if nothing is left of it.

    Args:
        name: As [`public_name`] gives it.

    Example:
        >>> data_set_id("org/pairs"), data_set_id("My Data (v1)")
        ('org/pairs', 'my-data-v1')
    """
    if is_hub_id(name):
        return name
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:96].strip("-")
    return plain or None
