"""The scale and bias that an encoder was trained with, whatever it calls them."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from pico_hf.core.losses import START_SCALE
from pico_hf.encoders.table import encoder_spec


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
