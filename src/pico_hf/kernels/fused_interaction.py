"""The late interaction on a GPU: packs ragged tokens for the fused kernels and launches them."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pico_hf.kernels.interaction_gradient import refuse_second_derivative

SWITCH = "PICO_FUSED_KERNELS"
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORTEST, LONGEST = 16, 256  # words per text the kernels' tiles can take
TILE_ROWS = 128  # words multiplied at a time, of several short texts or a long one
TILE_PATCHES = 64
FORWARD_DEPTH, BACKWARD_DEPTH = 64, 128  # columns at a time
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def applies(image_features: Tensor, text_features: Tensor) -> bool:
    """Tell whether the fused kernels score these features: if asked for, on a GPU with triton.

    They were checked in Triton's interpreter only, so that the plain path is the default. Set
    `PICO_FUSED_KERNELS=1` to use them; `python benchmarks/gpu.py --check` compares both first.
    """
    return (
        os.environ.get(SWITCH) == "1"
        and image_features.device.type in DEVICES
        and image_features.dtype == text_features.dtype
        and image_features.dtype in DTYPES
        and image_features.shape[1] < 2**15
        and text_features.shape[1] <= LONGEST
        and min(len(image_features), len(text_features)) > 0
        and importlib.util.find_spec("triton") is not None
    )


def score(
    image_features: Float[Tensor, "images patches D"],
    text_features: Float[Tensor, "texts words D"],
    image_mask: Bool[Tensor, "images patches"],
    text_mask: Bool[Tensor, "texts words"],
    weights: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "images texts"]:
    """Score all pairs with the fused kernels; see `pico_hf.core.similarity.similarity`."""
    features = image_features, text_features
    indexed = torch.is_grad_enabled() and any(side.requires_grad for side in features)
    return FusedInteraction.apply(*features, image_mask, text_mask, weights, indexed)


@dataclass(frozen=True)
class Compact:
    """Items with their real tokens in front, padded to one length.

    Attributes:
        features: (n, length, D), contiguous; padding may hold anything.
        lengths: (n,) real tokens of each item.
        items: (n,) where each item stands in the batch.
        order: (n, kept) where each token stood in its item, of at most `length`.
    """

    features: Float[Tensor, "n length D"]
    lengths: Int[Tensor, " n"]
    items: Int[Tensor, " n"]
    order: Int[Tensor, "n kept"]

    @classmethod
    def of(
        cls,
        features: Float[Tensor, "all tokens D"],
        mask: Bool[Tensor, "all tokens"],
        items: Int[Tensor, " n"],
        length: int,
    ) -> Compact:
        """Take some items; `length` is at least their longest and may exceed `tokens`."""
        tokens = min(length, mask.shape[1])
        order = (~mask[items]).int().argsort(dim=1, stable=True)[:, :tokens]
        chosen = features[items.unsqueeze(1), order]
        chosen = torch.nn.functional.pad(chosen, (0, 0, 0, length - tokens))
        lengths = mask[items].sum(dim=1, dtype=torch.int32)
        return cls(chosen.contiguous(), lengths, items, order)

    def scatter(self, gradient: Float[Tensor, "n length D"], result: Tensor) -> None:
        """Write the gradient of every real token to its place in the batch."""
        gradient = gradient[:, : self.order.shape[1]]
        real = torch.arange(gradient.shape[1], device=gradient.device) < self.lengths.unsqueeze(1)
        places = self.items.unsqueeze(1).expand_as(self.order)[real], self.order[real]
        result[places] = gradient[real].to(result.dtype)


def buckets(features: Tensor, mask: Tensor) -> list[Compact]:
    """Group texts by length rounded up to a power of two, so that short ones pay for few words."""
    lengths = mask.sum(dim=1)
    found, low, high = [], 0, SHORTEST
    while low < mask.shape[1]:
        items = ((lengths > low) & (lengths <= high)).nonzero().flatten()
        if len(items):
            found.append(Compact.of(features, mask, items, high))
        low, high = high, 2 * high
    return found


class FusedInteraction(torch.autograd.Function):
    """Scores of all pairs; a maximum passes its gradient to its winner, the first one on ties."""

    @staticmethod
    def forward(
        ctx: Any,
        image_features: Float[Tensor, "images patches D"],
        text_features: Float[Tensor, "texts words D"],
        image_mask: Bool[Tensor, "images patches"],
        text_mask: Bool[Tensor, "texts words"],
        weights: Float[Tensor, " D"] | None,
        indexed: bool,
    ) -> Float[Tensor, "images texts"]:
        """Score all pairs; with a gradient to come, keep the positions of the maxima."""
        ctx.weights = weights
        ctx.shapes = image_features.shape, text_features.shape
        every = torch.arange(len(image_features), device=image_mask.device)
        ctx.images = Compact.of(image_features, image_mask, every, image_mask.shape[1])
        ctx.texts = buckets(_fold(text_features, weights), text_mask)
        scores = image_features.new_empty(
            len(image_features), len(text_features), dtype=torch.float32
        )
        ctx.matches = []
        for texts in ctx.texts:
            part, *matches = _score(ctx.images, texts, indexed)
            scores[:, texts.items] = part
            ctx.matches.append(matches)
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "images texts"]) -> tuple[Tensor | None, ...]:
        """Multiply with the winners' one-hot matrix, tile by tile."""
        refuse_second_derivative()
        images, dtype = ctx.images, ctx.images.features.dtype
        to_images = torch.zeros_like(images.features, dtype=torch.float32)
        to_texts = gradient.new_zeros(ctx.shapes[1], dtype=torch.float32)
        for texts, matches in zip(ctx.texts, ctx.matches, strict=True):
            incoming = gradient[:, texts.items].float().contiguous()
            if ctx.needs_input_grad[0]:
                _add_to_images(to_images, incoming, images, texts, matches)
            if ctx.needs_input_grad[1]:
                texts.scatter(_to_texts(incoming, images, texts, matches), to_texts)
        spread = torch.zeros_like(to_images)
        images.scatter(to_images, spread)
        return (
            spread.to(dtype) if ctx.needs_input_grad[0] else None,
            _fold(to_texts, ctx.weights).to(dtype) if ctx.needs_input_grad[1] else None,
            *(None,) * 4,  # masks, weights and the flag take no gradient
        )


def _fold(features: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply the columns; s[p, w] takes the weights on one side only."""
    return features if weights is None else (features * weights).to(features.dtype)


def _score(images: Compact, texts: Compact, indexed: bool) -> tuple[Tensor, Tensor, Tensor]:
    from pico_hf.kernels import fused_kernels

    (n, patches, width), (m, words, _) = images.features.shape, texts.features.shape
    device = images.features.device
    scores = torch.empty(n, m, device=device)
    shapes = ((m, n, patches), (n, m, words)) if indexed else ((1,), (1,))
    best_word = torch.empty(shapes[0], dtype=torch.uint8, device=device)
    best_patch = torch.empty(shapes[1], dtype=torch.int16, device=device)
    tile = _tile(texts, FORWARD_DEPTH)
    fused_kernels.forward[(n * -(-m // tile["TEXTS"]),)](
        images.features, texts.features, images.lengths, texts.lengths,
        scores, best_word, best_patch, n, m, patches, width, INDEXED=indexed, **tile,
    )  # fmt: skip
    return scores, best_word, best_patch


def _add_to_images(
    result: Tensor, gradient: Tensor, images: Compact, texts: Compact, matches: list[Tensor]
) -> None:
    from pico_hf.kernels import fused_kernels

    n, patches, width = images.features.shape
    grid = n * -(-patches // TILE_PATCHES), -(-width // BACKWARD_DEPTH)
    fused_kernels.gradient_to_images[grid](
        gradient, texts.features, images.lengths, texts.lengths, *matches, result,
        n, len(texts.lengths), patches, width, **_tile(texts, BACKWARD_DEPTH),
    )  # fmt: skip


def _to_texts(gradient: Tensor, images: Compact, texts: Compact, matches: list[Tensor]) -> Tensor:
    from pico_hf.kernels import fused_kernels

    n, patches, width = images.features.shape
    result = torch.zeros_like(texts.features, dtype=torch.float32)
    tile = _tile(texts, BACKWARD_DEPTH)
    grid = -(-len(texts.lengths) // tile["TEXTS"]), -(-width // BACKWARD_DEPTH)
    fused_kernels.gradient_to_texts[grid](
        gradient, images.features, images.lengths, texts.lengths, *matches, result,
        n, len(texts.lengths), patches, width, **tile,
    )  # fmt: skip
    return result


def _tile(texts: Compact, depth: int) -> dict[str, Any]:
    """How much one program multiplies, and how exactly: float32 as torch is set to, ieee unless."""
    words = texts.features.shape[1]
    return {
        "TEXTS": max(1, TILE_ROWS // words),
        "WORDS": words,
        "PATCHES": TILE_PATCHES,
        "DEPTH": depth,
        "PRECISION": PRECISIONS[torch.get_float32_matmul_precision()],
    }
