"""What the log of a run says of a construction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pico_hf.core.construction import Refinement
from pico_hf.core.score_form import column_weights
from pico_hf.core.state import SOURCES


def log_entry(found: Refinement) -> dict[str, float]:
    """One line of the log: what a proposal brought, and how the weights are spread with it.

    Args:
        found: From `construct`.

    Returns:
        `pico_{source}_{value}` for every value, so that each source has curves of its own.
    """
    weights = column_weights(found.form.semantic_probability)
    values = {
        "iteration": found.iteration,
        "feedback": found.gain,
        "fused_weight": found.fused_weight,
        "weight_std": float(weights.std(correction=0)),
        "weight_min": float(weights.min()),
        "weight_max": float(weights.max()),
        "pooled_share": found.form.pooled_share,
    }
    return {f"pico_{found.source}_{name}": value for name, value in values.items()}


def logged_refinements(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Reads back what `log_entry` wrote.

    Args:
        history: The log of a run.

    Returns:
        In order: `source`, the values by their names in `log_entry`, and `step`.

    Example:
        >>> logged_refinements([{"pico_style_feedback": 1.5, "step": 8}])
        [{'source': 'style', 'feedback': 1.5, 'step': 8}]
    """
    found = []
    for line in history:
        for source in SOURCES:
            start = f"pico_{source}_"
            values = {key.removeprefix(start): value for key, value in line.items() if start in key}
            if values:
                found.append({"source": source, **values, "step": line.get("step")})
    return found
