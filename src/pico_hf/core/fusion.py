"""How much a new iteration of prototypes counts: one function per rule, in one table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FusionState:
    """What a fusion rule may look at.

    Attributes:
        iteration: n, counted from 1 for the first prototypes.
        gain: Δ_n, the performance improvement of the new prototypes, in rSum points.
        log_total_gain: log G_{n-1}; -inf before the first iteration.
        temperature: τ, in rSum points, > 0.
        momentum: Share of the old prototypes an EMA keeps, in [0, 1).
    """

    iteration: int
    gain: float
    log_total_gain: float
    temperature: float
    momentum: float


def normalised_gain(state: FusionState) -> tuple[float, float]:
    """η_n = g(Δ_n) / G_n with g(Δ) = exp(Δ/τ) and G_n = G_{n-1} + g(Δ_n), kept in log space.

    Inside the final prototypes μ^(N) the weight of iteration n telescopes to g(Δ_n)/G_N, so a
    larger improvement always has the larger weight, whatever the order (the theorem of the
    performance-feedback weighting function). Our reconstruction, not in arXiv 2510.11175.

    Args:
        state: Iteration, gain and log G_{n-1}.

    Returns:
        (η_n in (0, 1], log G_n).

    Example:
        >>> normalised_gain(FusionState(2, 0.0, 0.0, 5.0, 0.9))[0]
        0.5
    """
    log_gain = state.gain / state.temperature
    log_total = float(np.logaddexp(state.log_total_gain, log_gain))
    return math.exp(log_gain - log_total), log_total


def gated_ema(state: FusionState) -> tuple[float, float]:
    """η_n = α_max · σ(Δ_n/τ): a gate that looks right and breaks the theorem (a comparison row)."""
    gate = 1.0 / (1.0 + math.exp(-max(min(state.gain / state.temperature, 60.0), -60.0)))
    return _unless_first(state, (1.0 - state.momentum) * gate), state.log_total_gain


def ema(state: FusionState) -> tuple[float, float]:
    """η_n = 1 - momentum, blind to the gain (a comparison row)."""
    return _unless_first(state, 1.0 - state.momentum), state.log_total_gain


def uniform(state: FusionState) -> tuple[float, float]:
    """η_n = 1/n: the plain mean of all iterations (a comparison row)."""
    return 1.0 / state.iteration, state.log_total_gain


def last(state: FusionState) -> tuple[float, float]:
    """η_n = 1: only the newest prototypes count (a comparison row)."""
    return 1.0, state.log_total_gain


def _unless_first(state: FusionState, share: float) -> float:
    return 1.0 if state.iteration == 1 else share


FUSION_RULES: dict[str, Callable[[FusionState], tuple[float, float]]] = {
    "normalised_gain": normalised_gain,
    "gated_ema": gated_ema,
    "ema": ema,
    "uniform": uniform,
    "last": last,
}
