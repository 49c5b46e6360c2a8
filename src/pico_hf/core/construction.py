"""Prototypes that may bring columns of their own: canonical columns, fused by what they brought."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
from pico_hf.core.fusion import FUSION_RULES, FusionState
from pico_hf.core.prototypes import ESTIMATORS, Refinement, StylePrototypes
from pico_hf.core.semantic import ColumnStatistics
from pico_hf.core.token_features import TokenFeatures

logger = logging.getLogger(__name__)

CANONICAL = "canonical"
ALL_ESTIMATORS = (CANONICAL, *ESTIMATORS)


def fuse_forms(
    forms: Sequence[Float[Tensor, "columns columns"]],
    gains: Sequence[float],
    fusion: str = "normalised_gain",
    *,
    temperature: float = 5.0,
    momentum: float = 0.9,
) -> tuple[Float[Tensor, "columns columns"], list[float], float]:
    """Fuses forms into the encoder's own columns, one after the other, by what each brought.

    The identity, w = 1 on the encoder's own columns, is the first iteration and brought 0: with the
    normalised gain its weight in the end is 1 / (1 + Σ exp(Δ_n/τ)), and that of form n is
    exp(Δ_n/τ) times as much.

    Args:
        forms: B_n, at least one.
        gains: Δ_n, in rSum points, one per form.
        fusion: Key of `pico_hf.core.fusion.FUSION_RULES`.
        temperature: τ, in rSum points, > 0.
        momentum: For the EMA rules, in [0, 1).

    Returns:
        (the fused form, η_n of every form, log G after the last one).

    Example:
        >>> fuse_forms([3 * torch.eye(1)], [0.0])[0].tolist()  # as much of it as of the identity
        [[2.0]]
    """
    fused = torch.eye(len(forms[0]), dtype=forms[0].dtype)
    shares, log_total = [], 0.0  # log g(0)
    for number, (form, gain) in enumerate(zip(forms, gains, strict=True), start=2):
        state = FusionState(number, gain, log_total, temperature, momentum)
        share, log_total = FUSION_RULES[fusion](state)
        fused = fused.lerp(form, share)
        shares.append(share)
    return fused, shares, log_total


class AlignedPrototypes(StylePrototypes):
    """Style prototypes; with `estimator="canonical"` a basis per side instead, which they weigh.

    Two more buffers then: `image_basis` and `text_basis` (D, D), orthonormal, the identity until
    `align` changes them. For the other arguments see [`StylePrototypes`].
    """

    image_basis: Tensor
    text_basis: Tensor

    def __init__(self, num_columns: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_columns, *args, **kwargs)
        if self.canonical:
            self.register_buffer("image_basis", torch.eye(num_columns))
            self.register_buffer("text_basis", torch.eye(num_columns))
        self._aligned: bool | None = None
        self.register_load_state_dict_post_hook(_forget_aligned)

    @property
    def canonical(self) -> bool:
        """True if these columns are not the encoder's own."""
        return self.estimator == CANONICAL

    def to_columns(self, tokens: TokenFeatures, side: str) -> TokenFeatures:
        """Tokens of the encoder's own columns in the columns that are weighed.

        Args:
            tokens: Of images or texts, (n, tokens, D).
            side: `"image"` or `"text"`.
        """
        return self._rotated(tokens, f"{side}_basis", back=False)

    def to_own_columns(self, tokens: TokenFeatures, side: str) -> TokenFeatures:
        """The way back: what the encoder gave, but for rounding."""
        return self._rotated(tokens, f"{side}_basis", back=True)

    def _rotated(self, tokens: TokenFeatures, name: str, back: bool) -> TokenFeatures:
        if self._aligned is None:  # after a change; asking each time would wait for a GPU
            self._aligned = self.canonical and int(self.iteration) > 0
        if not self._aligned:
            return tokens
        basis = getattr(self, name)
        # Mixed precision would round tokens that were made fp32 on purpose.
        with torch.autocast(tokens.features.device.type, enabled=False):
            features = tokens.features @ (basis.t() if back else basis).to(tokens.features)
        return TokenFeatures(features, tokens.mask)

    @torch.no_grad()
    def restart(self, num_instances: int) -> None:
        """Forgets prototypes and feedback; canonical columns become the encoder's own, w = 1."""
        super().restart(num_instances)
        self._aligned = None
        if self.canonical:
            for basis in (self.image_basis, self.text_basis):
                basis.copy_(torch.eye(len(basis)))
            self.semantic_probability.fill_(1.0)

    def refine(
        self,
        statistics: ColumnStatistics,
        trial: Callable[[Tensor], float] | None = None,
    ) -> Refinement:
        """See [`StylePrototypes`]; canonical columns are aligned instead."""
        if self.canonical:
            raise ValueError(
                '`estimator="canonical"` has no style prototypes to refine. Call `align`, or take '
                'another estimator, such as "paper".'
            )
        return super().refine(statistics, trial)

    @torch.no_grad()
    def align(
        self,
        moments: PairMoments,
        trial: Callable[[Tensor], float] | None = None,
        candidates: Iterable[Candidate] = CANDIDATES,
    ) -> list[Refinement]:
        """Estimates canonical columns and their weights, from what each candidate brings.

        Trial before commit: every candidate is scored on the dev split, the fused one at last. If
        that scores less than the encoder's own columns, those are kept with w = 1. Ranks are what
        improves: matched scores grow more than others, and the scale and bias that turn scores into
        logits stay as they were trained.

        Args:
            moments: Of matched pairs, in the encoder's own columns.
            trial: From a bilinear form B (D, D) in the encoder's own columns to the dev-split rSum
                of scores vᵀBt. None: every Δ_n = 0, a plain mean.
            candidates: Tried in this order.

        Returns:
            What every candidate brought, with a share of 0 if none was taken.

        Raises:
            ValueError: If the estimator is another one, if the moments have other columns, or if
                there is no candidate.
        """
        self._check_moments(moments)
        own = torch.eye(len(self.semantic_probability), dtype=torch.float64)
        before = trial(own) if trial else 0.0
        forms, gains = [], []
        for candidate in candidates:
            forms.append(bilinear_form(moments, candidate))
            gains.append(trial(forms[-1]) - before if trial else 0.0)
        if not forms:
            raise ValueError("`candidates` must hold at least one, got none.")
        fused, shares, log_total = fuse_forms(
            forms,
            gains,
            self.fusion,
            temperature=self.feedback_temperature,
            momentum=self.fusion_momentum,
        )
        after = trial(fused) if trial else before
        if after < before:
            logger.warning(
                "Canonical columns scored %.1f rSum less than the encoder's own on the dev split, "
                "so those stay as they are, with uniform weights.",
                before - after,
            )
            fused, shares, log_total = own, [0.0] * len(shares), 0.0
        self._commit(fused)
        self._aligned = None
        self.iteration.fill_(len(forms))
        self.log_total_gain.fill_(log_total)
        probability = self.semantic_probability
        return [
            Refinement(number, gain, share, probability.clone())
            for number, (gain, share) in enumerate(zip(gains, shares, strict=True), start=1)
        ]

    def _check_moments(self, moments: PairMoments) -> None:
        columns, given = len(self.semantic_probability), moments.images.means.shape[1]
        if not self.canonical:
            raise ValueError(
                f'`align` needs `estimator="canonical"`, got {self.estimator!r}. Set it in '
                "PicoConfig."
            )
        if given != columns:
            raise ValueError(f"`moments` must have the encoder's {columns} columns, got {given}.")

    def _commit(self, form: Tensor) -> None:
        columns = canonical_columns(form)
        self.image_basis.copy_(columns.image_basis)
        self.text_basis.copy_(columns.text_basis)
        self.semantic_probability.copy_(columns.semantic_probability)


def _forget_aligned(module: AlignedPrototypes, _: Any) -> None:
    """What was loaded may be aligned or not."""
    module._aligned = None
