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
    trial: Callable[[float], float],
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
        trial: From a share to the dev-split rSum with it.
        shares: Tried, in [0, 1].
        fusion: From Δ_n to the part that share n has in the result.

    Returns:
        What every share brought; 0 of one that gave no finite number, which is left out.
    """
    own = prototypes.score_share
    found = {share: trial(share) for share in dict.fromkeys((own, *shares))}
    gains = [found[share] - found[own] for share in shares]
    fused, parts, _ = fuse_forms(
        [torch.tensor([[share]], dtype=torch.float64) for share in shares],
        gains,
        fusion,
        temperature=prototypes.feedback_temperature,
        start=torch.tensor([[own]], dtype=torch.float64),
    )
    found[float(fused)] = trial(float(fused))
    told = {share: rsum for share, rsum in found.items() if math.isfinite(rsum)}
    if len(told) < len(found):
        logger.warning("Some shares of the pooled vectors gave NaN or infinity and were left out.")
    if own in told:
        prototypes.share_score(max(told, key=lambda share: (told[share], share == own)))
    probability = prototypes.semantic_probability
    return [
        Refinement(
            number, gain if math.isfinite(gain) else 0.0, part, probability.clone(), "pooled"
        )
        for number, (gain, part) in enumerate(zip(gains, parts, strict=True), start=1)
    ]
