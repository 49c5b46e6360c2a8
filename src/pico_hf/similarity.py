"""Two sets of tokens → scores: masked, weighted, both directions, tiled over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf import fused_interaction
from pico_hf.interaction_gradient import LateInteraction
from pico_hf.late_interaction import interact
from pico_hf.packing import Packing


@dataclass(frozen=True)
class TokenFeatures:
    """The local features of n images (patches) or n texts (words), padded to one length.

    Args:
        features: Float (n, tokens, D), L2-normalised per token by convention (not checked).
        mask: Bool (n, tokens), True = real token. Padding may hold any value.

    Raises:
        ValueError: If the shapes of the two do not belong together or `mask` is not boolean.

    Example:
        >>> features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> words = TokenFeatures(features, torch.tensor([[True, False]]))
        >>> len(words), words.fold(torch.tensor([2.0, 0.0])).features.tolist()
        (1, [[[2.0, 0.0], [0.0, 0.0]]])
    """

    # Plain annotations: __post_init__ checks the shapes at run time, with errors that say more.
    features: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.features.ndim != 3:
            raise ValueError(
                "`features` must be of shape (n, tokens, D), got "
                f"{tuple(self.features.shape)}. Do features.unsqueeze(0) for a single item."
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(
                f"`mask` must be boolean, got {self.mask.dtype}. Do mask.bool() (True = real)."
            )
        if self.mask.shape != self.features.shape[:2]:
            raise ValueError(
                f"`mask` must be of shape {tuple(self.features.shape[:2])}, the first two axes of "
                f"`features`, got {tuple(self.mask.shape)}. Do one entry per token."
            )

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, items: slice | Tensor) -> TokenFeatures:
        """Return the images or texts chosen by a slice, an index tensor or a boolean tensor."""
        return TokenFeatures(self.features[items], self.mask[items])

    def to(self, device: torch.device | str) -> TokenFeatures:
        """Return the same tokens on `device`."""
        return TokenFeatures(self.features.to(device), self.mask.to(device))

    def fold(self, weights: Float[Tensor, " D"]) -> TokenFeatures:
        """Return the tokens with every column d multiplied by weights[d]."""
        return TokenFeatures(self.features * weights.to(self.features), self.mask)

    @staticmethod
    def concatenate(parts: Sequence[TokenFeatures]) -> TokenFeatures:
        """Join batches, padding the shorter ones with masked zeros to the longest.

        Raises:
            ValueError: If `parts` is empty.
        """
        if not parts:
            raise ValueError("`parts` must hold at least one batch, got none. Do skip the call.")
        tokens = max(part.mask.shape[1] for part in parts)
        pads = [tokens - part.mask.shape[1] for part in parts]
        pairs = list(zip(parts, pads, strict=True))
        features = [torch.nn.functional.pad(part.features, (0, 0, 0, pad)) for part, pad in pairs]
        masks = [torch.nn.functional.pad(part.mask, (0, pad)) for part, pad in pairs]
        return TokenFeatures(torch.cat(features), torch.cat(masks))


def similarity(
    images: TokenFeatures,
    texts: TokenFeatures,
    column_weights: Float[Tensor, " D"] | None = None,
    progress: bool = False,
) -> Float[Tensor, "images texts"]:
    """Score every image against every text by weighted late interaction in both directions.

    S = mean_p max_w s[p, w] + mean_w max_p s[p, w] with s[p, w] = Σ_d w_d · V[p, d] · T[w, d]
    (arXiv 2510.11175). Padding takes part in neither the maxima nor the means. On a GPU with triton
    a fused kernel does it, for float32 as exactly as `torch.set_float32_matmul_precision` says.

    Args:
        images: Patches of the images.
        texts: Words of the texts, as wide as `images`.
        column_weights: Semantic probability of each column, scaled to mean 1, without gradient.
        progress: Show a progress bar, for large galleries.

    Returns:
        Scores, in [-2, 2] without weights; float64 for float64 features, else float32.
        Differentiable once in both features; of tied tokens the first takes the gradient.

    Raises:
        ValueError: If widths differ or an image or text has no real token.
        RuntimeError: In a backward with create_graph=True.

    Example:
        >>> eye = torch.eye(2).unsqueeze(0)
        >>> images = TokenFeatures(eye, torch.tensor([[True, True]]))
        >>> texts = TokenFeatures(eye, torch.tensor([[True, False]]))
        >>> similarity(images, texts).tolist()  # patches: (1 + 0) / 2, words: 1
        [[1.5]]
        >>> similarity(images, texts, torch.tensor([0.5, 1.5])).tolist()
        [[0.75]]
    """
    _check_scorable(images, texts, column_weights)
    features = images.features.contiguous(), texts.features.contiguous()
    weights = None if column_weights is None else column_weights.detach()
    if fused_interaction.applies(*features):
        return fused_interaction.score(*features, images.mask, texts.mask, weights)
    packings = Packing(images.mask), Packing(texts.mask)
    if torch.is_grad_enabled() and any(side.requires_grad for side in features):
        return LateInteraction.apply(*features, *packings, weights, progress)
    return interact(*features, *packings, weights, progress=progress)


def _check_scorable(
    images: TokenFeatures, texts: TokenFeatures, column_weights: Tensor | None
) -> None:
    """Refuse inputs for which the score is not defined."""
    width = images.features.shape[2]
    if column_weights is not None and column_weights.shape != (width,):
        raise ValueError(
            f"`column_weights` must be of shape ({width},), one per column, got "
            f"{tuple(column_weights.shape)}. Do take them from features of this width."
        )
    if width != texts.features.shape[2]:
        raise ValueError(
            f"`texts` must be as wide as `images` ({width} columns), got "
            f"{texts.features.shape[2]}. Do project both into one space."
        )
    for name, tokens in (("images", images), ("texts", texts)):
        empty = (~tokens.mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"`{name}` must have at least one real token in every row, got none in rows "
                f"{empty[:5]}. Do drop them or keep at least one token."
            )
