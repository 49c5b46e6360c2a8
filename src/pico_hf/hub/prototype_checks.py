"""Checks the files of prototypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pico_hf.configuration_pico import PROTOTYPE_FIELDS, PicoConfig
from pico_hf.core.state import Sizes, declared_buffers
from pico_hf.hub.errors import shortened
from pico_hf.hub.prototype_values import WEIGHTS_FILE, check_values

FACTS_FILE = "prototypes.json"


def checked_fields(facts: dict[str, Any]) -> dict[str, Any]:
    """Fields of [`PicoConfig`] from prototypes.json; ValueError if they cannot be right."""
    missing = [
        key for key in (*PROTOTYPE_FIELDS, "num_columns", "encoder_fingerprint") if key not in facts
    ]
    if missing:
        raise ValueError(f"{FACTS_FILE} lacks {', '.join(missing)}. Save the prototypes again.")
    if not isinstance(facts["encoder_fingerprint"], dict):
        raise ValueError(f"`encoder_fingerprint` in {FACTS_FILE} must map types to digests.")
    values = {name: facts[name] for name in PROTOTYPE_FIELDS}
    try:
        PicoConfig(**values)  # it knows which values are valid
    except Exception as error:  # strict fields raise a class of their own
        raise ValueError(f"{FACTS_FILE} is not valid: {shortened(error)}") from error
    return values


def check_buffers(facts: dict[str, Any], buffers: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the tensors are those that prototypes.json describes.

    Args:
        facts: What prototypes.json says, its fields checked.
        buffers: Name → what was read.
    """
    sizes = Sizes(*(facts[name] for name in ("num_columns", "num_prototypes", "probe_size")))
    declared = declared_buffers(facts["estimators"], sizes)
    expected = {name: buffer.shape for name, buffer in declared.items()} | {"evaluated": ()}
    if buffers.keys() != expected.keys():
        raise ValueError(
            f"{WEIGHTS_FILE} must hold {', '.join(expected)}; got {', '.join(sorted(buffers))}."
        )
    for name, shape in expected.items():
        if buffers[name].shape != shape:
            raise ValueError(
                f"`{name}` in {WEIGHTS_FILE} must have the shape {shape} of {FACTS_FILE}, got "
                f"{tuple(buffers[name].shape)}."
            )
    check_values(buffers, WEIGHTS_FILE)
