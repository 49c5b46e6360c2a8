"""How much of the score an encoder's own pooled vectors are, found by feedback like all else."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch

from pico_hf.core.fusion import FusionRule, fuse_forms, normalised_gain
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.refinement import Refinement

logger = logging.getLogger(__name__)

# Shares m of the pooled vectors that are tried: beside one part of S none, ¼, ½, 1, 2 or 4 parts of
# their cosine, or that alone.
SHARES = (0.0, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 1.0)


@torch.no_grad()
def choose_share(
    prototypes: StylePrototypes,
    trial: Callable[[Sequence[float]], Sequence[float]],
    shares: Sequence[float] = SHARES,
    *,
    fusion: FusionRule = normalised_gain,
) -> list[Refinement]:
    """Finds how much of the score the pooled vectors are, by what every share brings.

    The shares are fused as forms are, into the one that is there. Where two ways to score that are
    far apart are good, what lies between them need not be: then the best one is taken. Columns and
    weights stay.

    Args:
        prototypes: Changed at the end; unless something scores better, the share stays.
        trial: From shares to the dev-split rSum with each.
        shares: Tried, in [0, 1].
        fusion: From Δ_n to the part that share n has in the result.

    Returns:
        What every share brought.
    """
    own = prototypes.score_share
    before, *tried = trial([own, *shares])
    finite = [(m, value) for m, value in zip(shares, tried, strict=True) if math.isfinite(value)]
    if not finite or not math.isfinite(before):
        logger.warning("Shares of the pooled vectors gave NaN or infinity: the share stays.")
        return []
    gains = [value - before for _, value in finite]
    fused, parts, _ = fuse_forms(
        [torch.tensor([[m]], dtype=torch.float64) for m, _ in finite],
        gains,
        fusion,
        temperature=prototypes.feedback_temperature,
        start=torch.tensor([[own]], dtype=torch.float64),
    )
    found = {float(fused): trial([float(fused)])[0], **dict(finite), own: before}
    prototypes.share_score(max(found, key=lambda share: (found[share], share == own)))
    probability = prototypes.semantic_probability
    return [
        Refinement(number, gain, part, probability.clone(), "pooled")
        for number, (gain, part) in enumerate(zip(gains, parts, strict=True), start=1)
    ]
