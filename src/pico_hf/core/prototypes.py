"""Style prototypes: build, match and refine them. State changes in named calls only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor, nn

from pico_hf.core.fusion import FUSION_RULES, FusionState
from pico_hf.core.semantic import ColumnStatistics, semantic_probability, standardise


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
    _, order = linear_sum_assignment(torch.cdist(old.double(), new.double()).cpu().numpy())
    return torch.from_numpy(order).to(old.device)


def _paper(statistics: ColumnStatistics, vision: Tensor, text: Tensor, combination: str) -> Tensor:
    return semantic_probability(
        statistics.image_columns, statistics.text_columns, vision, text, combine=combination
    )


def _pseudo(statistics: ColumnStatistics, vision: Tensor, text: Tensor, combination: str) -> Tensor:
    return statistics.matched


ESTIMATORS: dict[str, Callable[[ColumnStatistics, Tensor, Tensor, str], Tensor]] = {
    "paper": _paper,
    "pseudo": _pseudo,
}


@dataclass(frozen=True)
class Refinement:
    """What one refinement did, for logs, tables and plots.

    Attributes:
        iteration: n, counted from 1.
        gain: Δ_n, in rSum points.
        fused_weight: η_n, the share of the new prototypes in the fused ones.
        semantic_probability: p of every column after fusing.
    """

    iteration: int
    gain: float
    fused_weight: float
    semantic_probability: Tensor


class StylePrototypes(nn.Module):
    """Style prototypes of both modalities and the semantic probability they give.

    All state lives in persistent fp32 buffers, so that it is saved, loaded, resumed and pushed with
    the model: `vision` (K, R), `text` (K, R), `semantic_probability` (D,), and the feedback's
    `iteration`, `log_total_gain`, `performance`, `has_performance`. Only `record`, `refine` and
    `restart` change it.

    Args:
        num_columns: D.
        num_prototypes: K, from 1 to D.
        num_instances: R, probe pairs.
        estimator: Key of ESTIMATORS.
        combination: `"mean"` or `"product"`, see `pico_hf.core.semantic.semantic_probability`.
        fusion: Key of FUSION_RULES.
        feedback_temperature: τ, in rSum points.
        fusion_momentum: For the EMA rules, in [0, 1).

    Raises:
        ValueError: If `num_prototypes` is not in [1, D].
    """

    vision: Tensor
    text: Tensor
    semantic_probability: Tensor
    iteration: Tensor
    log_total_gain: Tensor
    performance: Tensor
    has_performance: Tensor

    def __init__(
        self,
        num_columns: int,
        num_prototypes: int,
        num_instances: int,
        *,
        estimator: str = "paper",
        combination: str = "mean",
        fusion: str = "normalised_gain",
        feedback_temperature: float = 5.0,
        fusion_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if not 1 <= num_prototypes <= num_columns:
            raise ValueError(
                f"`num_prototypes` must be between 1 and the {num_columns} columns of the encoder, "
                f"got {num_prototypes}."
            )
        self.num_prototypes = num_prototypes
        self.estimator, self.combination, self.fusion = estimator, combination, fusion
        self.feedback_temperature, self.fusion_momentum = feedback_temperature, fusion_momentum
        self.register_buffer("vision", torch.zeros(num_prototypes, num_instances))
        self.register_buffer("text", torch.zeros(num_prototypes, num_instances))
        self.register_buffer("semantic_probability", torch.ones(num_columns))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))
        self.register_buffer("log_total_gain", torch.zeros(()))
        self.register_buffer("performance", torch.zeros(()))
        self.register_buffer("has_performance", torch.zeros((), dtype=torch.bool))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StylePrototypes:
        """Moves between devices but never casts: `.half()` would round the statistics for good."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    @torch.no_grad()
    def restart(self, num_instances: int) -> None:
        """Forgets prototypes and feedback for a new probe set of `num_instances` pairs.

        Prototypes of two probe sets are not comparable, so they cannot be fused. The semantic
        probability stays until the first refinement replaces it.
        """
        for name in ("vision", "text"):
            shape = (self.num_prototypes, num_instances)
            setattr(self, name, getattr(self, name).new_zeros(shape))
        for name in ("iteration", "log_total_gain", "performance", "has_performance"):
            getattr(self, name).zero_()

    @torch.no_grad()
    def record(self, *, performance: float) -> None:
        """Notes the dev-split rSum of the model as it is; the next `refine` measures Δ against it.

        Args:
            performance: rSum on the dev split, in points, finite.
        """
        if not math.isfinite(performance):
            raise ValueError(f"`performance` must be finite, got {performance}.")
        self.performance.fill_(performance)
        self.has_performance.fill_(True)

    @torch.no_grad()
    def propose(self, statistics: ColumnStatistics) -> tuple[Tensor, Tensor, Tensor]:
        """New prototypes from the probe set's statistics; changes nothing.

        Args:
            statistics: Columns (D, R) of both modalities and p̂.

        Returns:
            (μ̂ vision (K, R), μ̂ text (K, R), the semantic probability (D,) they alone would give).

        Raises:
            ValueError: If the statistics are not those of D columns and R instances.
        """
        expected = (len(self.semantic_probability), self.vision.shape[1])
        got = tuple(statistics.image_columns.shape)
        if got != expected:
            raise ValueError(
                f"`statistics` must hold (columns, instances) = {expected}, got {got}. Call "
                "`restart(num_instances=…)` before refining on another probe set."
            )
        style = 1.0 - statistics.matched
        started = int(self.iteration) > 0
        vision, text = (
            style_prototypes(columns, style, self.num_prototypes, current if started else None)
            for columns, current in (
                (statistics.image_columns, self.vision),
                (statistics.text_columns, self.text),
            )
        )
        return vision, text, self._estimate(statistics, vision, text)

    @torch.no_grad()
    def refine(
        self,
        statistics: ColumnStatistics,
        trial: Callable[[Tensor], float] | None = None,
    ) -> Refinement:
        """Builds prototypes, tries them, and fuses them in by what they brought.

        Trial before commit: Δ_n is the dev-split performance with the new prototypes' semantic
        probability minus the recorded performance, with the network frozen in between.

        Args:
            statistics: Column statistics of the probe set, with the network as it is now.
            trial: From a semantic probability (D,) to the dev-split rSum with it. None, or no
                `record` since the last refinement, counts as Δ_n = 0.

        Returns:
            Iteration, Δ_n, η_n and the new semantic probability.
        """
        vision, text, probability = self.propose(statistics)
        measured = trial is not None and bool(self.has_performance)
        gain = trial(probability) - float(self.performance) if trial and measured else 0.0
        first = int(self.iteration) == 0
        state = FusionState(
            iteration=int(self.iteration) + 1,
            gain=gain,
            log_total_gain=-math.inf if first else float(self.log_total_gain),
            temperature=self.feedback_temperature,
            momentum=self.fusion_momentum,
        )
        share, log_total = FUSION_RULES[self.fusion](state)
        self._fuse(vision, text, share, statistics)
        self.iteration.fill_(state.iteration)
        self.log_total_gain.fill_(log_total if math.isfinite(log_total) else 0.0)
        self.has_performance.fill_(False)
        return Refinement(state.iteration, gain, share, self.semantic_probability.clone())

    def _fuse(
        self, vision: Tensor, text: Tensor, share: float, statistics: ColumnStatistics
    ) -> None:
        """μ^(n) = (1 - η) μ^(n-1) + η μ̂^(n) for both modalities, then p from the fused ones."""
        self.vision.lerp_(vision.to(self.vision), share)
        self.text.lerp_(text.to(self.text), share)
        self.semantic_probability.copy_(self._estimate(statistics, self.vision, self.text))

    def _estimate(self, statistics: ColumnStatistics, vision: Tensor, text: Tensor) -> Tensor:
        estimate = ESTIMATORS[self.estimator]
        return estimate(statistics, vision, text, self.combination).to(self.semantic_probability)
