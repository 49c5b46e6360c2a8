"""Moments of tokens: what calibration and canonical columns know of many images or texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures


@dataclass(frozen=True)
class TokenMoments:
    """Mean and scatter of the real tokens of some images or texts, all in fp64 on the CPU.

    Attributes:
        items: (items, columns), the mean token of every image or text.
        mean: (columns,), the mean of all tokens.
        scatter: (columns, columns), the covariance of all tokens; only its diagonal, (columns,),
            if no more was asked for.
    """

    items: Float[Tensor, "items columns"]
    mean: Float[Tensor, " columns"]
    scatter: Float[Tensor, "columns columns"] | Float[Tensor, " columns"]

    @property
    def std(self) -> Float[Tensor, " columns"]:
        """Standard deviation of every column, >= 0."""
        variance = self.scatter if self.scatter.ndim == 1 else self.scatter.diagonal()
        return variance.clamp(min=0).sqrt()

    @classmethod
    @torch.no_grad()
    def of(cls, batches: Iterable[TokenFeatures], *, diagonal: bool = False) -> TokenMoments:
        """Passes over images or texts once and sums in fp64.

        Args:
            batches: Tokens of some images or texts; padding counts for nothing.
            diagonal: True keeps the variance of each column only, which is much cheaper.

        Raises:
            ValueError: If there are no tokens, or none in some row.

        Example:
            >>> tokens = TokenFeatures(torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 2).bool())
            >>> moments = TokenMoments.of([tokens])
            >>> moments.items.tolist(), moments.scatter.tolist(), moments.std.tolist()
            ([[2.0]], [[1.0]], [1.0])
        """
        items, count = [], 0
        total = squares = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            lengths = batch.mask.sum(dim=1, keepdim=True)
            if not bool(lengths.all()):
                raise ValueError("`batches` must have at least one real token in every row.")
            real = _double(batch.features.masked_fill(~batch.mask.unsqueeze(-1), 0.0))
            items.append((real.sum(dim=1) / lengths.to(real.device)).cpu())
            flat = real[batch.mask.to(real.device)]
            total = total + flat.sum(dim=0).cpu()
            squares = squares + (flat.square().sum(dim=0) if diagonal else flat.t() @ flat).cpu()
            count += len(flat)
        if count == 0:
            raise ValueError("`batches` must hold at least one real token, got none.")
        mean = total / count
        outer = mean.square() if diagonal else torch.outer(mean, mean)
        return cls(torch.cat(items), mean, squares / count - outer)


def _double(features: Tensor) -> Tensor:
    """The features in fp64, on the CPU if their device has no such type."""
    return (features.cpu() if features.device.type == "mps" else features).double()
