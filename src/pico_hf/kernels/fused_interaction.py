"""The late interaction by fused Triton kernels, for GPUs: packs the tokens, launches the kernels.

The kernels have been tested in Triton's interpreter but not on a GPU, so they are off unless the
environment variable `PICO_FUSED_KERNELS` is 1.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pico_hf.kernels.late_interaction import refuse_second_derivative

SWITCH = "PICO_FUSED_KERNELS"  # name of the environment variable
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORTEST, LONGEST = 16, 256  # words per text that a tile of the kernels can hold
TILE_ROWS = 128  # words multiplied at a time, from several short texts or from one long text
TILE_PATCHES = 64
FORWARD_DEPTH, BACKWARD_DEPTH = 64, 128  # columns at a time
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def applies(image_features: Tensor, text_features: Tensor) -> bool:
    """Tell whether the fused kernels are switched on and can score these features.

    The environment variable `PICO_FUSED_KERNELS` switches them on: 1, true, yes or on. It is read
    at every call. Without it, or if the features do not fit, plain torch operations give the score,
    on a GPU as on a CPU.

    Args:
        image_features: (images, patches, D), at most 32,767 patches.
        text_features: (texts, words, D), at most 256 words.

    Returns:
        True if the kernels are switched on, triton is installed, and both sides are on a GPU, not
        empty and of one dtype: float32, bfloat16 or float16.
    """
    return (
        requested()
        and image_features.device.type in DEVICES
        and image_features.dtype == text_features.dtype
        and image_features.dtype in DTYPES
        and image_features.shape[1] < 2**15
        and text_features.shape[1] <= LONGEST
        and min(len(image_features), len(text_features)) > 0
        and importlib.util.find_spec("triton") is not None
    )


def requested() -> bool:
    """Tell whether the environment variable `PICO_FUSED_KERNELS` switches the kernels on."""
    return os.environ.get(SWITCH, "").strip().lower() in {"1", "true", "yes", "on"}


def score(
    image_features: Float[Tensor, "images patches D"],
    text_features: Float[Tensor, "texts words D"],
    image_mask: Bool[Tensor, "images patches"],
    text_mask: Bool[Tensor, "texts words"],
    weights: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "images texts"]:
    """Score all pairs with the fused kernels.

    The arguments are those of `pico_hf.core.similarity.similarity`, without padding checks.
    """
    features = image_features, text_features
    indexed = torch.is_grad_enabled() and any(side.requires_grad for side in features)
    return FusedInteraction.apply(*features, image_mask, text_mask, weights, indexed)


@dataclass(frozen=True)
class Compact:
    """Images or texts of a batch with their real tokens first, padded to one length.

    Attributes:
        features: (n, length, D), contiguous; padding may hold any value.
        lengths: (n,) number of real tokens of each item.
        items: (n,) index of each item in the batch.
        order: (n, kept) index of each token in its item; kept <= length.
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
        """Select items and pad them to `length`, at least the number of tokens of the longest."""
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
    """Group texts by length, rounded up to a power of two, so that groups have little padding."""
    lengths = mask.sum(dim=1)
    found, low, high = [], 0, SHORTEST
    while low < mask.shape[1]:
        items = ((lengths > low) & (lengths <= high)).nonzero().flatten()
        if len(items):
            found.append(Compact.of(features, mask, items, high))
        low, high = high, 2 * high
    return found


class FusedInteraction(torch.autograd.Function):
    """Scores of all pairs; the gradient of a maximum goes to its token, the first one of a tie."""

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
        """Score all pairs; if `indexed`, keep the positions of the maxima for the gradient."""
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
        """Return the gradients of both features from the kept positions of the maxima."""
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
    """Multiply the columns of one side by the weights; s[p, w] contains them once."""
    if weights is None:
        return features
    return (features * weights.to(features.device)).to(features.dtype)


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
    """Return the tile sizes of a kernel and the precision of float32 products set in torch."""
    words = texts.features.shape[1]
    return {
        "TEXTS": max(1, TILE_ROWS // words),
        "WORDS": words,
        "PATCHES": TILE_PATCHES,
        "DEPTH": depth,
        "PRECISION": PRECISIONS[torch.get_float32_matmul_precision()],
    }
