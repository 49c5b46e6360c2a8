"""How much of the score an encoder's own pooled vectors are, found by feedback like all else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pico_hf.core.estimator import Bank, Memory, TrainingPairs
from pico_hf.core.score_form import ScoreForm

# Shares m of the pooled vectors that are tried: beside one part of S none, ¼, ½, 1, 2 or 4 parts of
# their cosine, or that alone.
SHARES = (0.0, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 1.0)


class PooledShare:
    """Proposes shares m of the pooled vectors in the score; columns and weights stay.

    The shares are fused into the one that is there. Where two ways to score that are far apart are
    good, what lies between them need not be: then the best one is taken.

    Args:
        shares: Tried, in [0, 1].
    """

    source = "pooled"
    needs_feedback = True
    picks = True

    def __init__(self, shares: Sequence[float] = SHARES) -> None:
        self.shares = tuple(shares)

    def collect(self, pairs: TrainingPairs) -> None:
        """Needs no statistics."""

    def memory(self, bank: Bank) -> Memory:
        """The share that the model has now."""
        return Memory((torch.tensor(bank.form.pooled_share, dtype=torch.float64),))

    def propose(self, bank: Bank, statistics: None) -> list[tuple[Tensor, ...]]:
        """Every share."""
        return [(torch.tensor(share, dtype=torch.float64),) for share in self.shares]

    def form(self, bank: Bank, statistics: None, tensors: tuple[Tensor, ...]) -> ScoreForm:
        """The model's columns and weights with another share."""
        return bank.form._replace(pooled_share=float(tensors[0]))

    def stored(self, memory: Memory) -> dict[str, Any]:
        """Nothing but the form itself."""
        return {}
