"""The score of images and texts: weighted late interaction in both directions, with masks."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures
from pico_hf.kernels import fused_interaction
from pico_hf.kernels.interaction_gradient import (
    LateInteraction,
    refuse_second_derivative,
    token_gradients,
)
from pico_hf.kernels.late_interaction import Matches, fold, interact, working_type
from pico_hf.kernels.packing import Packing


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
    _check_widths(images, texts, column_weights)
    sides = images.features, images.mask, texts.features, texts.mask
    weights = None if column_weights is None else column_weights.detach()
    if torch.compiler.is_compiling():
        exporting = torch.compiler.is_exporting()
        score = _all_products if exporting else torch.ops.pico_hf.late_interaction
        return score(*sides, weights)
    _check_tokens(images, texts)
    features = images.features.contiguous(), texts.features.contiguous()
    if fused_interaction.applies(*features):
        return fused_interaction.score(*features, images.mask, texts.mask, weights)
    packings = Packing(images.mask), Packing(texts.mask)
    if torch.is_grad_enabled() and any(side.requires_grad for side in features):
        return LateInteraction.apply(*features, *packings, weights, progress)
    return interact(*features, *packings, weights, progress=progress)


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


def _all_products(
    image_features: Float[Tensor, "images patches D"],
    image_mask: Bool[Tensor, "images patches"],
    text_features: Float[Tensor, "texts words D"],
    text_mask: Bool[Tensor, "texts words"],
    weights: Float[Tensor, " D"] | None,
) -> Float[Tensor, "images texts"]:
    """The formula as it is written, in operators that every runtime knows."""
    dtype = working_type(image_features, text_features)
    patches, words = image_features.to(dtype), fold(text_features.to(dtype), weights)
    products = torch.einsum("ipd,twd->itpw", patches, words)
    padding = ~image_mask[:, None, :, None], ~text_mask[None, :, None, :]
    by_patch = products.masked_fill(padding[1], -torch.inf).amax(dim=3)
    by_word = products.masked_fill(padding[0], -torch.inf).amax(dim=2)
    by_patch = by_patch.masked_fill(padding[0].squeeze(3), 0.0).sum(dim=2)
    by_word = by_word.masked_fill(padding[1].squeeze(2), 0.0).sum(dim=2)
    return by_patch / image_mask.sum(dim=1).unsqueeze(1) + by_word / text_mask.sum(dim=1)


_SIDES = "Tensor image_features, Tensor image_mask, Tensor text_features, Tensor text_mask"


@torch.library.custom_op(
    "pico_hf::late_interaction", mutates_args=(), schema=f"({_SIDES}, Tensor? weights) -> Tensor"
)
def _scored(*inputs: Any) -> Tensor:
    """Scores inside a compiled graph."""
    image_features, image_mask, text_features, text_mask, weights = inputs
    sides = TokenFeatures(image_features, image_mask), TokenFeatures(text_features, text_mask)
    with torch.no_grad():
        return similarity(*sides, weights)


@_scored.register_fake
def _(image_features: Tensor, _: Tensor, text_features: Tensor, *__: Any) -> Tensor:
    dtype = working_type(image_features, text_features)
    return image_features.new_empty(len(image_features), len(text_features), dtype=dtype)


@torch.library.custom_op(
    "pico_hf::late_interaction_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, {_SIDES}, Tensor? weights) -> (Tensor, Tensor)",
)
def _gradients(gradient: Tensor, *inputs: Any) -> tuple[Tensor | None, Tensor | None]:
    """Gradients inside a compiled graph; maxima are found once more, since their number varies."""
    image_features, image_mask, text_features, text_mask, weights = inputs
    features = image_features.contiguous(), text_features.contiguous()
    packings = Packing(image_mask), Packing(text_mask)
    matches = Matches.empty(*packings)
    interact(*features, *packings, weights, matches)
    return token_gradients(gradient, *features, *packings, matches, weights)


@_gradients.register_fake
def _(_: Tensor, image_features: Tensor, __: Tensor, text_features: Tensor, *___: Any) -> Any:
    return (
        torch.empty_like(image_features, memory_format=torch.contiguous_format),
        torch.empty_like(text_features, memory_format=torch.contiguous_format),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *sides, ctx.weights = inputs
    ctx.save_for_backward(*sides)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    both = torch.ops.pico_hf.late_interaction_backward(gradient, *ctx.saved_tensors, ctx.weights)
    return both[0], None, both[1], None, None


_scored.register_autograd(_backward, setup_context=_keep)


def _check_widths(
    images: TokenFeatures, texts: TokenFeatures, column_weights: Tensor | None
) -> None:
    """Raise ValueError for inputs that do not fit each other."""
    width = images.features.shape[2]
    if column_weights is not None and column_weights.shape != (width,):
        raise ValueError(
            f"`column_weights` must be of shape ({width},), one per column, got "
            f"{tuple(column_weights.shape)}. Pass weights of this width."
        )
    if width != texts.features.shape[2]:
        raise ValueError(
            f"`texts` must be as wide as `images` ({width} columns), got "
            f"{texts.features.shape[2]}. Project both into one space."
        )
    if texts.features.device != images.features.device:
        raise ValueError(
            f"`texts` must be on the device of `images` ({images.features.device}), got "
            f"{texts.features.device}. Move one side with `.to(device)`."
        )


def _check_tokens(images: TokenFeatures, texts: TokenFeatures) -> None:
    """Raise ValueError for an image or text without tokens."""
    for name, tokens in (("images", images), ("texts", texts)):
        empty = (~tokens.mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"`{name}` must have at least one real token in every row, got none in rows "
                f"{empty[:5]}. Remove these rows or keep at least one token."
            )
