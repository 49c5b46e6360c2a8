"""Tiny encoders, processors and pictures, all built in memory: no test needs a network."""

from __future__ import annotations

import datasets
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    Swinv2Config,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
WORDS = ["red", "green", "blue", "white", "big", "small", "square", "disc", "a", "on"]


def tiny_clip() -> CLIPModel:
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 32, "eos_token_id": 2}
    text |= {"bos_token_id": 1, "pad_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def tiny_siglip() -> SiglipModel:
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 64, "pad_token_id": 2}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))


def _pair(vision) -> VisionTextDualEncoderModel:
    text = BertConfig(**SMALL, vocab_size=20)
    return VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    )


BUILDERS = {
    "clip": tiny_clip,
    "siglip": tiny_siglip,
    "vit+bert": lambda: _pair(ViTConfig(**VISION)),
    "deit+bert": lambda: _pair(DeiTConfig(**VISION)),
    "swin+bert": lambda: _pair(SwinConfig(**SWIN)),
    "swinv2+bert": lambda: _pair(Swinv2Config(**SWIN)),
    "dinov2+bert": lambda: _pair(Dinov2Config(**VISION)),
    "dinov2-registers+bert": lambda: _pair(Dinov2WithRegistersConfig(**VISION)),
    "clip-vision+bert": lambda: _pair(CLIPVisionConfig(**VISION)),
}


def tiny_encoder(name: str = "clip", seed: int = 0) -> PreTrainedModel:
    """A randomly initialised encoder in eval mode."""
    torch.manual_seed(seed)
    return BUILDERS[name]().eval()


def tiny_refined(encoder: str = "clip", seed: int = 0, **knobs):
    """A wrapped tiny encoder whose column weights are not uniform."""
    from pico_hf import PicoModel
    from pico_hf.semantic import column_statistics

    knobs = {"num_prototypes": 3, "probe_size": 3, **knobs}
    model = PicoModel.from_encoder(tiny_encoder(encoder, seed), **knobs)
    inputs = tiny_inputs()
    with torch.no_grad():
        images = model.encode_images(inputs["pixel_values"])
        texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
        model.prototypes.refine(column_statistics(images, texts))
    return model


def tiny_inputs(batch: int = 3, words: int = 5) -> dict[str, torch.Tensor]:
    """Random pictures and texts `BOS … EOS pad` of different lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 13, (batch, words + 2), generator=generator)
    mask = torch.ones_like(ids)
    ids[:, 0] = 1
    for row in range(batch):
        end = words + 1 - row % 3
        ids[row, end:] = 2
        mask[row, end + 1 :] = 0
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


def tiny_processor() -> VisionTextDualEncoderProcessor:
    """A word-level tokenizer with BOS 1, EOS = pad 2, and 32-pixel pictures."""
    vocab = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[BOS]",
        eos_token="[EOS]",
        pad_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=16,
    )
    images = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return VisionTextDualEncoderProcessor(images, fast)


def tiny_rows(images: int = 24, captions: int = 2) -> datasets.Dataset:
    """Pictures of one colour with captions that name it and its brightness."""
    colours = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
    rows: dict[str, list] = {"image": [], "captions": []}
    for number in range(images):
        name, channels = list(colours.items())[number % 4]
        level = 60 + 8 * number % 190
        rows["image"].append(Image.new("RGB", (32, 32), tuple(level * c for c in channels)))
        size = "big" if level > 128 else "small"
        rows["captions"].append([f"a {size} {name} square", f"{name} disc"][:captions])
    features = datasets.Features(
        {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    )
    return datasets.Dataset.from_dict(rows, features=features)
