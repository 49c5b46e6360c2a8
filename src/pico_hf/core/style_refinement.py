"""Refines style prototypes: new ones are tried, then fused into those that are there."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pico_hf.core.fusion import FusionRule, FusionState, normalised_gain
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.refinement import Refinement, all_finite
from pico_hf.core.semantic import ColumnStatistics, semantic_probability
from pico_hf.core.style import propose_style

logger = logging.getLogger(__name__)

# From the probe set's statistics and the prototypes of both sides to a probability (D,).
ProbabilityEstimate = Callable[[ColumnStatistics, Tensor, Tensor], Tensor]


def complement_of_style(statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
    """Semantic probability of the encoder columns: one minus how like a style each is.

    Args:
        statistics: Of the probe set.
        vision: μ of the images (K, R).
        text: μ of the texts (K, R).

    Returns:
        (D,) in [0, 1].
    """
    return semantic_probability(statistics.image_columns, statistics.text_columns, vision, text)


@torch.no_grad()
def refine_style(
    prototypes: StylePrototypes,
    statistics: ColumnStatistics,
    trial: Callable[[Tensor], float] | None = None,
    *,
    estimate: ProbabilityEstimate = complement_of_style,
    fusion: FusionRule = normalised_gain,
) -> Refinement:
    """Builds style prototypes, tries them, and fuses them in: μ^(n) = (1 - η) μ^(n-1) + η μ̂^(n).

    Args:
        prototypes: Changed at the end.
        statistics: Column statistics of the probe set, with the network as it is now.
        trial: From a semantic probability (D,) to the dev-split rSum with it. None, or no
            `record` since the last iteration, counts as Δ_n = 0.
        estimate: From statistics and prototypes to the semantic probability.
        fusion: From Δ_n to the share of the new prototypes.

    Returns:
        Iteration, Δ_n, η_n and the new semantic probability. A proposal that is not finite, or
        whose trial is not, is left out, with a warning: all but the recorded performance stays.
    """
    vision, text = propose_style(prototypes, statistics)
    proposal, gain = estimate(statistics, vision, text), 0.0
    if not all_finite(vision, text, proposal):
        return _left_out(prototypes, "The new prototypes")
    if trial is not None and bool(prototypes.has_performance):
        gain = trial(proposal) - float(prototypes.performance)
    if not math.isfinite(gain):
        return _left_out(prototypes, "The trial of the new prototypes")
    iteration = int(prototypes.iteration) + 1
    log_total = -math.inf if iteration == 1 else float(prototypes.log_total_gain)
    state = FusionState(iteration, gain, log_total, prototypes.feedback_temperature)
    share, log_total = fusion(state)
    vision = prototypes.vision.lerp(vision.to(prototypes.vision), share)
    text = prototypes.text.lerp(text.to(prototypes.text), share)
    fused = estimate(statistics, vision, text)
    if not all_finite(vision, text, fused):
        return _left_out(prototypes, "What the new prototypes were fused to")
    prototypes.commit(
        iteration=iteration,
        log_total_gain=log_total,
        semantic_probability=fused,
        vision=vision,
        text=text,
    )
    return Refinement(iteration, gain, share, prototypes.semantic_probability.clone(), "style")


def _left_out(prototypes: StylePrototypes, what: str) -> Refinement:
    """Keeps prototypes and weights, and waits for the next evaluation."""
    logger.warning("%s gave NaN or infinity and was left out: the weights stay as they are.", what)
    probability, iteration = prototypes.semantic_probability, int(prototypes.iteration)
    prototypes.commit(
        iteration=iteration,
        log_total_gain=float(prototypes.log_total_gain),
        semantic_probability=probability,
    )
    return Refinement(iteration, 0.0, 0.0, probability.clone(), "style")
