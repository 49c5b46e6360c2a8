"""One iteration of the construction: propose, try on the dev split, fuse by what it brought.

Trial before commit: Δ_n is the dev-split rSum with a proposal minus the rSum without it, with the
network frozen in between. "This epoch minus the last one" would mostly measure training itself.
Proposals come from style prototypes (`pico_hf.core.style_refinement`), from canonical columns
(`pico_hf.core.alignment`) or from pooled vectors (`pico_hf.core.pooled_share`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Refinement:
    """What one proposal brought, for logs, tables and plots.

    Attributes:
        iteration: n, counted from 1.
        gain: Δ_n, in rSum points; 0 for a proposal that was left out.
        fused_weight: η_n, the share of the proposal when it was fused; 0 if it was left out.
        semantic_probability: p of every column after fusing.
        source: What proposed it: `"style"` prototypes, `"canonical"` columns or `"pooled"` vectors.
    """

    iteration: int
    gain: float
    fused_weight: float
    semantic_probability: Tensor
    source: str


def all_finite(*values: Tensor) -> bool:
    """Whether no value holds NaN or infinity."""
    return all(bool(torch.isfinite(value).all()) for value in values)
