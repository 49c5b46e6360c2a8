"""The state that column weights come from. It changes in named calls only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pico_hf.core.token_features import TokenFeatures


class CanonicalColumns(NamedTuple):
    """A basis for either side and how much of each column both sides share.

    Attributes:
        image_basis: (columns, columns) orthonormal; tokens are multiplied by it from the right.
        text_basis: Likewise.
        semantic_probability: (columns,) in [0, 1], the largest 1.
    """

    image_basis: Float[Tensor, "columns columns"]
    text_basis: Float[Tensor, "columns columns"]
    semantic_probability: Float[Tensor, " columns"]


class StylePrototypes(nn.Module):
    """Semantic probability of every column, and what it was built from.

    All state lives in persistent fp32 buffers, so that it is saved, loaded, resumed and pushed with
    the model: the style prototypes `vision` and `text` (K, R), `semantic_probability` (D,), the
    feedback's `iteration`, `log_total_gain`, `performance` and `has_performance`; `pooled_share`,
    how much of the score the pooled vectors are; with `canonical` also `image_basis` and
    `text_basis` (D, D), orthonormal. `pico_hf.core.refinement` says what computes new values; only
    `record`, `commit`, `restart` and `share_score` change them.

    Args:
        num_columns: D.
        num_prototypes: K, from 1 to D.
        num_instances: R, probe pairs.
        canonical: True weighs rotated columns; the bases are the identity until they are committed.
        feedback_temperature: τ, in rSum points.

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
    pooled_share: Tensor
    image_basis: Tensor
    text_basis: Tensor

    def __init__(
        self,
        num_columns: int,
        num_prototypes: int,
        num_instances: int,
        *,
        canonical: bool = False,
        feedback_temperature: float = 5.0,
    ) -> None:
        super().__init__()
        if not 1 <= num_prototypes <= num_columns:
            raise ValueError(
                f"`num_prototypes` must be between 1 and the {num_columns} columns of the encoder, "
                f"got {num_prototypes}."
            )
        self.num_prototypes, self.canonical = num_prototypes, canonical
        self.feedback_temperature = feedback_temperature
        self.register_buffer("vision", torch.zeros(num_prototypes, num_instances))
        self.register_buffer("text", torch.zeros(num_prototypes, num_instances))
        self.register_buffer("semantic_probability", torch.ones(num_columns))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))
        self.register_buffer("log_total_gain", torch.zeros(()))
        self.register_buffer("performance", torch.zeros(()))
        self.register_buffer("has_performance", torch.zeros((), dtype=torch.bool))
        self.register_buffer("pooled_share", torch.zeros(()))
        if canonical:
            self.register_buffer("image_basis", torch.eye(num_columns))
            self.register_buffer("text_basis", torch.eye(num_columns))
        self._aligned: bool | None = None  # None: ask the buffers
        self._share: float | None = None  # likewise, but a change asks at once, before any graph
        self.register_load_state_dict_post_hook(ask_again)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StylePrototypes:
        """Moves between devices but never casts: `.half()` would round the statistics for good."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    # ---- columns ---------------------------------------------------------------------------

    def to_columns(self, tokens: TokenFeatures, side: str) -> TokenFeatures:
        """Rotates tokens from the encoder columns to the columns that are weighted.

        Args:
            tokens: Of images or texts, (n, tokens, D).
            side: `"image"` or `"text"`.
        """
        return self._rotated(tokens, f"{side}_basis", back=False)

    def to_encoder_columns(self, tokens: TokenFeatures, side: str) -> TokenFeatures:
        """Rotates tokens back to the encoder columns; the inverse of `to_columns` up to rounding.

        Args:
            tokens: Of images or texts, (n, tokens, D).
            side: `"image"` or `"text"`.
        """
        return self._rotated(tokens, f"{side}_basis", back=True)

    def _rotated(self, tokens: TokenFeatures, name: str, back: bool) -> TokenFeatures:
        if not self._rotates():
            return tokens
        basis = getattr(self, name)
        # Mixed precision would round tokens that were made fp32 on purpose.
        with torch.autocast(tokens.features.device.type, enabled=False):
            return tokens.turned(basis.t() if back else basis)

    @property
    def columns(self) -> CanonicalColumns:
        """Bases and probability of the columns that are weighted, canonical or the encoder's."""
        own = torch.eye(len(self.semantic_probability), device=self.semantic_probability.device)
        bases = (self.image_basis, self.text_basis) if self.canonical else (own, own)
        return CanonicalColumns(*bases, self.semantic_probability)

    @property
    def score_share(self) -> float:
        """`pooled_share` as a number: how much of the score the pooled vectors are, in [0, 1]."""
        if self._share is None:  # only after loading: a compiled graph cannot ask
            self._share = float(self.pooled_share)
        return self._share

    def _rotates(self) -> bool:
        if self._aligned is None:  # only after a change, since asking waits for a GPU
            if torch.compiler.is_compiling():  # a graph cannot ask; the bases may be the identity
                return self.canonical
            self._aligned = self.canonical and int(self.iteration) > 0
        return self._aligned

    # ---- changes of state ------------------------------------------------------------------

    @torch.no_grad()
    def restart(self, num_instances: int) -> None:
        """Forgets prototypes and feedback for a new probe set of `num_instances` pairs.

        Prototypes of two probe sets are not comparable, so they cannot be fused. The semantic
        probability of encoder columns stays until the next commit replaces it; canonical columns
        become the encoder columns again, with uniform weights. Pooled vectors are no longer part of
        the score, or at most half of it if that was set by hand.
        """
        for name in ("vision", "text"):
            shape = (self.num_prototypes, num_instances)
            setattr(self, name, getattr(self, name).new_zeros(shape))
        # A share that feedback found is forgotten; of one that was set, tokens have to be a part.
        self.pooled_share.clamp_(max=0.0 if int(self.iteration) > 0 else 0.5)
        for name in ("iteration", "log_total_gain", "performance", "has_performance"):
            getattr(self, name).zero_()
        ask_again(self)
        if self.canonical:
            for basis in (self.image_basis, self.text_basis):
                basis.copy_(torch.eye(len(basis)))
            self.semantic_probability.fill_(1.0)

    @torch.no_grad()
    def record(self, *, performance: float) -> None:
        """Notes the dev-split rSum of the model as it is, for the next Δ to be measured against.

        Args:
            performance: rSum on the dev split, in points, finite.

        Raises:
            ValueError: If it is not finite.
        """
        if not math.isfinite(performance):
            raise ValueError(f"`performance` must be finite, got {performance}.")
        self.performance.fill_(performance)
        self.has_performance.fill_(True)

    @torch.no_grad()
    def share_score(self, pooled_share: float) -> None:
        """Sets how much of the score the pooled vectors are, by hand.

        Args:
            pooled_share: m, in [0, 1]: 0 scores tokens alone, 1 pooled vectors alone.

        Raises:
            ValueError: If it is out of its range.
        """
        if not 0.0 <= pooled_share <= 1.0:
            raise ValueError(f"`pooled_share` must be in [0, 1], got {pooled_share!r}.")
        self.pooled_share.fill_(pooled_share)
        ask_again(self)

    @torch.no_grad()
    def commit(
        self,
        *,
        iteration: int,
        log_total_gain: float,
        semantic_probability: Float[Tensor, " columns"],
        **state: Tensor,
    ) -> None:
        """Takes over what an iteration of the construction has found.

        Args:
            iteration: n, how many prototypes or candidates were fused.
            log_total_gain: log G_n.
            semantic_probability: p (D,) in [0, 1].
            state: New values of other buffers: `vision` and `text`, `image_basis` and `text_basis`.

        Raises:
            ValueError: If a value is NaN or infinite; then nothing is changed.
        """
        for name, value in {"semantic_probability": semantic_probability, **state}.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
        self.iteration.fill_(iteration)
        self.log_total_gain.fill_(log_total_gain if math.isfinite(log_total_gain) else 0.0)
        self.has_performance.fill_(False)
        self.semantic_probability.copy_(semantic_probability)
        for name, value in state.items():
            getattr(self, name).copy_(torch.as_tensor(value))
        ask_again(self)


def ask_again(module: StylePrototypes, _: Any = None) -> None:
    """Changed buffers may hold something else than what was asked about before.

    Args:
        module: Some prototypes.
    """
    module._aligned = None
    module._share = None if module.pooled_share.is_meta else float(module.pooled_share)
