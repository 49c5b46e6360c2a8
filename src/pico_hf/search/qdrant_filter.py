"""From a filter over payloads to a condition that Qdrant checks itself, as far as it can."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pico_hf.search.payload import Filter
from pico_hf.search.qdrant_points import Condition

# Other names mean a path to Qdrant, and these are made from `paths`.
_PLAIN, _MADE = re.compile(r"[A-Za-z_]\w*"), ("path", "paths")


def condition_of(chosen: Filter | None) -> tuple[Condition, bool]:
    """(condition, whether it says all that a filter does).

    What it does not say is checked with every payload that passes the condition: functions, None,
    and values that are neither texts nor numbers.
    """
    condition, whole = Condition(), True
    if chosen is None:
        return condition, whole
    if callable(chosen):
        return condition, False
    for field, wanted in chosen.items():
        values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        plain = isinstance(field, str) and _PLAIN.fullmatch(field) and field not in _MADE
        if plain and values and _are_plain(values):
            condition = condition.having(f"payload.{field}", values)
        else:
            whole = False
    return condition, whole


def _are_plain(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str | int | float) for value in values)
