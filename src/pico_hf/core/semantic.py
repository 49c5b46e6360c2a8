"""Statistics of embedding columns, and the semantic probability of each column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures


@dataclass(frozen=True)
class ColumnStatistics:
    """Statistics of every embedding column over the probe set.

    Attributes:
        image_columns: (D, R), c_d[r] = mean of column d over the patches of image r.
        text_columns: (D, R), the same over the words of text r.
        positive: (D,) number of positive products V[p,d]·T[w,d] of matched pairs.
        total: Number of these products per column.
    """

    image_columns: Float[Tensor, "columns instances"]
    text_columns: Float[Tensor, "columns instances"]
    positive: Int[Tensor, " columns"]
    total: int

    @property
    def pseudo_semantic_probability(self) -> Tensor:
        """p̂ (D,) in [0, 1], the share of positive products (arXiv 2510.11175); q̂ = 1 - p̂."""
        return (self.positive.double() / self.total).float()

    @staticmethod
    def concatenate(parts: Sequence[ColumnStatistics]) -> ColumnStatistics:
        """Joins the statistics of batches exactly, since counts are integers.

        Raises:
            ValueError: If `parts` is empty.
        """
        if not parts:
            raise ValueError(
                "`parts` must hold at least one batch of statistics, got none. Pass a batch."
            )
        return ColumnStatistics(
            torch.cat([part.image_columns for part in parts], dim=1),
            torch.cat([part.text_columns for part in parts], dim=1),
            torch.stack([part.positive for part in parts]).sum(dim=0),
            sum(part.total for part in parts),
        )


@torch.no_grad()
def column_statistics(images: TokenFeatures, texts: TokenFeatures) -> ColumnStatistics:
    """Computes the statistics of matched pairs: row r of `images` belongs to row r of `texts`.

    In a column, a pair with P⁺ positive and P⁻ negative patches, W⁺ positive and W⁻ negative words
    has P⁺W⁺ + P⁻W⁻ positive products, so the cost is O((patches + words)·D). A product of exactly
    zero is not positive. Padding is left out. No gradient flows.

    Args:
        images: Patches of R images.
        texts: Words of the R texts that belong to them.

    Returns:
        Column means of both sides and the counts behind p̂.

    Raises:
        ValueError: If the numbers of images and texts differ or are 0, if the widths differ, or
            if an image or a text has no real token.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.bool)
        >>> image = TokenFeatures(torch.tensor([[[0.6, -0.8]]]), one)
        >>> text = TokenFeatures(torch.tensor([[[0.8, 0.6]]]), one)
        >>> column_statistics(image, text).pseudo_semantic_probability.tolist()
        [1.0, 0.0]
    """
    _check_pairs(images, texts)
    patches, words = images.mask.sum(dim=1), texts.mask.sum(dim=1)
    patch_columns, word_columns = _without_padding(images), _without_padding(texts)
    patches_up, patches_down = _signs(patch_columns)
    words_up, words_down = _signs(word_columns)
    return ColumnStatistics(
        image_columns=(patch_columns.sum(dim=1) / patches.unsqueeze(1)).t().contiguous(),
        text_columns=(word_columns.sum(dim=1) / words.unsqueeze(1)).t().contiguous(),
        positive=(patches_up * words_up + patches_down * words_down).sum(dim=0),
        total=int((patches * words).sum()),
    )


def _check_pairs(images: TokenFeatures, texts: TokenFeatures) -> None:
    if len(images) != len(texts) or len(images) == 0:
        raise ValueError(
            "`texts` must match `images` row by row, at least one of each, got "
            f"{len(texts)} texts for {len(images)} images. Pass one text per image."
        )
    widths = images.features.shape[2], texts.features.shape[2]
    if widths[0] != widths[1]:
        raise ValueError(
            f"`texts` must be as wide as `images` ({widths[0]} columns), got {widths[1]}. Project "
            "both into one space."
        )
    for name, tokens in (("images", images), ("texts", texts)):
        empty = (~tokens.mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"`{name}` must have at least one real token in every row, got none in rows "
                f"{empty[:5]}. Remove these pairs."
            )


def _without_padding(tokens: TokenFeatures) -> Tensor:
    """Returns the features in fp32, with zeros for padding."""
    features = tokens.features.float()
    if tokens.mask.all():
        return features
    return features.masked_fill(~tokens.mask.unsqueeze(-1), 0.0)


def _signs(features: Tensor) -> tuple[Tensor, Tensor]:
    """Counts the positive and the negative tokens of each column, (rows, D) each.

    Sums sign and |sign| as floats, which is faster than booleans and exact for small integers.
    """
    signs = features.sign()
    balance = signs.sum(dim=1)
    nonzero = signs.abs_().sum(dim=1)
    return ((nonzero + balance) / 2).long(), ((nonzero - balance) / 2).long()


def standardise(
    columns: Float[Tensor, "columns instances"],
) -> Float[Tensor, "columns instances"]:
    """Scales every column to zero mean and unit norm; a constant column becomes zeros.

    Without this, K-means would group columns by their scale. Our reconstruction, not in
    arXiv 2510.11175.

    Args:
        columns: (D, R), c_d: one row per embedding column, one coordinate per probe instance.

    Returns:
        (D, R), rows of norm 1, or 0 for constant columns.

    Example:
        >>> standardise(torch.tensor([[3.0, 1.0], [5.0, 5.0]])).tolist()
        [[0.7071067690849304, -0.7071067690849304], [0.0, 0.0]]
    """
    centred = columns - columns.mean(dim=1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    # Relative, since the rounding error of a constant column grows with the constant.
    constant = norm <= 1e-6 * columns.norm(dim=1, keepdim=True)
    return (centred / norm).masked_fill(constant, 0.0)


def style_score(
    columns: Float[Tensor, "columns instances"],
    prototypes: Float[Tensor, "prototypes instances"],
) -> Float[Tensor, " columns"]:
    """Computes q_d in [0, 1], how similar each column is to a style prototype.

    q_d is ρ_d = max_k cos(c_d, μ_k), scaled by its minimum and maximum over all columns.
    Our reconstruction, not in arXiv 2510.11175.

    Args:
        columns: c_d of one modality.
        prototypes: μ_k of the same modality, in the space of standardised columns.

    Returns:
        (D,) in [0, 1], fp32. Zeros if all ρ_d are equal: style and semantics cannot be told apart.

    Example:
        >>> columns, style = torch.tensor([[2.0, -2.0], [-1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> style_score(columns, style).tolist()
        [1.0, 0.0]
    """
    directions = torch.nn.functional.normalize(prototypes.float(), dim=1)
    nearest = (standardise(columns.float()) @ directions.t()).amax(dim=1)
    low, high = nearest.aminmax()
    return torch.zeros_like(nearest) if low == high else (nearest - low) / (high - low)


def semantic_probability(
    image_columns: Float[Tensor, "columns instances"],
    text_columns: Float[Tensor, "columns instances"],
    image_prototypes: Float[Tensor, "prototypes instances"],
    text_prototypes: Float[Tensor, "prototypes instances"],
) -> Float[Tensor, " columns"]:
    """Computes p_d = 1 - ½(q_d^vision + q_d^text): semantic is what is not style.

    Our reconstruction, not in arXiv 2510.11175.

    Args:
        image_columns: c_d of the image side.
        text_columns: c_d of the text side.
        image_prototypes: μ of the image side.
        text_prototypes: μ of the text side.

    Returns:
        (D,) in [0, 1].

    Example:
        >>> columns, style = torch.tensor([[2.0, -2.0], [-1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        >>> semantic_probability(columns, columns, style, style).tolist()
        [0.0, 1.0]
    """
    vision = style_score(image_columns, image_prototypes)
    return 1.0 - 0.5 * (vision + style_score(text_columns, text_prototypes))
