"""What a forward pass of the model gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from pico_hf.core.losses import contrastive_parts
from pico_hf.core.token_features import TokenFeatures


@dataclass
class PicoOutput(ModelOutput):
    """Output of [`PicoModel`].

    Attributes:
        loss: Training loss, a scalar; None unless the batch is a square of matched pairs and
            `return_loss=True`.
        logits_per_image: (images, texts) fp32, `exp(logit_scale)` times the score, plus the bias of
            encoders that have one. In training by several processes those of all of them.
        logits_per_text: (texts, images), the transpose.
        image_features: Token features of the images.
        text_features: Token features of the texts.
        loss_parts: What `loss` is the sum of, by its names in
            `pico_hf.core.losses.contrastive_parts`, without gradients; None where `loss` is.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_features: TokenFeatures | None = None
    text_features: TokenFeatures | None = None
    loss_parts: dict[str, torch.FloatTensor] | None = None


def pair_output(
    model: Any,
    images: TokenFeatures,
    texts: TokenFeatures,
    image_ids: Tensor | None = None,
    loss_ramp: float | None = None,
    scorer: Callable[[TokenFeatures, TokenFeatures], Tensor] | None = None,
    return_loss: bool = True,
) -> PicoOutput:
    """Scores token features and computes the loss if these are matched pairs, at least two.

    Args:
        model: A [`PicoModel`].
        images: From `encode_images`.
        texts: From `encode_texts`.
        image_ids: (images,) identities of what is scored; None = all different.
        loss_ramp: See `PicoModel.forward`.
        scorer: Gives other scores than `model.score`, such as those of a larger batch.
        return_loss: False computes no loss.
    """
    scores = (scorer or model.score)(images, texts)
    logits = model.pair_logits(scores)
    loss: Any = None
    parts: Any = None
    if return_loss and scores.shape[0] == scores.shape[1] > 1:
        options = {"margin": model.config.margin, "ramp": loss_ramp}
        terms = contrastive_parts(model.config.loss, scores, logits, image_ids, **options)
        loss = sum(terms.values())
        parts = {name: term.detach() for name, term in terms.items()}
    return PicoOutput(loss, logits, logits.t(), images, texts, parts)
