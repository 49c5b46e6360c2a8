"""What a forward pass of the model gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from pico_hf.core.token_features import TokenFeatures


@dataclass
class PicoOutput(ModelOutput):
    """Output of [`PicoModel`].

    Attributes:
        loss: Training loss, a scalar; None unless the batch is a square of matched pairs and
            `return_loss=True`.
        logits_per_image: (images, texts) fp32, `exp(logit_scale)` times the score, plus the bias of
            encoders that have one.
        logits_per_text: (texts, images), the transpose.
        image_features: Token features of the images.
        text_features: Token features of the texts.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_features: TokenFeatures | None = None
    text_features: TokenFeatures | None = None
