"""Token features of images and texts: padded tokens and a mask of the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TokenFeatures:
    """Token features of n images (patches) or n texts (words), padded to one length.

    Args:
        features: Float (n, tokens, D), L2-normalised per token by convention (not checked).
        mask: Bool (n, tokens), True = real token, on the same device. Padding may hold any value.
        pooled: (n, D), one vector per item as the encoder pools it, of unit length like the tokens;
            None where nobody needs it.

    Raises:
        ValueError: If `features` is not 3-D, if `mask` is not boolean, has another shape than
            (n, tokens) or is on another device, or if `pooled` is not of shape (n, D).

    Example:
        >>> features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> words = TokenFeatures(features, torch.tensor([[True, False]]))
        >>> len(words), words.fold(torch.tensor([2.0, 0.0])).features.tolist()
        (1, [[[2.0, 0.0], [0.0, 0.0]]])
    """

    # Without shapes in the annotations: __post_init__ checks them with clearer messages.
    features: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 3:
            raise ValueError(
                "`features` must be of shape (n, tokens, D), got "
                f"{tuple(self.features.shape)}. Convert a single item with "
                "features.unsqueeze(0)."
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(
                f"`mask` must be boolean, got {self.mask.dtype}. Convert it with mask.bool() "
                "(True = real token)."
            )
        if self.mask.shape != self.features.shape[:2]:
            raise ValueError(
                f"`mask` must be of shape {tuple(self.features.shape[:2])}, the first two axes of "
                f"`features`, got {tuple(self.mask.shape)}. Pass one entry per token."
            )
        if self.mask.device != self.features.device:
            raise ValueError(
                f"`mask` must be on the device of `features` ({self.features.device}), got "
                f"{self.mask.device}. Move it with mask.to(features.device)."
            )
        # Not len(): it would tie an exported graph to the batch that it is made with.
        expected = (self.features.shape[0], self.features.shape[2])
        if self.pooled is not None and self.pooled.shape != expected:
            raise ValueError(
                f"`pooled` must be of shape {expected}, one vector per item as wide as its tokens, "
                f"got {tuple(self.pooled.shape)}."
            )

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, items: slice | Tensor) -> TokenFeatures:
        """Return the images or texts that a slice, an index tensor or a boolean tensor selects."""
        return TokenFeatures(
            self.features[items],
            self.mask[items],
            None if self.pooled is None else self.pooled[items],
        )

    def to(self, device: torch.device | str) -> TokenFeatures:
        """Return the same tokens on `device`."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return TokenFeatures(self.features.to(device), self.mask.to(device), pooled)

    def fold(self, weights: Float[Tensor, " D"]) -> TokenFeatures:
        """Return the tokens with every column d multiplied by weights[d], without `pooled`."""
        return TokenFeatures(self.features * weights.to(self.features), self.mask)

    def turned(self, matrix: Float[Tensor, "D D"]) -> TokenFeatures:
        """Return tokens and pooled vectors multiplied by `matrix` from the right."""
        pooled = None if self.pooled is None else self.pooled @ matrix.to(self.pooled)
        return TokenFeatures(self.features @ matrix.to(self.features), self.mask, pooled)

    def mean(self) -> Float[Tensor, "n D"]:
        """Return the mean of the real tokens of every item in fp32 (fp64 stays); zeros without any.

        Example:
            >>> features = torch.tensor([[[1.0], [3.0], [torch.nan]]])
            >>> TokenFeatures(features, torch.tensor([[True, True, False]])).mean().tolist()
            [[2.0]]
        """
        kind = torch.promote_types(self.features.dtype, torch.float32)
        real = self.features.to(kind).masked_fill(~self.mask.unsqueeze(-1), 0.0)
        count = self.mask.sum(dim=1, keepdim=True).clamp_min(1)
        return real.sum(dim=1) / count.to(real.dtype)

    @staticmethod
    def concatenate(parts: Sequence[TokenFeatures]) -> TokenFeatures:
        """Join batches, padding the shorter ones with masked zeros to the longest.

        Raises:
            ValueError: If `parts` is empty.
        """
        if not parts:
            raise ValueError("`parts` must hold at least one batch, got none. Pass a batch.")
        tokens = max(part.mask.shape[1] for part in parts)
        pads = [tokens - part.mask.shape[1] for part in parts]
        pairs = list(zip(parts, pads, strict=True))
        features = [torch.nn.functional.pad(part.features, (0, 0, 0, pad)) for part, pad in pairs]
        masks = [torch.nn.functional.pad(part.mask, (0, pad)) for part, pad in pairs]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        whole = torch.cat(pooled) if len(pooled) == len(parts) else None
        return TokenFeatures(torch.cat(features), torch.cat(masks), whole)


def unit_length(
    features: Float[Tensor, "n tokens D"],
    mask: Tensor,
    side: str = "token",
    pooled: Float[Tensor, "n D"] | None = None,
) -> TokenFeatures:
    """Normalises every token, and every pooled vector, in fp32.

    Args:
        features: Projected tokens of any length.
        mask: (n, tokens) True = real token.
        side: Whose features they are, for the error.
        pooled: Projected pooled vectors of any length; None: there are none.

    Returns:
        Tokens of length 1, fp32; a token of zeros stays zero.

    Raises:
        ValueError: If a value is NaN or infinite, or so large that a length is.

    Example:
        >>> unit_length(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[True]])).features.tolist()
        [[[0.6000000238418579, 0.800000011920929]]]
    """
    unit, *lengths = _normalised(features)
    if pooled is not None:
        pooled, more = _normalised(pooled)
        lengths.append(more)
    # A graph that is exported or compiled as a whole cannot stop half-way.
    if not torch.compiler.is_compiling() and not _all_finite(lengths):
        raise ValueError(
            f"The {side} features contain NaN or infinity. Check the encoder's weights and inputs; "
            "if it runs in half precision, try float32 or bfloat16."
        )
    return TokenFeatures(unit, mask, pooled)


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether all values are numbers; asked of the device once."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def _normalised(vectors: Float[Tensor, "*n D"]) -> tuple[Float[Tensor, "*n D"], Tensor]:
    """Vectors of length 1 in fp32, zeros as they are, and the lengths (*n, 1) that they had."""
    vectors = vectors.float()
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.clamp_min(1e-12), length


def drop_columns(tokens: TokenFeatures, share: float) -> TokenFeatures:
    """Sets columns to zero at random, the same ones in all tokens of an item, and scales the rest.

    Args:
        tokens: Of some images or texts.
        share: Probability of each column to be left out, in [0, 1); 0 draws nothing.
    """
    if share == 0:
        return tokens
    kept = torch.ones_like(tokens.features[:, :1])
    kept = torch.nn.functional.dropout(kept, share)
    pooled = None if tokens.pooled is None else tokens.pooled * kept.squeeze(1)
    return TokenFeatures(tokens.features * kept, tokens.mask, pooled)


def halves(tokens: TokenFeatures, *texts: Tensor | None) -> tuple[TokenFeatures, TokenFeatures]:
    """Splits 2n images that were encoded as one batch: the first n, and the partner of each.

    Args:
        tokens: Of 2n images, the partner of image i at n + i.
        texts: What a batch might have beside images, all None.

    Raises:
        ValueError: If the number of images is odd, or if there are texts.

    Example:
        >>> images = TokenFeatures(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[True], [True]]))
        >>> [half.features.item() for half in halves(images)]
        [1.0, 2.0]
    """
    extra = any(text is not None for text in texts)
    if len(tokens) % 2 or extra:
        raise ValueError(
            "`image_pairs=True` takes images and as many partners after them, and no texts, got "
            f"{len(tokens)} images{' and texts' if extra else ''}. Make such batches with "
            "`ImagePairCollator`."
        )
    return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
