"""Tiny encoders, processors and pictures, all built in memory: no test needs a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderProcessor,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tiny_encoders import BUILDERS

WORDS = ["red", "green", "blue", "white", "big", "small", "square", "disc", "a", "on"]


# One architecture per way to pool, to mask and to attend; the others vary these.
DISTINCT = (
    *("clip", "siglip", "siglip2", "aimv2", "blip", "blip-2-itm", "align", "flava", "groupvit"),
    *("tipsv2", "vit+bert", "swin+roberta", "dinov2-registers+bert"),
)


def every(names: list[str], *marks: Any) -> list:
    """Architectures as parameters; those that only vary others are for `make test-all`."""
    return [
        pytest.param(name, marks=[*marks, *([] if name in DISTINCT else [pytest.mark.exhaustive])])
        for name in names
    ]


def tiny_clip() -> CLIPModel:
    return BUILDERS["clip"]()


def tiny_encoder(name: str = "clip", seed: int = 0) -> PreTrainedModel:
    """A randomly initialised encoder in eval mode."""
    torch.manual_seed(seed)
    return BUILDERS[name]().eval()


def tiny_refined(encoder: str = "clip", seed: int = 0, **knobs):
    """A wrapped tiny encoder whose column weights are not uniform."""
    from pico_hf import PicoModel

    knobs = {"num_prototypes": 3, "probe_size": 3, "pooled_share": 0.0, **knobs}
    model = PicoModel.from_encoder(tiny_encoder(encoder, seed), **knobs)
    refine_on_tiny_inputs(model)
    return model


@torch.no_grad()
def refine_on_tiny_inputs(model) -> None:
    """Gives a model the column weights of the tiny inputs."""
    inputs = tiny_inputs()
    images = model.encode_images(inputs["pixel_values"])
    refine(model, images, model.encode_texts(inputs["input_ids"], inputs["attention_mask"]))


def refine(model, images, texts) -> None:
    """Gives a model the column weights of matched pairs, as a trainer does without training."""
    from pico_hf.core.construction import construct
    from pico_hf.core.estimators import ESTIMATORS
    from pico_hf.core.state import SOURCES

    names = model.prototypes.estimators
    names = [name for name in names if SOURCES[name] == "end"] or names
    construct(model.prototypes, [ESTIMATORS[n] for n in names], GivenPairs(images, texts))


@dataclass(frozen=True)
class GivenPairs:
    """Encoded pairs, row r of the images belonging to row r of the texts."""

    images: Any
    texts: Any

    def probe(self):
        yield self.images, self.texts

    def moments(self):
        from pico_hf.core.moments import TokenMoments
        from pico_hf.core.pair_moments import PairMoments

        sides = [TokenMoments.of([side]) for side in (self.images, self.texts)]
        return PairMoments(*sides, torch.arange(len(self.texts)))


def tiny_inputs(batch: int = 3, words: int = 5, encoder: str = "clip") -> dict[str, torch.Tensor]:
    """Random pictures and texts `BOS … EOS pad` of different lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 13, (batch, words + 2), generator=generator)
    mask = torch.ones_like(ids)
    ids[:, 0] = 1
    for row in range(batch):
        end = words + 1 - row % 3
        ids[row, end:] = 2
        mask[row, end + 1 :] = 0
    texts = {"input_ids": ids, "attention_mask": mask}
    if encoder == "siglip2":
        return {**naflex_images([(4, 4), (2, 3), (5, 3)] * batch, batch), **texts}
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator), **texts}


def naflex_images(
    grids: list[tuple[int, int]], batch: int, padding: int = 0
) -> dict[str, torch.Tensor]:
    """Random pictures of 8-pixel patches, one grid each, padded to the longest and then some."""
    shapes = torch.tensor(grids[:batch])
    lengths = shapes.prod(dim=1)
    longest = int(lengths.max())
    pixels = torch.randn(batch, longest, 3 * 8 * 8, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest + padding) < lengths.unsqueeze(1)).long()
    more = torch.zeros(batch, padding, 3 * 8 * 8)
    pixels = torch.cat([pixels, more], dim=1) * mask.unsqueeze(-1)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def tiny_processor(encoder: str = "clip") -> VisionTextDualEncoderProcessor:
    """A word-level tokenizer with BOS 1, EOS = pad 2, and pictures as the encoder takes them."""
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
    if encoder == "siglip2":
        images = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20)
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
