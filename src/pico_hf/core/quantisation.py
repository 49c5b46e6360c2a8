"""8-bit columns with a scale per token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LEVELS = 127  # of an 8-bit column on either side of zero


def quantise(
    tokens: Float[Tensor, "tokens D"],
) -> tuple[Int8[Tensor, "tokens D"], Float[Tensor, " tokens"]]:
    """Rounds every token to 8 bits per column; the largest column of a token becomes ±127.

    Args:
        tokens: Finite.

    Returns:
        (levels in [-127, 127], the value of one level of each token).

    Example:
        >>> levels, scales = quantise(torch.tensor([[0.5, -1.0], [0.0, 0.0]]))
        >>> levels.tolist(), dequantise(levels, scales)[0, 1].item()
        ([[64, -127], [0, 0]], -1.0)
    """
    largest = tokens.float().abs().amax(dim=1)
    scales = torch.where(largest > 0, largest / LEVELS, torch.ones_like(largest))
    return (tokens.float() / scales.unsqueeze(1)).round().to(torch.int8), scales


def dequantise(
    levels: Int8[Tensor, "*tokens D"], scales: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens D"]:
    """The inverse of `quantise` up to half a level, in fp32."""
    return levels.float() * scales.float().unsqueeze(-1)
