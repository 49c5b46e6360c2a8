"""Style shows in the statistics of columns: a gallery's are replaced by those of known pictures.

Not in arXiv 2510.11175. A picture's tower output keeps its place among the pictures of its gallery;
what all of them share, the mean and the spread of every column, is taken for their style.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures

LEAST_SPREAD = 1e-3  # of the reference's typical column: a column that is constant stays so


@dataclass(frozen=True)
class ColumnMoments:
    """Mean and standard deviation of every column over all real tokens of some pictures.

    Attributes:
        mean: (columns,) fp32.
        std: (columns,) fp32, >= 0.
    """

    mean: Float[Tensor, " columns"]
    std: Float[Tensor, " columns"]

    @classmethod
    @torch.no_grad()
    def of(cls, batches: Iterable[TokenFeatures]) -> ColumnMoments:
        """Pass over the pictures once, summed in float64.

        Args:
            batches: Tokens of some pictures; padding counts for nothing.

        Raises:
            ValueError: If there is not a single real token.

        Example:
            >>> tokens = TokenFeatures(torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 2).bool())
            >>> moments = ColumnMoments.of([tokens])
            >>> moments.mean.item(), moments.std.item()
            (2.0, 1.0)
        """
        total = square = torch.zeros((), dtype=torch.float64)
        count = 0
        for batch in batches:
            tokens = batch.features[batch.mask].double()
            total = total + tokens.sum(dim=0).cpu()
            square = square + tokens.square().sum(dim=0).cpu()
            count += len(tokens)
        if count == 0:
            raise ValueError("`batches` must hold at least one real token, got none.")
        mean = total / count
        return cls(mean.float(), (square / count - mean**2).clamp(min=0).sqrt().float())


@dataclass(frozen=True)
class StyleCalibration:
    """Moves tokens from the moments of their gallery to those of reference pictures.

    Attributes:
        gallery: Moments of the pictures that are to be scored, all of one style.
        reference: Moments of pictures like those the model was trained on.
    """

    gallery: ColumnMoments
    reference: ColumnMoments

    def __call__(self, tokens: TokenFeatures) -> TokenFeatures:
        """Tokens (n, tokens, columns) with (x - mean) / std · reference std + reference mean."""
        least = LEAST_SPREAD * self.reference.std.mean()
        factor = self.reference.std / self.gallery.std.clamp(min=least)
        shift = self.reference.mean - self.gallery.mean * factor
        features = tokens.features.float() * factor.to(tokens.features.device)
        features = features + shift.to(tokens.features.device)
        return TokenFeatures(features.to(tokens.features.dtype), tokens.mask)
