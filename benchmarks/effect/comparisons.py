"""What the method is compared with: other fusion rules, other estimates, and controls.

Each is a function that `pico_hf.training.feedback.Feedback` takes in place of its own: a fusion
rule for `fusion`, an estimate of the semantic probability for `estimate`.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from pico_hf.core.fusion import FusionRule, FusionState, normalised_gain
from pico_hf.core.semantic import ColumnStatistics, column_statistics, style_score
from pico_hf.core.style_refinement import ProbabilityEstimate, complement_of_style
from pico_hf.core.token_features import TokenFeatures
from pico_hf.training.feedback import Feedback

MOMENTUM = 0.9  # of both moving averages

# ---- fusion rules ------------------------------------------------------------------------------


def gated_ema(state: FusionState) -> tuple[float, float]:
    """η_n = α_max · σ(Δ_n/τ): a gate that looks right and breaks the theorem."""
    gate = 1.0 / (1.0 + math.exp(-max(min(state.gain / state.temperature, 60.0), -60.0)))
    return _unless_first(state, (1.0 - MOMENTUM) * gate), state.log_total_gain


def ema(state: FusionState) -> tuple[float, float]:
    """η_n = 1 - momentum, blind to the gain."""
    return _unless_first(state, 1.0 - MOMENTUM), state.log_total_gain


def uniform(state: FusionState) -> tuple[float, float]:
    """η_n = 1/n: the plain mean of all iterations."""
    return 1.0 / state.iteration, state.log_total_gain


def last(state: FusionState) -> tuple[float, float]:
    """η_n = 1: only the newest prototypes count."""
    return 1.0, state.log_total_gain


def _unless_first(state: FusionState, share: float) -> float:
    return 1.0 if state.iteration == 1 else share


FUSION_RULES: dict[str, FusionRule] = {
    "normalised_gain": normalised_gain,
    "gated_ema": gated_ema,
    "ema": ema,
    "uniform": uniform,
    "last": last,
}


def given_gains(gains: list[float], seed: int) -> FusionRule:
    """The normalised gain of gains that were measured in another order."""
    order = iter(random.Random(seed).sample(gains, len(gains)))

    def rule(state: FusionState) -> tuple[float, float]:
        shuffled = FusionState(
            state.iteration, next(order), state.log_total_gain, state.temperature
        )
        return normalised_gain(shuffled)

    return rule


# ---- estimates of the semantic probability -------------------------------------------------------


def pseudo(statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
    """p̂ itself."""
    return statistics.pseudo_semantic_probability


def product(statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
    """p = (1 - q^vision)(1 - q^text)."""
    semantics = [
        1.0 - style_score(columns, prototypes)
        for columns, prototypes in (
            (statistics.image_columns, vision),
            (statistics.text_columns, text),
        )
    ]
    return semantics[0] * semantics[1]


def permuted(order: Tensor) -> ProbabilityEstimate:
    """The probabilities of other columns."""
    return lambda *found: complement_of_style(*found)[order]


def inverted(statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
    """1 - p."""
    return 1.0 - complement_of_style(statistics, vision, text)


class MismatchedFeedback(Feedback):
    """Takes the statistics of the probe set with every text at an image of something else."""

    def probe_statistics(self) -> ColumnStatistics:
        probe = self.train.probe(self.model.config.probe_size)
        batches = list(self.encoder.batches(probe, "Probe"))
        images = TokenFeatures.concatenate([image for image, _ in batches])
        texts = TokenFeatures.concatenate([text for _, text in batches])
        # Half the set away: neighbouring rows may show one concept in several styles.
        return column_statistics(images, texts[torch.arange(len(texts)).roll(len(texts) // 2)])
