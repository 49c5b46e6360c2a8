"""How much a new iteration of prototypes counts: the performance-feedback weighting function."""

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
    """

    iteration: int
    gain: float
    log_total_gain: float
    temperature: float


# From the state to (η_n, the share of the new prototypes in [0, 1], and log G_n).
FusionRule = Callable[[FusionState], tuple[float, float]]


def normalised_gain(state: FusionState) -> tuple[float, float]:
    """η_n = g(Δ_n) / G_n with g(Δ) = exp(Δ/τ) and G_n = G_{n-1} + g(Δ_n), kept in log space.

    Inside the final prototypes μ^(N) the weight of iteration n telescopes to g(Δ_n)/G_N, so a
    larger improvement always has the larger weight, whatever the order (the theorem of the
    performance-feedback weighting function). Our reconstruction, not in arXiv 2510.11175.

    Args:
        state: Iteration, gain, log G_{n-1} and temperature.

    Returns:
        (η_n in (0, 1], log G_n).

    Example:
        >>> normalised_gain(FusionState(2, gain=0.0, log_total_gain=0.0, temperature=5.0))[0]
        0.5
    """
    log_gain = state.gain / state.temperature
    log_total = float(np.logaddexp(state.log_total_gain, log_gain))
    return math.exp(log_gain - log_total), log_total
