"""From a filter over payloads to a condition that Qdrant checks itself, as far as it can."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pico_hf.search.payload import Filter
from pico_hf.search.qdrant_points import Condition

# Other names mean a path to Qdrant, and these are made from `paths`.
_PLAIN, _MADE = re.compile(r"[A-Za-z_]\w*"), ("path", "paths")


def condition_of(chosen: Filter | None, truth_values: bool) -> tuple[Condition, bool]:
    """(condition, whether it says all that a filter does).

    Args:
        chosen: See `PicoIndex.search`.
        truth_values: See `Points`.

    Returns:
        What the condition does not say has to be checked with every payload that passes it:
        functions, None, and values that are neither texts nor numbers.
    """
    condition, whole = Condition(), True
    if chosen is None:
        return condition, whole
    if callable(chosen):
        return condition, False
    for field, wanted in chosen.items():
        values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        plain = isinstance(field, str) and _PLAIN.fullmatch(field) and field not in _MADE
        if plain and values and _are_plain(values, truth_values):
            condition = condition.having(f"payload.{field}", values)
        else:
            whole = False
    return condition, whole


def _are_plain(values: Iterable[Any], truth_values: bool) -> bool:
    return all(
        isinstance(value, str | int | float) and (truth_values or value not in (0, 1))
        for value in values
    )
