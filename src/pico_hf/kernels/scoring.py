"""Scores of two sets of tokens by whatever kernel suits them."""

from __future__ import annotations

import torch
from torch import Tensor

from pico_hf.kernels import fused_interaction
from pico_hf.kernels.interaction_gradient import LateInteraction
from pico_hf.kernels.late_interaction import interact
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
