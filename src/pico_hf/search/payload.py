"""What is kept beside an image, and filters over it."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Payload = dict[str, Any]
Filter = Mapping[str, Any] | Callable[[Payload], bool]


def payload_of(record: Mapping[str, Any]) -> Payload:
    """What a user sees of a stored record: its payload, and where its file is; a copy."""
    path = {"path": record["paths"][0]} if record["paths"] else {}
    more = {"paths": list(record["paths"])} if len(record["paths"]) > 1 else {}
    return {**path, **more, **copy.deepcopy(record["payload"])}


def checked_payload(payload: Mapping[str, Any] | None, place: str) -> Payload:
    """A copy of a payload in the form it is stored in.

    Raises:
        ValueError: If JSON cannot hold it.
    """
    try:
        stored = json.loads(json.dumps(dict(payload or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The payload of {place} cannot be stored ({error}). Use texts, numbers, truth values, "
            "None, and lists or dicts of them."
        ) from error
    return stored


def check_filter(chosen: Filter | None, payloads: Iterable[Payload]) -> None:
    """Raises ValueError for a filter that can match nothing because of a misspelt field."""
    if chosen is None or callable(chosen):
        return
    if not isinstance(chosen, Mapping):
        raise ValueError(
            "`filter` must be a dict of fields and values or a function of the payload, got "
            f"{type(chosen).__name__}."
        )
    known = set().union(*payloads)
    for field in chosen:
        if known and field not in known:
            near = difflib.get_close_matches(str(field), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"`filter` names the field {field!r}, which no image has. The fields there are: "
                f"{', '.join(sorted(known))}.{hint}"
            )


def matches(payload: Payload, chosen: Filter) -> bool:
    """Whether a payload passes a filter.

    Args:
        payload: Of one image.
        chosen: A function of the payload; or a dict, all of whose fields must pass: a value is
            what the field equals, a list is what it is one of, a function takes the field's value
            (None where the image lacks it). Of a field that is a list, one entry has to pass.

    Example:
        >>> payload = {"year": 2020, "tags": ["sea", "sky"]}
        >>> matches(payload, {"year": [2019, 2020], "tags": "sea"})
        True
        >>> matches(payload, {"year": lambda year: year > 2020})
        False
    """
    if callable(chosen):
        return bool(chosen(payload))
    return all(_passes(payload, field, wanted) for field, wanted in chosen.items())


def _passes(payload: Payload, field: str, wanted: Any) -> bool:
    value = payload.get(field)
    if callable(wanted):
        return bool(wanted(value))
    if value == wanted and (field in payload or wanted is None):
        return True
    allowed = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
    found = value if isinstance(value, list) else [value]
    return field in payload and any(one in allowed for one in found)
