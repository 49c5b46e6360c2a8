"""How tokens and pooled vectors meet: what estimators propose, feedback tries and a model keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf.core.decompositions import svd


class ScoreForm(NamedTuple):
    """The score (1 - m) · S + m · cos, in which a patch v and a word t meet as vᵀBt.

    B = U diag(w) Wᵀ is kept in factors: columns of their own for either side, and the semantic
    probability of each, from which w follows. For the paper's weights of encoder columns U = W = I.

    Attributes:
        semantic_probability: p (D,) in [0, 1].
        pooled_share: m, in [0, 1]: how much of the score is the cosine of pooled vectors.
        image_basis: U (D, D) orthonormal; image tokens are multiplied by it from the right. None:
            the encoder columns.
        text_basis: W (D, D), likewise.
    """

    semantic_probability: Float[Tensor, " columns"]
    pooled_share: float = 0.0
    image_basis: Float[Tensor, "columns columns"] | None = None
    text_basis: Float[Tensor, "columns columns"] | None = None

    @classmethod
    def of(cls, form: Float[Tensor, "columns columns"], pooled_share: float = 0.0) -> ScoreForm:
        """Factors a bilinear form B; Σ_d p_d (UᵀV)_d (WᵀT)_d ranks as vᵀBt does.

        Args:
            form: B, not all zero.
            pooled_share: m.

        Example:
            >>> ScoreForm.of(torch.tensor([[0.0, 2.0], [1.0, 0.0]])).semantic_probability.tolist()
            [1.0, 0.5]
            >>> ScoreForm.of(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).image_basis is None
            True
        """
        own = form.diagonal()
        if torch.equal(form, own.diag()) and bool((own >= 0).all()):  # no rotation
            return cls(own / own.max(), pooled_share)
        left, values, right = svd(form)
        return cls(values / values[0], pooled_share, left, right.t().contiguous())

    def matrix(self) -> Float[Tensor, "columns columns"]:
        """B in fp64 with weights of mean 1, on the CPU.

        Example:
            >>> ScoreForm(torch.tensor([0.75, 0.25])).matrix().tolist()
            [[1.5, 0.0], [0.0, 0.5]]
        """
        weights = column_weights(self.semantic_probability).double().cpu()
        if self.image_basis is None or self.text_basis is None:
            return weights.diag()
        return (self.image_basis.double().cpu() * weights) @ self.text_basis.double().cpu().t()

    def tensors(self) -> list[Tensor]:
        """Probability and, if the form has any, bases."""
        return [part for part in self if isinstance(part, Tensor)]

    def same_columns(self, other: ScoreForm) -> bool:
        """Whether another form differs in the share of pooled vectors at most."""
        own, others = self.tensors(), other.tensors()
        return len(own) == len(others) and all(map(torch.equal, own, others))

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(bool(torch.isfinite(part).all()) for part in self.tensors())


def compared_forms(own: ScoreForm) -> dict[str, ScoreForm]:
    """What a model is compared with: the encoder's pooled cosine, equal weights; and it itself.

    Args:
        own: The form of the model; it comes last.

    Example:
        >>> list(compared_forms(ScoreForm(torch.tensor([0.75, 0.25]))))
        ['pooled cosine', 'base, w = 1', 'PICO']
    """
    plain = ScoreForm(torch.ones_like(own.semantic_probability))
    return {"pooled cosine": plain._replace(pooled_share=1.0), "base, w = 1": plain, "PICO": own}


def column_weights(probability: Float[Tensor, " columns"]) -> Float[Tensor, " columns"]:
    """Computes w_d = D·p_d / Σp. Their mean is 1, so margins and temperatures keep their meaning.

    Args:
        probability: p (D,) in [0, 1]; if all are zero, all weights are one.

    Returns:
        (D,), >= 0, fp32.

    Example:
        >>> column_weights(torch.tensor([0.75, 0.25])).tolist()
        [1.5, 0.5]
    """
    probability = probability.float()
    mean = probability.mean()
    # On the device: this runs in every forward pass, and a branch would wait for the GPU.
    return torch.where(mean == 0, torch.ones_like(probability), probability / mean)
