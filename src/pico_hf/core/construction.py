"""One iteration of the construction: propose, try on the dev split, fuse by what it brought.

Trial before commit: Δ_n is the dev-split rSum with a proposal minus the rSum without it, with the
network frozen in between. "This epoch minus the last one" would mostly measure training itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf.core.canonical import (
    CANDIDATES,
    Candidate,
    PairMoments,
    bilinear_form,
    canonical_columns,
)
from pico_hf.core.fusion import FusionRule, FusionState, normalised_gain
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.semantic import ColumnStatistics, semantic_probability
from pico_hf.core.style import propose_style

logger = logging.getLogger(__name__)

# From the probe set's statistics and the prototypes of both sides to a probability (D,).
ProbabilityEstimate = Callable[[ColumnStatistics, Tensor, Tensor], Tensor]


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


# ---- style prototypes --------------------------------------------------------------------------


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
    if not _finite(vision, text, proposal):
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
    if not _finite(vision, text, fused):
        return _left_out(prototypes, "What the new prototypes were fused to")
    prototypes.commit(
        iteration=iteration,
        log_total_gain=log_total,
        semantic_probability=fused,
        vision=vision,
        text=text,
    )
    return Refinement(iteration, gain, share, prototypes.semantic_probability.clone(), "style")


def _finite(*values: Tensor) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values)


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


# ---- canonical columns -------------------------------------------------------------------------


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
        gains: Δ_n, in rSum points, one per form.
        fusion: From Δ_n to the share of form n.
        temperature: τ, in rSum points, > 0.
        start: What is there; None: the identity.

    Returns:
        (the fused form, η_n of every form, log G after the last one).

    Example:
        >>> fuse_forms([3 * torch.eye(1)], [0.0])[0].tolist()  # as much of it as of the identity
        [[2.0]]
    """
    fused = torch.eye(len(forms[0]), dtype=forms[0].dtype) if start is None else start
    shares, log_total = [], 0.0  # log g(0)
    for number, (form, gain) in enumerate(zip(forms, gains, strict=True), start=2):
        share, log_total = fusion(FusionState(number, gain, log_total, temperature))
        fused = fused.lerp(form, share)
        shares.append(share)
    return fused, shares, log_total


@torch.no_grad()
def align_columns(
    prototypes: StylePrototypes,
    moments: PairMoments,
    trial: Callable[[Tensor], float] | None = None,
    candidates: Iterable[Candidate] = CANDIDATES,
    *,
    fusion: FusionRule = normalised_gain,
) -> list[Refinement]:
    """Estimates canonical columns and their weights from what each candidate brings.

    Every candidate is scored on the dev split, and the fused one at last. If that scores less than
    the encoder columns, those are kept with w = 1. Ranks are what improves: matched scores grow
    more than others, and the scale and bias that turn scores into logits stay as they were trained.

    Args:
        prototypes: Changed at the end.
        moments: Of matched pairs, in the encoder columns.
        trial: From a bilinear form B (D, D) in the encoder columns to the dev-split rSum of scores
            vᵀBt. None: every Δ_n = 0, a plain mean.
        candidates: Tried in this order.
        fusion: From Δ_n to the share of candidate n.

    Returns:
        What every candidate brought, with a share of 0 if none was taken.

    Raises:
        ValueError: If the prototypes weigh encoder columns, if the moments have other columns, or
            if there is no candidate.
    """
    identity = _identity(prototypes, moments)
    before = trial(identity) if trial else 0.0
    forms, gains = [], []
    for candidate in candidates:
        forms.append(bilinear_form(moments, candidate))
        gains.append(_gain(forms[-1], trial, before))
    if not forms:
        raise ValueError("`candidates` must hold at least one, got none.")
    fused, shares, log_total = _fuse_finite(prototypes, forms, gains, fusion)
    loss = -_gain(fused, trial, before) if any(shares) else 0.0
    if not loss <= 0:  # NaN is no better either
        logger.warning(
            "Canonical columns scored %.1f rSum less than the encoder columns on the dev split, so "
            "the encoder columns stay as they are, with uniform weights.",
            loss,
        )
        fused, shares, log_total = identity, [0.0] * len(shares), 0.0
    prototypes.commit(
        iteration=len(forms), log_total_gain=log_total, **canonical_columns(fused)._asdict()
    )
    probability = prototypes.semantic_probability
    return [
        Refinement(
            number, gain if math.isfinite(gain) else 0.0, share, probability.clone(), "canonical"
        )
        for number, (gain, share) in enumerate(zip(gains, shares, strict=True), start=1)
    ]


def _gain(form: Tensor, trial: Callable[[Tensor], float] | None, before: float) -> float:
    """What a candidate brings, NaN if that cannot be told."""
    if not _finite(form):
        return math.nan
    gain = trial(form) - before if trial else 0.0
    return gain if math.isfinite(gain) else math.nan


def _fuse_finite(
    prototypes: StylePrototypes, forms: list[Tensor], gains: list[float], fusion: FusionRule
) -> tuple[Tensor, list[float], float]:
    """`fuse_forms` of the candidates whose gain is a number; the others have a share of 0."""
    told = [number for number, gain in enumerate(gains) if math.isfinite(gain)]
    if len(told) < len(gains):
        logger.warning(
            "%d of %d candidates for canonical columns gave NaN or infinity and were left out.",
            len(gains) - len(told),
            len(gains),
        )
    if not told:
        return torch.eye(len(forms[0]), dtype=forms[0].dtype), [0.0] * len(gains), 0.0
    fused, some, log_total = fuse_forms(
        [forms[number] for number in told],
        [gains[number] for number in told],
        fusion,
        temperature=prototypes.feedback_temperature,
    )
    shares = dict(zip(told, some, strict=True))
    return fused, [shares.get(number, 0.0) for number in range(len(gains))], log_total


def _identity(prototypes: StylePrototypes, moments: PairMoments) -> Tensor:
    """The form of the encoder columns with w = 1, if the moments are of those columns."""
    columns, given = len(prototypes.semantic_probability), moments.images.items.shape[1]
    if not prototypes.canonical:
        raise ValueError(
            '`align_columns` needs `estimator="canonical"`, got "paper". Set it in PicoConfig.'
        )
    if given != columns:
        raise ValueError(f"`moments` must have the encoder's {columns} columns, got {given}.")
    return torch.eye(columns, dtype=torch.float64)
