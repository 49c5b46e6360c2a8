"""Features of images alone and of texts alone, for encoders that have no method for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


def blip_itm_image_features(
    encoder: PreTrainedModel, pixel_values: Tensor, **inputs: Any
) -> BaseModelOutputWithPooling:
    """Patches of BLIP's matching model and the projection of CLS, as its `forward` has them."""
    hidden = encoder.vision_model(pixel_values=pixel_values, **inputs).last_hidden_state
    return BaseModelOutputWithPooling(hidden, encoder.vision_proj(hidden[:, 0]))


def blip_itm_text_features(
    encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
) -> BaseModelOutputWithPooling:
    """Words of BLIP's matching model without cross-attention, and the projection of CLS."""
    out = encoder.text_encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs)
    hidden = out.last_hidden_state
    return BaseModelOutputWithPooling(hidden, encoder.text_proj(hidden[:, 0]))


def blip2_image_features(
    encoder: PreTrainedModel, pixel_values: Tensor, **inputs: Any
) -> BaseModelOutputWithPooling:
    """The Q-Former's queries over an image; every one of them is projected, none is pooled."""
    seen = encoder.vision_model(pixel_values=pixel_values, **inputs).last_hidden_state
    hidden = encoder.qformer(
        query_embeds=encoder.query_tokens.expand(seen.shape[0], -1, -1),
        encoder_hidden_states=seen,
    ).last_hidden_state
    hidden = hidden.to(encoder.vision_projection.weight.dtype)
    return BaseModelOutputWithPooling(hidden, encoder.vision_projection(hidden))


def blip2_text_features(
    encoder: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> BaseModelOutputWithPooling:
    """Words from the Q-Former without an image, and the projection of CLS.

    The tokenizer's ids as they are: BLIP-2's own processor puts image placeholders before them.
    """
    words = encoder.embeddings(input_ids=input_ids, position_ids=position_ids)
    hidden = encoder.qformer(
        query_embeds=words, query_length=0, attention_mask=attention_mask
    ).last_hidden_state
    hidden = hidden.to(encoder.text_projection.weight.dtype)
    return BaseModelOutputWithPooling(hidden, encoder.text_projection(hidden[:, 0]))


def naflex_dummy_images(encoder: PreTrainedModel) -> dict[str, Tensor]:
    """Two images of 2 × 2 patches, which NaFlex towers take as sequences."""
    config = encoder.config.vision_config
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 4, config.num_channels * config.patch_size**2, generator=generator)
    return {
        "pixel_values": pixels.to(encoder.device, encoder.dtype),
        "pixel_attention_mask": torch.ones(2, 4, dtype=torch.long, device=encoder.device),
        "spatial_shapes": torch.full((2, 2), 2, device=encoder.device),
    }


def causal_text_features(
    encoder: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
) -> Any:
    """Text features of a tower that is causal only under a mask that hides something (AIMv2)."""
    if attention_mask is not None:
        tokens = input_ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=input_ids.device).tril()
        # A text alone has nothing to hide, and would be read in both directions.
        seen = causal & attention_mask.bool()[:, None, None, :]
        # As numbers: eager attention adds a mask, and would add True as 1.
        least = torch.finfo(encoder.dtype).min
        attention_mask = torch.zeros_like(seen, dtype=encoder.dtype).masked_fill(~seen, least)
    return encoder.get_text_features(input_ids=input_ids, attention_mask=attention_mask, **inputs)
