"""Aligns canonical columns: every candidate is tried, all are fused by what they brought."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pico_hf.core.canonical import (
    CANDIDATES,
    Candidate,
    PairMoments,
    bilinear_form,
    canonical_columns,
)
from pico_hf.core.fusion import FusionRule, fuse_forms, normalised_gain
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.refinement import Refinement, all_finite

logger = logging.getLogger(__name__)


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
    if left_out := sum(not math.isfinite(gain) for gain in gains):
        logger.warning(
            "%d of %d candidates for canonical columns gave NaN or infinity and were left out.",
            left_out,
            len(gains),
        )
    temperature = prototypes.feedback_temperature
    fused, shares, log_total = fuse_forms(forms, gains, fusion, temperature=temperature)
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
    if not all_finite(form):
        return math.nan
    gain = trial(form) - before if trial else 0.0
    return gain if math.isfinite(gain) else math.nan


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
