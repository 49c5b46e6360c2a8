"""The scale and bias that an encoder was trained with, whatever it calls them."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from pico_hf.encoders.table import encoder_spec


def logit_scale(encoder: PreTrainedModel) -> tuple[float, float | None]:
    """(logarithm of the encoder's scale, its bias or None); 0 where there is no scale."""
    spec = encoder_spec(encoder)
    scale = getattr(encoder, spec.logit_scale).item() if spec.logit_scale else 0.0
    if spec.temperature:
        scale = -math.log(getattr(encoder, spec.temperature).item())
    return scale, getattr(encoder, spec.logit_bias).item() if spec.logit_bias else None
