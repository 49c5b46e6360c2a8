"""What a gallery's images look like to a tower, for its calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.calibration import StyleCalibration
from pico_hf.encoders.inputs import image_inputs
from pico_hf.encoders.tokens import image_hidden_states


@torch.no_grad()
def calibration_of(
    encoder: PreTrainedModel,
    gallery: Iterable[Mapping[str, Tensor]] | None,
    reference: Iterable[Mapping[str, Tensor]] | None,
) -> StyleCalibration | None:
    """Brings the statistics of a gallery's hidden states to those of reference images.

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
