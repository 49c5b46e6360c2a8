"""Canonical columns: a basis in which style and semantics lie along axes, and its column weights.

Our reconstruction, not in arXiv 2510.11175, which weighs the columns that an encoder happens to
have. There p̂_d counts how often column d agrees on matched pairs. Here agreement is the covariance
of image and text over matched pairs, C_vt: what is left of it when the agreement of mismatched
pairs, the product of the means, is taken away. Divided by the scatter of either side, all that its
tokens vary in, style or not, it is a bilinear form

    M = (Σ_v + λ_v)⁻¹ C_vt (Σ_t + λ_t)⁻¹,   λ = ridge · mean eigenvalue,

whose singular vectors are columns of their own and whose singular values say how much of a column
both modalities share: canonical correlation analysis with columns scaled by what they carry (Gong
et al., IJCV 2014, scale by powers of the correlations). An encoder that was trained on such pairs
knows much of this already, so that M is mixed with the encoder columns, the identity I:
B = (1 - share) · I + share · M = U diag(w) Wᵀ. Then Σ_d w_d (UᵀV)_d (WᵀT)_d is the weighted
interaction of the paper, in rotated columns: tokens keep their length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf.core.estimator import Bank, Memory, TrainingPairs
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.score_form import ScoreForm

LEAST_SHARED = 1e-9  # of what varies: less is rounding, and leaves the encoder columns


class Candidate(NamedTuple):
    """One way to estimate the bilinear form.

    Attributes:
        scatter: What M is divided by: `"tokens"` or `"items"`.
        ridge: λ in units of the scatter's mean eigenvalue, > 0.
        share: Of M in B, in (0, 1]; scaled down by n / (n + columns) for n pairs.
    """

    scatter: str
    ridge: float
    share: float


# Tried one after the other; those that helped on the dev split weigh more.
CANDIDATES = tuple(
    Candidate(scatter, ridge, share)
    for scatter in ("items", "tokens")
    for ridge in (0.03, 0.3, 1.0)
    for share in (0.25, 0.5, 0.75)
)


def bilinear_form(moments: PairMoments, candidate: Candidate) -> Float[Tensor, "columns columns"]:
    """B = (1 - share) · I + share · M, with M scaled to singular values of mean 1.

    Args:
        moments: Of matched pairs.
        candidate: Scatter, ridge and share.

    Returns:
        (columns, columns) fp64: patches meet words as vᵀBt.

    Example:
        >>> means = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
        >>> words = means * torch.tensor([1.0, 0.0]).double()  # the second column is style
        >>> centre, scatter = torch.zeros(2).double(), torch.eye(2).double()
        >>> sides = [TokenMoments(side, centre, scatter) for side in (means, words)]
        >>> moments = PairMoments(*sides, torch.arange(4))
        >>> bilinear_form(moments, Candidate("tokens", 1.0, 0.75)).tolist()  # 4 / (4 + 2) of it
        [[1.5, 0.0], [0.0, 0.5]]
    """
    image_scatter, text_scatter = moments.scatters[candidate.scatter]
    own = torch.eye(len(image_scatter), dtype=image_scatter.dtype)
    varies = (image_scatter.trace() * text_scatter.trace()).sqrt()
    if moments.shared.norm() <= LEAST_SHARED * varies:
        return own
    form = _ridged_inverse(image_scatter, candidate.ridge) @ moments.shared
    form = form @ _ridged_inverse(text_scatter, candidate.ridge)
    spread = torch.linalg.svdvals(form).mean()
    pairs = len(moments.images.items)
    share = candidate.share * pairs / (pairs + len(form))
    return own + share * (form / spread - own)


class CanonicalColumns:
    """Proposes canonical columns and their weights; see the head of this module.

    What a model has is the first of what is fused, and brought 0: with the normalised gain its
    weight in the end is 1 / (1 + Σ exp(Δ_n/τ)), and candidate n has exp(Δ_n/τ) times as much.

    Args:
        candidates: Tried in this order.

    Raises:
        ValueError: If there is no candidate.
    """

    source = "canonical"
    needs_feedback = False
    picks = False

    def __init__(self, candidates: Iterable[Candidate] = CANDIDATES) -> None:
        self.candidates = tuple(candidates)
        if not self.candidates:
            raise ValueError("`candidates` must hold at least one, got none.")

    def collect(self, pairs: TrainingPairs) -> PairMoments:
        """Takes the moments of a sample of the training pairs."""
        return pairs.moments()

    def memory(self, bank: Bank) -> Memory:
        """The bilinear form by which the model scores now."""
        return Memory((bank.form.matrix(),))

    def propose(self, bank: Bank, statistics: PairMoments) -> Sequence[tuple[Tensor, ...]]:
        """The bilinear form of every candidate.

        Raises:
            ValueError: If the moments are of other columns than the encoder's.
        """
        columns = statistics.images.items.shape[1]
        if columns != bank.sizes.columns:
            raise ValueError(
                f"`moments` must have the encoder's {bank.sizes.columns} columns, got {columns}."
            )
        return [(bilinear_form(statistics, candidate),) for candidate in self.candidates]

    def form(self, bank: Bank, statistics: PairMoments, tensors: tuple[Tensor, ...]) -> ScoreForm:
        """Factors a bilinear form; the share of pooled vectors stays."""
        (form,) = tensors
        if not bool(torch.isfinite(form).all()):
            return ScoreForm(form.diagonal(), bank.form.pooled_share)  # which is not finite either
        return ScoreForm.of(form, bank.form.pooled_share)

    def stored(self, memory: Memory) -> dict[str, Any]:
        """Nothing but the form itself."""
        return {}


def _ridged_inverse(scatter: Tensor, ridge: float) -> Tensor:
    """(Σ + ridge · mean eigenvalue)⁻¹ of a covariance."""
    mean = float(scatter.diagonal().mean())
    level = ridge * mean if mean > 0 else 1.0  # what does not vary at all shares nothing anyway
    return torch.linalg.inv(scatter + level * torch.eye(len(scatter), dtype=scatter.dtype))
