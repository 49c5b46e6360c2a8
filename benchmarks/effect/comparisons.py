"""What the method is compared with: other fusion rules, other estimates, and controls.

Each takes the place of the method's own in `pico_hf.training.feedback.Feedback`: a fusion rule as
`fusion`, an estimator among its `sources`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.estimator import Memory, TrainingPairs
from pico_hf.core.fusion import FusionRule, FusionState, normalised_gain
from pico_hf.core.score_form import ScoreForm
from pico_hf.core.semantic import ColumnStatistics, column_statistics, style_score
from pico_hf.core.style import StyleClusters
from pico_hf.core.token_features import TokenFeatures
from pico_hf.training.evaluation import evaluate_retrieval

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


# ---- bilinear forms ----------------------------------------------------------------------------


def fuse_forms(
    forms: Sequence[Tensor],
    gains: Sequence[float],
    fusion: FusionRule = normalised_gain,
    *,
    temperature: float = 5.0,
) -> Tensor:
    """Fuses forms into the identity, w = 1 on the encoder columns, which brought 0.

    Args:
        forms: B_n (D, D), at least one.
        gains: Δ_n, in rSum points.
        fusion: From Δ_n to the share of form n.
        temperature: τ, in rSum points.
    """
    memory = Memory((torch.eye(len(forms[0]), dtype=forms[0].dtype),))
    for form, gain in zip(forms, gains, strict=True):
        state = FusionState(memory.count + 1, gain, memory.log_total, temperature)
        memory = memory.fused((form,), *fusion(state))
    return memory.tensors[0]


def evaluate_form(model: PreTrainedModel, split: EncodedSplit, form: Tensor) -> dict[str, float]:
    """Metrics of a split in the encoder columns, with scores vᵀBt."""
    return evaluate_retrieval(model, split, ScoreForm.of(form))


# ---- estimates of the semantic probability -------------------------------------------------------


class Pseudo(StyleClusters):
    """p̂ itself."""

    def probability(self, statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
        return statistics.pseudo_semantic_probability


class Product(StyleClusters):
    """p = (1 - q^vision)(1 - q^text)."""

    def probability(self, statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
        image = 1.0 - style_score(statistics.image_columns, vision)
        return image * (1.0 - style_score(statistics.text_columns, text))


class Permuted(StyleClusters):
    """The probabilities of other columns.

    Args:
        order: (D,) which column's each column takes.
    """

    def __init__(self, order: Tensor) -> None:
        self.order = order

    def probability(self, statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
        return super().probability(statistics, vision, text)[self.order]


class Inverted(StyleClusters):
    """1 - p."""

    def probability(self, statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
        return 1.0 - super().probability(statistics, vision, text)


class Mismatched(Pseudo):
    """p̂ of the probe set with every text at an image of something else."""

    def collect(self, pairs: TrainingPairs) -> ColumnStatistics:
        batches = list(pairs.probe())
        images = TokenFeatures.concatenate([image for image, _ in batches])
        texts = TokenFeatures.concatenate([text for _, text in batches])
        # Half the set away: neighbouring rows may show one concept in several styles.
        return column_statistics(images, texts[torch.arange(len(texts)).roll(len(texts) // 2)])
