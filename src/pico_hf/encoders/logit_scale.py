"""The scale and bias that an encoder was trained with, and whether it was trained at all."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from pico_hf.core.losses import START_SCALE
from pico_hf.encoders.table import FALLBACK, encoder_spec


def logit_scale(encoder: PreTrainedModel) -> tuple[float, float | None]:
    """(logarithm of the encoder's scale of cosines, its bias or None).

    An encoder without a scale gets that of `pico_hf.core.losses.START_SCALE`, which is for scores
    that range twice as far as cosines.
    """
    spec = encoder_spec(encoder)
    start = math.log(2 * START_SCALE)
    scale = getattr(encoder, spec.logit_scale).item() if spec.logit_scale else start
    if spec.temperature:
        scale = -math.log(getattr(encoder, spec.temperature).item())
    return scale, getattr(encoder, spec.logit_bias).item() if spec.logit_bias else None


def trusted_share(encoder: PreTrainedModel) -> float:
    """How much of the score the encoder's own pooled features are before anything is known of them.

    1 for an encoder that was trained on them, as contrastive pretraining does, so that it ranks as
    it did before it was wrapped. 0 for projections that are newly drawn: learned ones of
    `fallback_projection`, and those of two towers that were joined and not trained since. That is
    seen from the scale of their logits: it is learned in any contrastive training, and is still
    exactly what such a pair begins with.

    Args:
        encoder: A dual encoder, with its projections.
    """
    if hasattr(encoder, FALLBACK):
        return 0.0
    spec = encoder_spec(encoder)
    first = getattr(encoder.config, "logit_scale_init_value", None)
    if not spec.joined or not spec.logit_scale or first is None:
        return 1.0
    scale = getattr(encoder, spec.logit_scale).detach()
    return 0.0 if bool(scale == torch.tensor(first).to(scale)) else 1.0
