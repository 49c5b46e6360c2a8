"""The state that scores come from. It changes in named calls only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pico_hf.core.score_form import ScoreForm
from pico_hf.core.state import MOST_POOLED, SOURCES, Buffer, Sizes, declared_buffers, started
from pico_hf.core.token_features import TokenFeatures


class StylePrototypes(nn.Module):
    """Semantic probability of every column, and what it was built from.

    All state lives in persistent fp32 buffers, so that it is saved, loaded, resumed and pushed with
    the model: `semantic_probability` (D,); `pooled_share`, how much of the score the pooled vectors
    are; `iteration`, how many proposals have been tried; `evaluated`, whether the dev split was
    scored since; and what the estimators keep, such as style prototypes `vision` and `text` (K, R)
    or the bases `image_basis` and `text_basis` (D, D), orthonormal. `pico_hf.core.construction`
    says what computes new values; only `note_evaluation`, `commit`, `settle`, `restart` and
    `share_score` change them.

    Args:
        num_columns: D.
        num_prototypes: K, from 1 to D.
        num_instances: R, probe pairs.
        estimators: What may propose, of `SOURCES`.
        feedback_temperature: τ, in rSum points.

    Raises:
        ValueError: If `num_prototypes` is not in [1, D].
    """

    semantic_probability: Tensor
    pooled_share: Tensor
    iteration: Tensor
    evaluated: Tensor
    image_basis: Tensor
    text_basis: Tensor

    def __init__(
        self,
        num_columns: int,
        num_prototypes: int,
        num_instances: int,
        *,
        estimators: Collection[str] = tuple(SOURCES),
        feedback_temperature: float = 5.0,
    ) -> None:
        super().__init__()
        if not 1 <= num_prototypes <= num_columns:
            raise ValueError(
                f"`num_prototypes` must be between 1 and the {num_columns} columns of the encoder, "
                f"got {num_prototypes}."
            )
        self.sizes = Sizes(num_columns, num_prototypes, num_instances)
        self.estimators = list(estimators)
        self.feedback_temperature = feedback_temperature
        for name, buffer in self.declared().items():
            self.register_buffer(name, started(buffer))
        self.register_buffer("evaluated", torch.zeros((), dtype=torch.bool))
        self._turns: bool | None = None  # None: ask the buffers
        self._share: float | None = None  # likewise, but a change asks at once, before any graph
        self.register_load_state_dict_post_hook(ask_again)

    def declared(self) -> dict[str, Buffer]:
        """Shape and start of every buffer but the flag `evaluated`."""
        return declared_buffers(self.estimators, self.sizes)

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

    def _rotates(self) -> bool:
        if self._turns is None:  # only after a change, since asking waits for a GPU
            bases = self._bases()
            if torch.compiler.is_compiling():  # a graph cannot ask; the bases may be the identity
                return bool(bases)
            self._turns = any(not torch.equal(basis, _eye_like(basis)) for basis in bases)
        return self._turns

    def _bases(self) -> list[Tensor]:
        return [self.image_basis, self.text_basis] if "image_basis" in self._buffers else []

    @property
    def form(self) -> ScoreForm:
        """How tokens and pooled vectors meet now; later changes of state do not change it."""
        found = ScoreForm(self.semantic_probability.clone(), self.score_share)
        if not self._rotates():
            return found
        image, text = (basis.clone() for basis in self._bases())
        return found._replace(image_basis=image, text_basis=text)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Every buffer by name."""
        return dict(self.named_buffers(recurse=False))

    @property
    def score_share(self) -> float:
        """`pooled_share` as a number: how much of the score the pooled vectors are, in [0, 1]."""
        if self._share is None:  # only after loading: a compiled graph cannot ask
            self._share = float(self.pooled_share)
        return self._share

    # ---- changes of state ------------------------------------------------------------------

    @torch.no_grad()
    def restart(self, num_instances: int) -> None:
        """Forgets all that was built, for a new probe set of `num_instances` pairs.

        Prototypes of two probe sets are not comparable, so they cannot be fused. Columns become the
        encoder columns again, with uniform weights. Pooled vectors stay a part of the score, at
        most `MOST_POOLED`, so that tokens are trained.
        """
        share = min(self.score_share, MOST_POOLED)
        self.sizes = self.sizes._replace(instances=num_instances)
        for name, buffer in self.declared().items():
            setattr(self, name, started(buffer).to(self.semantic_probability.device))
        self.evaluated.fill_(False)
        self.share_score(share)

    @torch.no_grad()
    def note_evaluation(self) -> None:
        """The dev split was scored with the model as it is: a construction may follow."""
        self.evaluated.fill_(True)

    @torch.no_grad()
    def settle(self) -> None:
        """A construction is over: the next one waits for another evaluation."""
        self.evaluated.fill_(False)

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
    def commit(self, form: ScoreForm, *, proposals: int = 1, **memory: Any) -> None:
        """Takes over what a construction has found.

        Args:
            form: How tokens and pooled vectors meet from now on.
            proposals: How many were tried for it.
            memory: New values of what the estimator keeps.

        Raises:
            ValueError: If a value is NaN or infinite, or if the form rotates columns and no
                estimator of this model does; then nothing is changed.
        """
        values = {"semantic_probability": form.semantic_probability, **memory}
        if self._bases():
            own = _eye_like(self.image_basis)
            values["image_basis"] = own if form.image_basis is None else form.image_basis
            values["text_basis"] = own if form.text_basis is None else form.text_basis
        elif form.image_basis is not None:
            raise ValueError(
                "`form` rotates columns, which no estimator of this model does. Add 'canonical' to "
                f"`estimators`, which are {', '.join(self.estimators) or 'none'}."
            )
        for name, value in values.items():
            if not bool(torch.isfinite(torch.as_tensor(value)).all()):
                raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
        for name, value in values.items():
            getattr(self, name).copy_(torch.as_tensor(value))
        self.iteration += proposals
        self.share_score(form.pooled_share)


def _eye_like(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=square.dtype, device=square.device)


def ask_again(module: StylePrototypes, _: Any = None) -> None:
    """Changed buffers may hold something else than what was asked about before.

    Args:
        module: Some prototypes.
    """
    module._turns = None
    module._share = None if module.pooled_share.is_meta else float(module.pooled_share)
