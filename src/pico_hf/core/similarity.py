"""The score of images and texts: weighted late interaction in both directions, with masks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures
from pico_hf.kernels.scoring import refuse_empty, score_in_graph, score_tokens


def similarity(
    images: TokenFeatures,
    texts: TokenFeatures,
    column_weights: Float[Tensor, " D"] | None = None,
    progress: bool = False,
) -> Float[Tensor, "images texts"]:
    """Score every image against every text by weighted late interaction in both directions.

    S = mean_p max_w s[p, w] + mean_w max_p s[p, w] with s[p, w] = Σ_d w_d · V[p, d] · T[w, d]
    (arXiv 2510.11175). Padding takes part in neither the maxima nor the means. The environment
    variable `PICO_FUSED_KERNELS=1` switches on Triton kernels for features on a GPU; see
    `pico_hf.kernels.fused_interaction.applies`. `torch.set_float32_matmul_precision` sets the
    precision of float32 products on a GPU.

    In a compiled graph the score is one operator, which does what it does without compiling; its
    backward scores once more. An exported graph, which has to run without this package, holds the
    plain formula and with it all products at once.

    Args:
        images: Patches of the images.
        texts: Words of the texts, as wide as `images`.
        column_weights: (D,) weights of mean 1; no gradient flows to them.
        progress: Show a progress bar, for large galleries.

    Returns:
        Scores, in [-2, 2] without weights; float64 for float64 features, else float32.
        Differentiable once in both features; the gradient goes to the first of tied tokens.

    Raises:
        ValueError: If the two sides differ in width or device, `column_weights` has another shape
            than (D,), or an image or text has no real token.
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
    sides = {"images": images, "texts": texts}
    _check_widths(sides, column_weights)
    return _scores(sides, column_weights, progress)


def same_side_similarity(
    queries: TokenFeatures,
    targets: TokenFeatures,
    column_weights: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "queries targets"]:
    """Score images against images, or texts against texts, by the cosines of weighted tokens.

    S as in [`similarity`], with s[p, q] = Σ_d w_d · a_d · b_d / (‖a‖ ‖b‖), ‖a‖² = Σ_d w_d · a_d²
    (our reconstruction, not in arXiv 2510.11175, which scores images against texts only). Both
    sides must be in the same columns: where each side of a model has a basis of its own, those of
    one side. So scores are symmetric, and nothing scores higher than an item with itself: 2. The
    products of [`similarity`] would favour targets that are long in the weighted columns.

    Args:
        queries: Tokens of some images (or texts).
        targets: Tokens of images (or texts) in the same columns.
        column_weights: (D,) weights >= 0, of mean 1 by convention; no gradient flows to them. None:
            all equal.

    Returns:
        Scores in [-2, 2], differentiable in both features. A token that has nothing in columns of
        positive weight has cosine 0 with every other.

    Raises:
        ValueError: See [`similarity`]; also if a weight is negative.

    Example:
        >>> ends = torch.tensor([[[0.6, 0.8]], [[0.8, -0.6]]])
        >>> images = TokenFeatures(ends, torch.tensor([[True], [True]]))
        >>> same_side_similarity(images, images).round(decimals=4).abs().tolist()
        [[2.0, 0.0], [0.0, 2.0]]
        >>> same_side_similarity(images, images, torch.tensor([2.0, 0.0])).tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    sides = {"queries": queries, "targets": targets}
    _check_widths(sides, column_weights)
    if column_weights is not None and bool((column_weights < 0).any()):
        raise ValueError(
            "`column_weights` must be >= 0 to measure a token's length, got a minimum of "
            f"{float(column_weights.min()):.4g}. Pass weights of a semantic probability."
        )
    return _scores({name: _weighted_unit(side, column_weights) for name, side in sides.items()})


def _weighted_unit(tokens: TokenFeatures, weights: Tensor | None) -> TokenFeatures:
    """Tokens with columns times √w, of length 1: their products are weighted cosines."""
    features = tokens.features
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if weights is not None:
        features = features * weights.detach().to(features).sqrt()
    return TokenFeatures(torch.nn.functional.normalize(features, dim=-1), tokens.mask)


def weighted_score(
    images: TokenFeatures,
    texts: TokenFeatures,
    column_weights: Float[Tensor, " D"] | None = None,
    pooled_share: float = 0.0,
) -> Float[Tensor, "images texts"]:
    """(1 - m) · S + m · cos: the score of tokens and that of pooled vectors, in the same columns.

    Args:
        images: Patches, and pooled vectors unless m is 0.
        texts: Likewise.
        column_weights: (D,) weights of mean 1.
        pooled_share: m, in [0, 1].
    """
    if pooled_share == 0.0:
        return similarity(images, texts, column_weights)
    pooled = pooled_similarity(images, texts, column_weights)
    if pooled_share == 1.0:
        return pooled
    return (1 - pooled_share) * similarity(images, texts, column_weights) + pooled_share * pooled


def pooled_similarity(
    images: TokenFeatures,
    texts: TokenFeatures,
    column_weights: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "images texts"]:
    """The cosine of every image's and every text's pooled vector in weighted columns.

    cos = Σ_d w_d a_d b_d / √(Σ_d w_d a_d² · Σ_d w_d b_d²): what a plain dual encoder ranks by, for
    equal weights. Our addition, not in arXiv 2510.11175.

    Args:
        images: With pooled vectors.
        texts: Likewise, as wide as `images`.
        column_weights: (D,) weights; None: equal ones.

    Returns:
        In [-1, 1], fp32 (fp64 stays).

    Raises:
        ValueError: If either side has no pooled vectors.

    Example:
        >>> def item(vector):
        ...     mask = torch.ones(1, 1, dtype=torch.bool)
        ...     return TokenFeatures(torch.zeros(1, 1, 2), mask, torch.tensor([vector]))
        >>> image, text = item([0.6, 0.8]), item([0.6, -0.8])  # the second column is style
        >>> pooled_similarity(image, text, torch.tensor([2.0, 0.0])).tolist()
        [[1.0]]
    """
    sides = []
    for name, tokens in (("images", images), ("texts", texts)):
        if tokens.pooled is None:
            raise ValueError(
                f"`{name}` must have pooled vectors, got tokens alone. Encode them with "
                "`PicoModel.encode_images` and `encode_texts`, or score with `pooled_share=0`."
            )
        kind = torch.promote_types(tokens.pooled.dtype, torch.float32)
        pooled = tokens.pooled.to(kind)
        if column_weights is not None:
            pooled = pooled * column_weights.detach().to(pooled).sqrt()
        sides.append(torch.nn.functional.normalize(pooled, dim=-1))
    return sides[0] @ sides[1].t()


def _scores(
    sides: dict[str, TokenFeatures], column_weights: Tensor | None = None, progress: bool = False
) -> Float[Tensor, "images texts"]:
    weights = None if column_weights is None else column_weights.detach()
    first, second = sides.values()
    inputs = first.features, first.mask, second.features, second.mask
    if torch.compiler.is_compiling():
        return score_in_graph(*inputs, weights)
    for name, tokens in sides.items():
        refuse_empty(name, tokens.mask)
    return score_tokens(*inputs, weights, progress)


def _check_widths(sides: dict[str, TokenFeatures], column_weights: Tensor | None) -> None:
    """Raise ValueError for inputs that do not fit each other, by the names of `sides`."""
    (left, first), (right, second) = sides.items()
    width = first.features.shape[2]
    if column_weights is not None and column_weights.shape != (width,):
        raise ValueError(
            f"`column_weights` must be of shape ({width},), one per column, got "
            f"{tuple(column_weights.shape)}. Pass weights of this width."
        )
    if width != second.features.shape[2]:
        raise ValueError(
            f"`{right}` must be as wide as `{left}` ({width} columns), got "
            f"{second.features.shape[2]}. Project both into one space."
        )
    if second.features.device != first.features.device:
        raise ValueError(
            f"`{right}` must be on the device of `{left}` ({first.features.device}), got "
            f"{second.features.device}. Move one side with `.to(device)`."
        )
