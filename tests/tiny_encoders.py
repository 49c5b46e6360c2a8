"""One tiny random encoder per architecture, each with a handful of widths and 32-pixel pictures."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
WORDS = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TEXT = {**SMALL, **WORDS, "max_position_embeddings": 64}
BERT = {**SMALL, "vocab_size": 20, "max_position_embeddings": 64}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
MAP = {  # three blocks of EfficientNet, 32 pixels to 4 × 4 cells
    "image_size": 32,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "kernel_sizes": [3, 3, 3],
    "in_channels": [32, 16, 16],
    "out_channels": [16, 16, 16],
    "strides": [2, 1, 2],
    "num_block_repeats": [1, 1, 1],
    "expand_ratios": [1, 2, 2],
    "hidden_dim": 64,
}
GROUPS = {
    **VISION,
    "num_hidden_layers": 3,
    "depths": [1, 1, 1],
    "num_group_tokens": [8, 4, 0],
    "num_output_groups": [8, 4, 4],
}


def _dual(name: str, text: dict, vision: dict, projection: int | None = 16, **more) -> Callable:
    """Builds `{name}Model` from the two towers' values."""
    common = {} if projection is None else {"projection_dim": projection}

    def build() -> PreTrainedModel:
        config = getattr(hf, f"{name}Config")
        values = {"text_config": dict(text), "vision_config": dict(vision), **common, **more}
        return getattr(hf, f"{name}Model")(config(**values))

    return build


def _pair(vision: Callable[[], PreTrainedConfig], text: type = hf.BertConfig) -> Callable:
    """Builds a VisionTextDualEncoder."""

    def build() -> PreTrainedModel:
        # Far more positions than words: RoBERTa's begin after the pad token's id.
        config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            vision(), text(**BERT, pad_token_id=0), projection_dim=16
        )
        return hf.VisionTextDualEncoderModel(config)

    return build


def _flava() -> PreTrainedModel:
    config = hf.FlavaConfig(
        image_config=dict(VISION),
        text_config=dict(BERT),
        multimodal_config=dict(SMALL),
        projection_dim=16,
        init_codebook=False,
    )
    return hf.FlavaModel(config)


def _blip_itm() -> PreTrainedModel:
    config = hf.BlipConfig(
        text_config={**TEXT, "encoder_hidden_size": 32},
        vision_config={**VISION, "initializer_range": 0.02},
        image_text_hidden_size=16,
    )
    return hf.BlipForImageTextRetrieval(config)


def _blip2() -> PreTrainedModel:
    config = hf.Blip2Config(
        vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={**BERT, "encoder_hidden_size": 32, "use_qformer_text_input": True},
        num_query_tokens=4,
        image_text_hidden_size=16,
    )
    model = hf.Blip2ForImageTextRetrieval(config)
    model.query_tokens.data.normal_(std=0.5)  # queries begin at zero, all alike
    return model


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": _dual("CLIP", TEXT, VISION),
    "metaclip-2": _dual("MetaClip2", TEXT, VISION),
    "clipseg": _dual("CLIPSeg", TEXT, VISION, extract_layers=[0], reduce_dim=8),
    "owlvit": _dual("OwlViT", TEXT, VISION),
    "owlv2": _dual("Owlv2", TEXT, VISION),
    "altclip": _dual("AltCLIP", {**BERT, "project_dim": 32, "pad_token_id": 0}, VISION),
    "chinese-clip": _dual("ChineseCLIP", BERT, VISION),
    "siglip": _dual("Siglip", TEXT, VISION, projection=None),
    "siglip2": _dual(
        "Siglip2", TEXT, {**SMALL, "patch_size": 8, "num_patches": 16}, projection=None
    ),
    "aimv2": _dual("Aimv2", {**TEXT, "num_attention_heads": 4}, VISION),
    "blip": _dual("Blip", TEXT, {**VISION, "initializer_range": 0.02}),
    "blip-itm": _blip_itm,
    "blip-2-itm": _blip2,
    "align": _dual("Align", BERT, MAP),
    "flava": _flava,
    "groupvit": _dual("GroupViT", TEXT, GROUPS, projection_intermediate_dim=24),
    "tipsv2": _dual("Tipsv2", TEXT, {**VISION, "num_register_tokens": 1}, projection=None),
    "vit+bert": _pair(lambda: hf.ViTConfig(**VISION)),
    "vit+roberta": _pair(lambda: hf.ViTConfig(**VISION), hf.RobertaConfig),
    "vit+xlm-roberta": _pair(lambda: hf.ViTConfig(**VISION), hf.XLMRobertaConfig),
    "deit+bert": _pair(lambda: hf.DeiTConfig(**VISION)),
    "swin+bert": _pair(lambda: hf.SwinConfig(**SWIN)),
    "swin+roberta": _pair(lambda: hf.SwinConfig(**SWIN), hf.RobertaConfig),
    "swinv2+bert": _pair(lambda: hf.Swinv2Config(**SWIN)),
    "dinov2+bert": _pair(lambda: hf.Dinov2Config(**VISION)),
    "dinov2+xlm-roberta": _pair(lambda: hf.Dinov2Config(**VISION), hf.XLMRobertaConfig),
    "dinov2-registers+bert": _pair(lambda: hf.Dinov2WithRegistersConfig(**VISION)),
    "dinov3+bert": _pair(lambda: hf.DINOv3ViTConfig(**VISION, num_register_tokens=2)),
    "beit+bert": _pair(
        lambda: hf.BeitConfig(
            **VISION, use_mean_pooling=True, use_absolute_position_embeddings=True
        )
    ),
    "clip-vision+bert": _pair(lambda: hf.CLIPVisionConfig(**VISION)),
}


def one_layer(encoder: PreTrainedModel) -> PreTrainedModel:
    """Cuts both towers of an encoder to one layer, in place: tracing takes half the time."""
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if name in ("layer", "layers") and isinstance(child, nn.ModuleList):
                module.set_submodule(name, child[:1])
        if hasattr(getattr(module, "config", None), "num_hidden_layers"):
            module.config.num_hidden_layers = 1
    return encoder
