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

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pico_hf.core.moments import TokenMoments
from pico_hf.core.prototypes import CanonicalColumns


@dataclass(frozen=True)
class PairMoments:
    """Moments of matched images and texts: the scatter of either side and what both share.

    Attributes:
        images: Moments of the images.
        texts: Moments of the texts.
        text_to_image: (texts,) row of the image each text belongs to.
    """

    images: TokenMoments
    texts: TokenMoments
    text_to_image: Int[Tensor, " texts"]

    def __post_init__(self) -> None:
        if len(self.text_to_image) != len(self.texts.items) or len(self.images.items) < 2:
            raise ValueError(
                "`text_to_image` must name the image of every text, of at least 2 images, got "
                f"{len(self.text_to_image)} entries for {len(self.texts.items)} texts and "
                f"{len(self.images.items)} images."
            )

    @cached_property
    def shared(self) -> Float[Tensor, "image_columns text_columns"]:
        """C_vt, the covariance of mean patch and mean word over matched pairs.

        Example:
            >>> rows = torch.tensor([[1.0], [3.0]]).double()
            >>> side = TokenMoments(rows, rows.mean(dim=0), torch.eye(1).double())
            >>> PairMoments(side, side, torch.tensor([0, 1])).shared.tolist()
            [[1.0]]
        """
        images = _centred(self.images.items[self.text_to_image])
        return images.t() @ _centred(self.texts.items) / len(self.text_to_image)

    @cached_property
    def scatters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Covariances of images and texts: of all `"tokens"`, and of the mean tokens, `"items"`."""
        images, texts = _centred(self.images.items[self.text_to_image]), _centred(self.texts.items)
        count = len(self.text_to_image)
        return {
            "tokens": (self.images.scatter, self.texts.scatter),
            "items": (images.t() @ images / count, texts.t() @ texts / count),
        }


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


def canonical_columns(form: Float[Tensor, "columns columns"]) -> CanonicalColumns:
    """Turns a bilinear form into weighted rotated columns: B = U diag(w) Wᵀ, p = w / max w.

    Args:
        form: B, not all zero.

    Returns:
        U, W and p; Σ_d p_d (UᵀV)_d (WᵀT)_d ranks as vᵀBt does.

    Example:
        >>> canonical_columns(torch.tensor([[0.0, 2.0], [1.0, 0.0]])).semantic_probability.tolist()
        [1.0, 0.5]
    """
    left, values, right = torch.linalg.svd(form)
    return CanonicalColumns(left, right.t().contiguous(), values / values[0])


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=0)


def _ridged_inverse(scatter: Tensor, ridge: float) -> Tensor:
    """(Σ + ridge · mean eigenvalue)⁻¹ of a covariance."""
    mean = float(scatter.diagonal().mean())
    level = ridge * mean if mean > 0 else 1.0  # what does not vary at all shares nothing anyway
    return torch.linalg.inv(scatter + level * torch.eye(len(scatter), dtype=scatter.dtype))
