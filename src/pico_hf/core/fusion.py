"""How much a new iteration of prototypes counts: the performance-feedback weighting function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


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


def fuse_forms(
    forms: Sequence[Float[Tensor, "columns columns"]],
    gains: Sequence[float],
    fusion: FusionRule = normalised_gain,
    *,
    temperature: float = 5.0,
    start: Float[Tensor, "columns columns"] | None = None,
) -> tuple[Float[Tensor, "columns columns"], list[float], float]:
    """Fuses forms into what is there, one after the other, by what each brought.

    What is there, such as the identity, w = 1 on the encoder columns, is the first iteration and
    brought 0: with the normalised gain its weight in the end is 1 / (1 + Σ exp(Δ_n/τ)), and that of
    form n is exp(Δ_n/τ) times as much.

    Args:
        forms: B_n, at least one.
        gains: Δ_n, in rSum points, one per form. A form whose gain is no finite number is left out.
        fusion: From Δ_n to the share of form n.
        temperature: τ, in rSum points, > 0.
        start: What is there; None: the identity.

    Returns:
        (the fused form, η_n of every form, 0 if it was left out, log G after the last one).

    Example:
        >>> fuse_forms([3 * torch.eye(1)], [0.0])[0].tolist()  # as much of it as of the identity
        [[2.0]]
    """
    fused = torch.eye(len(forms[0]), dtype=forms[0].dtype) if start is None else start
    shares, log_total = [0.0] * len(gains), 0.0  # log g(0)
    told = [place for place, gain in enumerate(gains) if math.isfinite(gain)]
    for number, place in enumerate(told, start=2):
        state = FusionState(number, gains[place], log_total, temperature)
        shares[place], log_total = fusion(state)
        fused = fused.lerp(forms[place], shares[place])
    return fused, shares, log_total
