"""The prototype iterative constructor: propose, try on the dev split, fuse by what it brought.

Trial before commit: Δ_n is the dev-split rSum with a proposal minus the rSum without it, with the
network frozen in between. "This epoch minus the last one" would mostly measure training itself.
One loop serves all sources of proposals (`pico_hf.core.estimators`), and one guard: a form that
scores less than what is there is not taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pico_hf.core.estimator import Estimator, Memory, TrainingPairs
from pico_hf.core.fusion import FusionRule, FusionState, normalised_gain
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.score_form import ScoreForm
from pico_hf.core.state import SOURCES

logger = logging.getLogger(__name__)

Trial = Callable[[ScoreForm], float]  # from a form to the dev-split rSum of its scores
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Refinement:
    """What one proposal brought, for logs, tables and plots.

    Attributes:
        source: The estimator that proposed it.
        iteration: n, counted from 1.
        gain: Δ_n, in rSum points; 0 for a proposal that was left out.
        fused_weight: η_n, the share of the proposal when it was fused; 0 if it was left out.
        form: What the proposals up to this one are fused to, or what the guard kept.
    """

    source: str
    iteration: int
    gain: float
    fused_weight: float
    form: ScoreForm


@torch.no_grad()
def construct(
    bank: StylePrototypes,
    estimators: Iterable[Estimator],
    pairs: TrainingPairs,
    trial: Trial | None = None,
    *,
    fusion: FusionRule = normalised_gain,
    guarded: bool = True,
    progress: Progress = lambda proposals, source: proposals,
) -> list[Refinement]:
    """Lets estimators propose forms, one estimator after the other, and takes what they bring.

    Ranks are what improves: matched scores grow more than others, and the scale and bias that turn
    scores into logits stay as they were trained.

    Args:
        bank: Changed after each estimator, if something better than what is there was found.
        estimators: In this order; each begins with what the one before has left.
        pairs: Of the training data.
        trial: None: no proposal is known to bring anything, so that all count alike.
        fusion: From Δ_n to the share of proposal n.
        guarded: False takes what proposals were fused to even if it scores less than before.
        progress: Wraps the proposals of a source.

    Returns:
        What every proposal brought.
    """
    found: list[Refinement] = []
    collected: dict[str, Any] = {}
    for estimator in estimators:
        if trial is None and estimator.needs_feedback:
            continue
        if estimator.source not in collected:
            collected[estimator.source] = estimator.collect(pairs)
        step = _Round(bank, estimator, collected[estimator.source], trial, fusion)
        step.run(progress)
        found += step.settle(guarded)
    bank.settle()
    return found


class _Round:
    """All proposals of one estimator, tried and fused; the bank changes in `settle` alone."""

    def __init__(
        self,
        bank: StylePrototypes,
        estimator: Estimator,
        statistics: Any,
        trial: Trial | None,
        fusion: FusionRule,
    ) -> None:
        self.bank, self.estimator, self.statistics = bank, estimator, statistics
        self.trial, self.fusion = trial, fusion
        self.there = bank.form
        self.before = self.score(self.there)
        self.memory: Memory = estimator.memory(bank)
        self.number = self.memory.proposals
        self.found: list[Refinement] = []
        self.tried: list[tuple[float, ScoreForm]] = []

    def score(self, form: ScoreForm) -> float:
        """Dev-split rSum; NaN if the form cannot be scored."""
        if not form.is_finite():
            return math.nan
        return self.trial(form) if self.trial else 0.0

    def form(self, tensors: tuple[Tensor, ...]) -> ScoreForm:
        return self.estimator.form(self.bank, self.statistics, tensors)

    def run(self, progress: Progress) -> None:
        """Tries and fuses every proposal; one that gives no finite number is left out."""
        proposals = self.estimator.propose(self.bank, self.statistics)
        for proposal in progress(proposals, self.estimator.source):
            form = self.form(proposal)
            rsum = self.score(form)
            gain, share = rsum - self.before, 0.0
            if math.isfinite(gain):
                share = self.fuse(proposal, gain)
                self.tried.append((rsum, form))
            self.number += 1
            told = gain if math.isfinite(gain) else 0.0
            fused = self.form(self.memory.tensors)
            self.found.append(Refinement(self.estimator.source, self.number, told, share, fused))
        if left_out := len(self.found) - len(self.tried):
            logger.warning(
                "%d of %d proposals of %r gave NaN or infinity and were left out.",
                *(left_out, len(self.found), self.estimator.source),
            )

    def fuse(self, proposal: tuple[Tensor, ...], gain: float) -> float:
        memory, temperature = self.memory, self.bank.feedback_temperature
        state = FusionState(memory.count + 1, gain, memory.log_total, temperature)
        share, log_total = self.fusion(state)
        self.memory = memory.fused(proposal, share, log_total)
        return share

    def settle(self, guarded: bool) -> list[Refinement]:
        """Takes what the proposals were fused to, unless the guard finds something better."""
        if not self.tried:
            return self.found
        fused = self.found[-1].form  # of all that were fused
        rsum = self.score(fused)
        best, form = max(self.tried, key=lambda one: one[0])
        if self.estimator.picks and not best <= rsum:
            fused, rsum = form, best
        if fused.is_finite() and (not guarded or self.beats_what_is_there(rsum)):
            kept = self.estimator.stored(self.memory)
            self.bank.commit(fused, proposals=len(self.tried), **kept)
            return self.found
        logger.log(
            logging.WARNING if SOURCES[self.estimator.source] == "end" else logging.INFO,
            "What %r proposes scored %.1f rSum on the dev split, what is there %.1f: that stays.",
            *(self.estimator.source, rsum, self.before),
        )
        return [replace(one, fused_weight=0.0, form=self.there) for one in self.found]

    def beats_what_is_there(self, rsum: float) -> bool:
        """Whether a form is to be taken; NaN is never better."""
        return rsum > self.before if self.estimator.picks else rsum >= self.before
