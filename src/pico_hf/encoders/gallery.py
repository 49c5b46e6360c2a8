"""What a gallery's images look like to a tower, for its calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.calibration import StyleCalibration
from pico_hf.core.token_features import TokenFeatures
from pico_hf.encoders.inputs import image_inputs
from pico_hf.encoders.special_tokens import kept_prefix, patches_alone
from pico_hf.encoders.table import encoder_spec
from pico_hf.encoders.tokens import image_hidden_states


@torch.no_grad()
def calibration_of(
    encoder: PreTrainedModel,
    gallery: Iterable[Mapping[str, Tensor]] | None,
    reference: Iterable[Mapping[str, Tensor]] | None,
) -> StyleCalibration | None:
    """Brings the statistics of a gallery's hidden states to those of reference images.

    They are those of patches alone: few special tokens would blur them.

    Args:
        encoder: The dual encoder.
        gallery: Batches of images, see `PicoModel.calibrate`; None: no calibration.
        reference: Likewise.

    Raises:
        ValueError: If there is no reference, or if either is empty.
    """
    if gallery is None:
        return None
    if reference is None:
        raise ValueError(
            "`reference` must be batches of images like those of the training data, got None."
        )
    states = (
        (image_hidden_states(encoder, **image_inputs(batch, encoder.device)) for batch in side)
        for side in (gallery, reference)
    )
    return StyleCalibration.between(*states)


def calibrated(
    model: Any, hidden: TokenFeatures, calibration: StyleCalibration | None
) -> TokenFeatures:
    """Calibrates the patches of images; special tokens stay as they are, like the pooled state.

    Args:
        model: The [`PicoModel`] whose hidden states these are.
        hidden: Hidden states of images.
        calibration: From `calibration_of`; None: there is none.
    """
    if calibration is None:
        return hidden
    keep, row = model.config.keep_special_tokens, encoder_spec(model.encoder).image
    first = hidden.features[:, : len(kept_prefix(model.encoder, row, keep))]
    patches = calibration(patches_alone(model.encoder, row, hidden, keep))
    features = torch.cat([first, patches.features], dim=1) if first.shape[1] else patches.features
    return TokenFeatures(features, hidden.mask, hidden.pooled)
