"""Statistics of columns, and from them the semantic probability of each column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures


@dataclass(frozen=True)
class ColumnStatistics:
    """What the probe set says about every column.

    Attributes:
        image_columns: (D, R), c_d[r] = mean of column d over the patches of image r.
        text_columns: (D, R), the same over the words of text r.
        positive: (D,) how many products V[p,d]·T[w,d] of matched pairs are positive.
        total: How many products there are.
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
        """Joins the statistics of batches; counts are integers, so the result is exact.

        Raises:
            ValueError: If `parts` is empty.
        """
        if not parts:
            raise ValueError("`parts` must hold at least one batch of statistics, got none.")
        return ColumnStatistics(
            torch.cat([part.image_columns for part in parts], dim=1),
            torch.cat([part.text_columns for part in parts], dim=1),
            torch.stack([part.positive for part in parts]).sum(dim=0),
            sum(part.total for part in parts),
        )


@torch.no_grad()
def column_statistics(images: TokenFeatures, texts: TokenFeatures) -> ColumnStatistics:
    """Statistics of matched pairs: row r of `images` belongs to row r of `texts`.

    The count of positive products factorises per pair: with P⁺, P⁻ positive and negative patches
    and W⁺, W⁻ words of a column it is P⁺W⁺ + P⁻W⁻, at O((patches + words)·D). A product that is
    exactly zero is not positive; padding takes part in nothing. No gradient flows.

    Args:
        images: Patches of R images.
        texts: Words of the R texts that belong to them.

    Returns:
        Column means of both sides and the counts behind p̂.

    Raises:
        ValueError: If there are not as many texts as images, none at all, if their widths differ,
            or if an image or a text has no real token.

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
            f"{len(texts)} texts for {len(images)} images. Give every image one text."
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
                f"{empty[:5]}. Leave such pairs out."
            )


def _without_padding(tokens: TokenFeatures) -> Tensor:
    """The features in fp32, zero where padding is."""
    features = tokens.features.float()
    if tokens.mask.all():
        return features
    return features.masked_fill(~tokens.mask.unsqueeze(-1), 0.0)


def _signs(features: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, D) numbers of positive and of negative tokens in each column.

    From the sums of sign and |sign|, small integers and so exact: floats sum faster than booleans.
    """
    signs = features.sign()
    balance = signs.sum(dim=1)
    nonzero = signs.abs_().sum(dim=1)
    return ((nonzero + balance) / 2).long(), ((nonzero - balance) / 2).long()


def standardise(
    columns: Float[Tensor, "columns instances"],
) -> Float[Tensor, "columns instances"]:
    """Zero mean and unit norm for every column; a constant column becomes zeros.

    Otherwise K-means would sort columns by scale (our reconstruction, not in arXiv 2510.11175).

    Args:
        columns: c_d, one row per embedding column, one coordinate per probe instance.

    Returns:
        The same columns, of length 1 or 0.

    Example:
        >>> standardise(torch.tensor([[3.0, 1.0], [5.0, 5.0]])).tolist()
        [[0.7071067690849304, -0.7071067690849304], [0.0, 0.0]]
    """
    centred = columns - columns.mean(dim=1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    # Relative, since what is left of a constant is rounding, which grows with the constant.
    constant = norm <= 1e-6 * columns.norm(dim=1, keepdim=True)
    return (centred / norm).masked_fill(constant, 0.0)


def style_score(
    columns: Float[Tensor, "columns instances"],
    prototypes: Float[Tensor, "prototypes instances"],
) -> Float[Tensor, " columns"]:
    """How like a style each column is: q_d, the min-max over columns of ρ_d = max_k cos(c_d, μ_k).

    Our reconstruction, not in arXiv 2510.11175.

    Args:
        columns: c_d of one modality.
        prototypes: μ_k of the same modality, in the space of standardised columns.

    Returns:
        (D,) in [0, 1], fp32. Zeros if all columns are alike: nothing tells style from semantics.

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
    """Semantics as the complement of style: p_d = 1 - ½(q_d^vision + q_d^text).

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


def column_weights(probability: Float[Tensor, " columns"]) -> Float[Tensor, " columns"]:
    """Weights of mean 1, so that margins and temperatures keep their meaning: w_d = D·p_d / Σp.

    Args:
        probability: p (D,) in [0, 1]; all zero gives ones.

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
