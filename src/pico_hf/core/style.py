"""Style prototypes of one modality: centroids of its embedding columns (arXiv 2510.11175)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf.core.semantic import standardise


def style_prototypes(
    columns: Float[Tensor, "columns instances"],
    style_weight: Float[Tensor, columns],
    num_prototypes: int,
    warm_start: Float[Tensor, "prototypes instances"] | None = None,
) -> Float[Tensor, "prototypes instances"]:
    """Weighted K-means whose instances are the columns: minimises Tr((c - Mμ)ᵀ diag(q̂)(c - Mμ)).

    Columns are standardised first, otherwise they would be sorted by scale (our reconstruction, not
    in arXiv 2510.11175).

    Args:
        columns: c_d, one row per embedding column, one coordinate per probe instance.
        style_weight: q̂_d = 1 - p̂_d, in [0, 1]; all zero counts as all equal.
        num_prototypes: K, from 1 to the number of columns.
        warm_start: Current prototypes; the result comes back in their order (Hungarian matching).

    Returns:
        μ̂, the K centroids.

    Example:
        >>> columns = torch.tensor([[2.0, -2.0], [1.0, -1.0]])
        >>> (style_prototypes(columns, torch.ones(2), 1) * 2**0.5).round().tolist()
        [[1.0, -1.0]]
    """
    from sklearn.cluster import KMeans  # a second to import, which loading a model need not wait

    weight = style_weight if bool((style_weight > 0).any()) else torch.ones_like(style_weight)
    kmeans = KMeans(
        n_clusters=num_prototypes,
        init="k-means++" if warm_start is None else warm_start.double().cpu().numpy(),
        n_init=4 if warm_start is None else 1,
        random_state=0,
    )
    kmeans.fit(standardise(columns).double().cpu().numpy(), sample_weight=weight.cpu().numpy())
    centroids = torch.from_numpy(kmeans.cluster_centers_).to(columns)
    return centroids if warm_start is None else centroids[_matching(warm_start, centroids)]


def _matching(
    old: Float[Tensor, "prototypes instances"], new: Float[Tensor, "prototypes instances"]
) -> Tensor:
    """Index of the new centroid that continues each old one, at the least total distance."""
    from scipy.optimize import linear_sum_assignment

    _, order = linear_sum_assignment(torch.cdist(old.double(), new.double()).cpu().numpy())
    return torch.from_numpy(order).to(old.device)
