"""Removes private parts from what a model card shows: local paths, tokens and passwords."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

HIDDEN = "[hidden]"
_PUBLIC_SCHEMES = ("http", "https", "hf")
_FILE_SUFFIX = re.compile(
    r"\.(arrow|bin|ckpt|csv|gz|jpe?g|jsonl?|md|parquet|png|pth?|py|safetensors|sh|tar|toml|tsv|txt"
    r"|ya?ml|zip)$",
    re.IGNORECASE,
)
_LOCAL_NAME = re.compile(r"(^|[_-])(dir|file|folder)s?$", re.IGNORECASE)  # of an option
# Words of an option's name, between "_" and "-". "tokens" and "tokenizer" are no secrets.
_SECRET = (
    r"(?:token|password|passwd|pwd|secret|credentials?|auth|(?:api|access|private|secret)[_-]?key)"
)
_SECRET_NAME = re.compile(rf"(^|[_-]){_SECRET}($|[_-])", re.IGNORECASE)
_SECRET_PAIR = re.compile(
    rf"(?<![a-z0-9])({_SECRET}[\"']?\s*[:=]\s*[\"']?)[^\s\"',}}\]]+", re.IGNORECASE
)
# Tokens of well-known services, and what follows "Bearer".
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{12,}|(?<=[Bb]earer )\S+"
)
_URL = re.compile(r"\b([a-zA-Z][\w+.-]+)://([^\s'\"<>]+)")
# An absolute, home, parent or Windows path inside a text; its name is the last group.
_PATH = re.compile(
    r"(?<![\w/.:~])(?:~[\w.-]*|\.{1,2}|[A-Za-z]:)?[/\\]+(?=[^\s/\\])"
    r"(?:[^\s/\\'\"]+[/\\]+)*([^\s/\\'\",;)\]}]*)"
)
_HOMES = ("home", "users")
_EXAMPLE = re.compile(r"examples/\w+\.py")


def is_hub_id(name: str | None) -> bool:
    """Tells whether a name is an id that the Hub accepts and not a local file or folder.

    Args:
        name: `name` or `owner/name`.

    Example:
        >>> is_hub_id("openai/clip-vit-base-patch32"), is_hub_id("/models/clip"), is_hub_id("a b")
        (True, False, False)
    """
    if not name or os.path.exists(name) or ("/" in name and _FILE_SUFFIX.search(name)):
        return False
    return _is_valid_id(name)


def dataset_id(name: str | None) -> str | None:
    """Returns the id of a data set for the card's metadata, None if there is none.

    An `owner/name` of the Hub stays as it is; any other name is written in lower case, with
    hyphens in place of what the Hub does not accept.

    Args:
        name: A name without a path, as `public_name` returns it.

    Example:
        >>> dataset_id("org/Pairs"), dataset_id("My Data (v1)"), dataset_id("…")
        ('org/Pairs', 'my-data-v1', None)
    """
    if name and "/" in name and is_hub_id(name):
        return name
    plain = re.sub(r"[^a-z0-9._-]+", "-", (name or "").lower())
    plain = re.sub(r"([-.])[-.]*", r"\1", plain).strip("-._").removesuffix(".git")[:96].strip("-._")
    return plain if plain and _is_valid_id(plain) else None


def last_part(path: str | PurePath) -> str:
    r"""Returns the last part of a path of any system; "" for a home folder, a root, `.` and `..`.

    Example:
        >>> last_part("data/pairs/"), last_part("C:\\Users\\jane"), last_part("..")
        ('pairs', '', '')
    """
    parts = [part for part in PureWindowsPath(path).parts if part not in (".", "..")]
    if len(parts) > 1 and parts[-2].lower() in _HOMES:
        return ""
    last = parts[-1] if parts else ""
    return "" if last.startswith("~") or re.search(r"[\\/:]$", last) else last


def public_name(name: Any) -> str | None:
    """Returns a name without local folders and secrets, None if nothing is left.

    Args:
        name: A name, an `owner/name`, a description, or a local path, of which the last part is
            kept unless it is the name of a user's home folder.

    Example:
        >>> public_name("/home/jane/My models/clip"), public_name("org/clip"), public_name("~")
        ('clip', 'org/clip', None)
    """
    text = " ".join(str(name or "").split())
    if _is_local(text):
        return public_text(last_part(text)) or None
    return public_text(text) or None


def public_text(text: str) -> str:
    """Returns a text with file names in place of local paths, without tokens and passwords.

    Example:
        >>> public_text("photos of /home/jane/cats.zip, see https://jane:pw@host/a?token=b")
        'photos of cats.zip, see https://host/a'
    """
    text = _SECRET_VALUE.sub(HIDDEN, _SECRET_PAIR.sub(rf"\1{HIDDEN}", text))
    parts, end = [], 0
    for url in _URL.finditer(text):  # what is left between addresses may hold paths
        parts += [_PATH.sub(r"\1", text[end : url.start()]), _public_url(*url.groups())]
        end = url.end()
    return "".join([*parts, _PATH.sub(r"\1", text[end:])])


def is_secret_name(name: str) -> bool:
    """Tells whether an argument of this name holds a secret.

    Example:
        >>> is_secret_name("hub_token"), is_secret_name("num_tokens")
        (True, False)
    """
    return _SECRET_NAME.search(name) is not None


def public_value(name: str, value: Any) -> Any:
    """Returns an argument's value as a card may show it; see `public_name` and `public_text`.

    Args:
        name: Name of the argument; the value of one that holds a secret is hidden.
        value: Numbers stay as they are; the rule holds inside lists and mappings as well.

    Example:
        >>> public_value("hub_token", "abc"), public_value("files", ["/data/a.json"])
        ('[hidden]', ['a.json'])
    """
    if is_secret_name(name) and value is not None:
        return HIDDEN
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): public_value(str(key), entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [public_value(name, entry) for entry in value]
    if _LOCAL_NAME.search(name) and "://" not in str(value):
        return public_text(last_part(str(value)))
    return public_name(value) or ""


def public_command(command: str) -> str:
    """Returns a command line with file names in place of local paths, without secrets.

    A script in the folder `examples` keeps that folder, since it is one of this repository. A
    command that is no valid shell command is left out: where its words end is unknown.

    Args:
        command: A command line in the syntax of a POSIX shell; it may hold Windows paths.

    Example:
        >>> public_command("python examples/run.py --train_file '/home/jane/a b/t.json' --lr=1e-3")
        'python examples/run.py --train_file t.json --lr=1e-3'
        >>> public_command("HF_TOKEN=abc python run.py --hub_token abc")
        "'HF_TOKEN=[hidden]' python run.py --hub_token '[hidden]'"
    """
    single_line = command.replace("\\\n", " ")
    try:  # a backslash before a letter separates folders of Windows, it escapes nothing
        words = shlex.split(re.sub(r"\\(?=\w)", r"\\\\", single_line))
    except ValueError:
        return ""
    shown: list[str] = []
    option = ""  # the last one before a word
    for word in words:
        if _EXAMPLE.fullmatch(word):
            shown.append(word)
        elif word.startswith("-"):
            shown.append(_public_option(word))
            option = "" if "=" in word else word
        else:
            shown.append(shlex.quote(_public_word(option, word)))
            option = "" if _SECRET_NAME.search(option) else option  # it takes one value
    return " ".join(shown)


def _public_option(word: str) -> str:
    """An option alone, with its value after "=", or with its value glued to its letter."""
    name, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", name):
        value = re.sub(r"^[\w.-]+", "", word)
        name, equals = word.removesuffix(value), ""
    if not value:
        return name + equals
    return f"{name}{equals}{shlex.quote(str(public_value(name, value)))}"


def _public_word(option: str, word: str) -> str:
    """A value of an option, a word without an option, or `NAME=value`."""
    name, equals, value = word.partition("=")
    if equals and re.fullmatch(r"[A-Za-z_+][\w.]*", name):
        return f"{name}={public_value(name, value)}"
    return str(public_value(option, word)) or HIDDEN


def _public_url(scheme: str, rest: str) -> str:
    """An address without user, password and query; of a local or private one the last part."""
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    if scheme.lower() not in _PUBLIC_SCHEMES:
        return last_part(rest)
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _is_local(text: str) -> bool:
    """True for a path of the machine: it looks like one, or a file or folder has this name."""
    address = re.match(r"([A-Za-z][\w+.-]+):/", text)
    if address:
        return address[1].lower() not in _PUBLIC_SCHEMES
    if "://" in text:
        return False
    if _is_outside(text) or "\\" in text or text.startswith("."):
        return True
    if "/" not in text or is_hub_id(text):
        return False
    # "text / image" is a description; "clients/acme data/t" is a path.
    return bool(re.search(r"\S/\S", text)) or os.path.exists(text)


def _is_outside(text: str) -> bool:
    """True for a path that starts at a root, a drive or a home folder."""
    return text.startswith(("/", "~", "\\")) or bool(re.match(r"[A-Za-z]:[\\/]", text))


def _is_valid_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
