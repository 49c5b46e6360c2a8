"""Which entries of a batch belong to the image side and which to the text side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

IMAGE_INPUTS = (
    "pixel_values",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_hidden_states",
    "patch_mask",
    "image_pooled_state",
)
TEXT_INPUTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "word_mask",
    "text_hidden_states",
    "text_pooled_state",
)


def image_inputs(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What `PicoModel.encode_images` takes of a batch; empty if the batch has no images."""
    return {name: batch[name].to(device) for name in IMAGE_INPUTS if name in batch}


def text_inputs(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What `PicoModel.encode_texts` takes of a batch; empty if the batch has no texts."""
    return {name: batch[name].to(device) for name in TEXT_INPUTS if name in batch}
