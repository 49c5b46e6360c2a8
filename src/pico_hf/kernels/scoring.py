"""Scores of two sets of tokens by whatever kernel suits them.

Inside a compiled graph the score is one operator, inside an exported one the plain formula.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pico_hf.kernels import fused_interaction
from pico_hf.kernels.interaction_gradient import LateInteraction, token_gradients
from pico_hf.kernels.late_interaction import (
    Matches,
    fold,
    interact,
    refuse_second_derivative,
    working_type,
)
from pico_hf.kernels.packing import Packing


def score_tokens(
    image_features: Tensor,
    image_mask: Tensor,
    text_features: Tensor,
    text_mask: Tensor,
    weights: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """S (images, texts): on a GPU by fused kernels if they are wanted, with gradients if needed.

    Args:
        image_features: (images, patches, D).
        image_mask: (images, patches) True = real patch, at least one per image.
        text_features: (texts, words, D).
        text_mask: (texts, words) likewise.
        weights: (D,), None: all 1.
        progress: True shows a progress bar.
    """
    features = image_features.contiguous(), text_features.contiguous()
    if fused_interaction.applies(*features):
        return fused_interaction.score(*features, image_mask, text_mask, weights)
    packings = Packing(image_mask), Packing(text_mask)
    if torch.is_grad_enabled() and any(side.requires_grad for side in features):
        return LateInteraction.apply(*features, *packings, weights, progress)
    return interact(*features, *packings, weights, progress=progress)


def score_in_graph(*inputs: Any) -> Tensor:
    """S as `score_tokens` gives it, of a graph that is being compiled or exported."""
    exporting = torch.compiler.is_exporting()
    return all_products(*inputs) if exporting else torch.ops.pico_hf.late_interaction(*inputs)


def refuse_empty(name: str, mask: Tensor) -> None:
    """Raises for items without tokens, which have no score.

    Args:
        name: What the items are called in the error.
        mask: (n, tokens) True = real token.

    Raises:
        ValueError: If a row has no real token.
    """
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"`{name}` must have at least one real token in every row, got none in rows "
            f"{empty[:5]}. Remove these rows or keep at least one token."
        )


def all_products(
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
    """Scores inside a compiled graph, which cannot ask what is in a mask before it runs."""
    refuse_empty("images", inputs[1])
    refuse_empty("texts", inputs[3])
    with torch.no_grad():
        return score_tokens(*inputs)


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
