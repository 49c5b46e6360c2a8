"""Projections in closed form: where untrained heads should start, from moments of pairs alone.

Not in arXiv 2510.11175. Canonical correlation analysis of matched images and texts, as in
`pico_hf.core.canonical`, but of what comes into the projections: both sides are whitened, the
singular vectors of what they share become the columns, and each column is as long as both sides
agree in it, so that late interaction counts what is shared and not what varies.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pico_hf.core.decompositions import eigh, svd
from pico_hf.core.pair_moments import PairMoments

RIDGE = 0.3  # in units of the mean eigenvalue
LEAST_CORRELATION = 1e-6  # of the largest: less is rounding


def closed_form_projections(
    moments: PairMoments, columns: int, ridge: float = RIDGE
) -> tuple[Float[Tensor, "found image_hidden"], Float[Tensor, "found text_hidden"]]:
    """The directions in which both modalities agree most, the first ones first.

    With Σ the scatter of all tokens of a side, C what mean patch and mean word share over matched
    pairs, and U diag(ρ) Wᵀ = (Σ_v + λ_v)^-½ C (Σ_t + λ_t)^-½, the projections are
    diag(ρ)^½ Uᵀ (Σ_v + λ_v)^-½ and diag(ρ)^½ Wᵀ (Σ_t + λ_t)^-½.

    Args:
        moments: Of matched images and texts, as they come into the projections.
        columns: Of the common space, >= 1.
        ridge: λ in units of a scatter's mean eigenvalue, > 0.

    Returns:
        Weights of both projections, fp64. `found` is `columns`, or less where the two sides share
        no more directions than that.

    Raises:
        ValueError: If the sides share nothing, as with pairs in random order of a constant tower.

    Example:
        >>> import torch
        >>> from pico_hf.core.moments import TokenMoments
        >>> means = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
        >>> words = means[:, :1]  # the second column of the images is style
        >>> images = TokenMoments(means, means.mean(dim=0), torch.eye(2).double())
        >>> texts = TokenMoments(words, words.mean(dim=0), torch.eye(1).double())
        >>> moments = PairMoments(images, texts, torch.arange(4))
        >>> image, text = closed_form_projections(moments, columns=2)
        >>> image.shape, text.shape, (image[0] != 0).tolist()
        (torch.Size([1, 2]), torch.Size([1, 1]), [True, False])
    """
    scatters = moments.images.scatter, moments.texts.scatter
    whiten_images, whiten_texts = (_inverse_root(scatter, ridge) for scatter in scatters)
    left, shared, right = svd(whiten_images @ moments.shared @ whiten_texts)
    found = min(columns, int((shared > LEAST_CORRELATION * shared[0]).sum()))
    if found == 0:
        raise ValueError(
            "`moments` must be of images and texts that have something in common, got pairs that "
            "do not vary together at all. Check that captions belong to their images."
        )
    length = shared[:found].sqrt()
    image = whiten_images @ left[:, :found] * length
    text = whiten_texts @ right[:found].t() * length
    return image.t().contiguous(), text.t().contiguous()


def _inverse_root(scatter: Tensor, ridge: float) -> Tensor:
    """(Σ + ridge · mean eigenvalue)^-½ of a covariance."""
    values, vectors = eigh(scatter)
    mean = float(values.mean())
    level = ridge * mean if mean > 0 else 1.0  # what does not vary shares nothing anyway
    return vectors * (values.clamp_min(0) + level).rsqrt() @ vectors.t()
