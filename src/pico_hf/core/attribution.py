"""Where the score of one image and one text comes from: patches, words and columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures


@dataclass(frozen=True)
class Attribution:
    """The products that a score is made of, and its parts by patch, by word and by column.

    Special tokens that take part are among them: those of the image come before its patches.

    Attributes:
        products: s[p, w] = Σ_d w_d · V[p, d] · T[w, d] (patches, words), float64.
        best_words: (patches,) the word that each patch matches best, the first of equals.
        best_patches: (words,) the patch that each word matches best, the first of equals.
        columns: (D,) what each column adds to the score; they sum to it.
        pooled: What the pooled vectors of the whole image and text add to it.
        tokens_share: 1 - m, how much of the score the tokens are.
    """

    products: Float[Tensor, "patches words"]
    best_words: Int[Tensor, " patches"]
    best_patches: Int[Tensor, " words"]
    columns: Float[Tensor, " D"]
    pooled: float = 0.0
    tokens_share: float = 1.0

    @property
    def patches(self) -> Float[Tensor, " patches"]:
        """What each patch adds to the score: (1 - m) · max_w s[p, w] / patches."""
        return self.tokens_share * self.products.amax(dim=1) / self.products.shape[0]

    @property
    def words(self) -> Float[Tensor, " words"]:
        """What each word adds to the score: (1 - m) · max_p s[p, w] / words."""
        return self.tokens_share * self.products.amax(dim=0) / self.products.shape[1]

    @property
    def score(self) -> float:
        """(1 - m) · S + m · cos, the sum of all kinds of parts."""
        return float(self.patches.sum() + self.words.sum()) + self.pooled


def attribute(
    image: TokenFeatures,
    text: TokenFeatures,
    column_weights: Float[Tensor, " D"] | None = None,
    pooled_share: float = 0.0,
) -> Attribution:
    """Takes the score of one pair apart.

    Every maximum of S is one product s[p, w], which is a sum over columns. So
    S = Σ_d w_d · (mean_p V[p, d] · T[w*(p), d] + mean_w V[p*(w), d] · T[w, d]),
    where w*(p) and p*(w) won the maxima: column d adds its summand. So it does to the cosine of the
    pooled vectors a and b: w_d · a_d · b_d / √(Σ_d w_d a_d² · Σ_d w_d b_d²).

    Args:
        image: Patches of one image.
        text: Words of one text, as wide as `image`.
        column_weights: (D,) weights of mean 1; None weighs all columns by one.
        pooled_share: m, how much of the score the pooled vectors are.

    Returns:
        The parts, of real tokens only, in float64 on the CPU.

    Raises:
        ValueError: If there are several images or texts.

    Example:
        >>> eye = torch.eye(2).unsqueeze(0)
        >>> image = TokenFeatures(eye, torch.tensor([[True, True]]))
        >>> text = TokenFeatures(eye, torch.tensor([[True, False]]))
        >>> parts = attribute(image, text, torch.tensor([0.5, 1.5]))  # patches: 1/4, words: 1/2
        >>> parts.columns.tolist(), parts.score
        ([0.75, 0.0], 0.75)
    """
    if len(image) != 1 or len(text) != 1:
        raise ValueError(
            f"`image` and `text` must be one each, got {len(image)} and {len(text)}. Select one "
            "with tokens[row : row + 1]."
        )
    patches, words = (side.features[side.mask].detach().cpu().double() for side in (image, text))
    weights = torch.ones(patches.shape[1]) if column_weights is None else column_weights
    weighted = words * weights.detach().cpu().double()
    products = patches @ weighted.T
    best_words, best_patches = products.argmax(dim=1), products.argmax(dim=0)
    by_patch = (patches * weighted[best_words]).mean(dim=0)
    by_word = (patches[best_patches] * weighted).mean(dim=0)
    pooled = _pooled_columns(image, text, weights.detach().cpu().double(), pooled_share)
    columns = (1 - pooled_share) * (by_patch + by_word) + pooled
    best = best_words, best_patches
    return Attribution(products, *best, columns, float(pooled.sum()), 1 - pooled_share)


def _pooled_columns(
    image: TokenFeatures, text: TokenFeatures, weights: Tensor, share: float
) -> Float[Tensor, " D"]:
    """What each column adds to m · cos."""
    if share == 0.0:
        return torch.zeros_like(weights)
    sides = []
    for side in (image, text):
        assert side.pooled is not None  # `encode_images` and `encode_texts` give them
        sides.append(side.pooled[0].detach().cpu().double() * weights.sqrt())
    first, second = (torch.nn.functional.normalize(side, dim=0) for side in sides)
    return share * first * second
