"""Style prototypes of one modality: centroids of its embedding columns (arXiv 2510.11175)."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf.core.estimator import Bank, Memory, TrainingPairs
from pico_hf.core.score_form import ScoreForm
from pico_hf.core.semantic import (
    ColumnStatistics,
    column_statistics,
    semantic_probability,
    standardise,
)


def style_prototypes(
    columns: Float[Tensor, "columns instances"],
    style_weight: Float[Tensor, " columns"],
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


class StyleClusters:
    """Proposes style prototypes, clusters of encoder columns; semantic is what is not like style.

    New prototypes are fused into those that are there, μ^(n) = (1 - η_n) μ^(n-1) + η_n μ̂^(n), and
    column weights follow from them and from the statistics of the network as it is now.
    """

    source = "style"
    needs_feedback = False
    picks = False

    def collect(self, pairs: TrainingPairs) -> ColumnStatistics:
        """Takes the column statistics of the probe set."""
        return ColumnStatistics.concatenate([column_statistics(*batch) for batch in pairs.probe()])

    def memory(self, bank: Bank) -> Memory:
        """The prototypes that are there; the first ones have nothing to be fused with."""
        state = bank.state
        tensors, count = (state["vision"], state["text"]), int(state["style_iteration"])
        log_total = float(state["log_total_gain"]) if count else -math.inf
        return Memory(tensors, count, log_total, rest=0)

    def propose(self, bank: Bank, statistics: ColumnStatistics) -> list[tuple[Tensor, ...]]:
        """One pair of new prototypes: μ̂ of the images (K, R) and of the texts (K, R).

        Raises:
            ValueError: If the statistics are not those of D columns and R instances.
        """
        expected = (bank.sizes.columns, bank.sizes.instances)
        got = tuple(statistics.image_columns.shape)
        if got != expected:
            raise ValueError(
                f"`statistics` must hold (columns, instances) = {expected}, got {got}. Call "
                "`restart(num_instances=…)` before refining on another probe set."
            )
        style = 1.0 - statistics.pseudo_semantic_probability
        memory, count = self.memory(bank), bank.sizes.prototypes
        columns = statistics.image_columns, statistics.text_columns
        return [
            tuple(
                style_prototypes(side, style, count, before if memory.proposals else None)
                for side, before in zip(columns, memory.tensors, strict=True)
            )
        ]

    def form(
        self, bank: Bank, statistics: ColumnStatistics, tensors: tuple[Tensor, ...]
    ) -> ScoreForm:
        """Weights of the encoder columns; the share of pooled vectors stays."""
        return ScoreForm(self.probability(statistics, *tensors), bank.form.pooled_share)

    def probability(self, statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
        """P (D,) in [0, 1]: one minus how like a style each column is."""
        sides = statistics.image_columns, statistics.text_columns
        return semantic_probability(*sides, vision.to(sides[0]), text.to(sides[1]))

    def stored(self, memory: Memory) -> dict[str, Any]:
        """Prototypes and counters."""
        vision, text = memory.tensors
        log_total = memory.log_total if math.isfinite(memory.log_total) else 0.0
        counters = {"style_iteration": memory.proposals, "log_total_gain": log_total}
        return {"vision": vision, "text": text, **counters}


def _matching(
    old: Float[Tensor, "prototypes instances"], new: Float[Tensor, "prototypes instances"]
) -> Tensor:
    """Index of the new centroid that continues each old one, at the least total distance."""
    from scipy.optimize import linear_sum_assignment

    _, order = linear_sum_assignment(torch.cdist(old.double(), new.double()).cpu().numpy())
    return torch.from_numpy(order).to(old.device)
