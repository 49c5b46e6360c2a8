"""A small CLIP pretrained on the embedded drawings by its own loss on pooled embeddings."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderProcessor,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

DRAWINGS = Path(__file__).parents[1] / "examples" / "data" / "emoji-styles" / "train.parquet"
WIDTH = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIDE, PATCH, HELD_OUT, EPOCHS, BATCH, RATE = 32, 8, 1000, 16, 128, 3e-3


@cache
def drawings() -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows that the encoder is pretrained on, and one row each of most of their concepts."""
    rows = datasets.load_dataset("parquet", data_files=str(DRAWINGS), split="train")
    order = random.Random(0).sample(range(len(rows)), len(rows))
    concepts = rows["concept"]
    first = {concepts[row]: row for row in order}
    kept = set(list(first.values())[:HELD_OUT])
    return rows.select([row for row in order if row not in kept]), rows.select(sorted(kept))


@cache
def word_processor() -> VisionTextDualEncoderProcessor:
    """Words as tokens, BOS 1, EOS 2, pad 0; pictures of 32 pixels."""
    words = sorted({word for row in drawings()[0]["caption"] for word in row.lower().split()})
    vocab = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3}
    vocab |= {word: number + 4 for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    names = {"pad": "[PAD]", "bos": "[BOS]", "eos": "[EOS]", "unk": "[UNK]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=24,
        **{f"{name}_token": token for name, token in names.items()},
    )
    images = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_convert_rgb=True)
    return VisionTextDualEncoderProcessor(images, fast)


def inputs_of(rows: datasets.Dataset) -> dict[str, torch.Tensor]:
    """All pictures and captions of some rows as one batch."""
    return dict(
        word_processor()(
            text=list(rows["caption"]),
            images=[image.convert("RGB") for image in rows["image"]],
            padding=True,
            return_tensors="pt",
        )
    )


def new_encoder() -> CLIPModel:
    """The encoder before it is pretrained."""
    tokenizer: Any = word_processor().tokenizer
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    grid = {"image_size": SIDE, "patch_size": PATCH}
    config = CLIPConfig(
        text_config={**WIDTH, **words}, vision_config={**WIDTH, **grid}, projection_dim=64
    )
    return CLIPModel(config)


@cache
def pretrained_encoder() -> CLIPModel:
    """The encoder, trained by the stock contrastive loss of CLIP on CLS and EOS."""
    set_seed(0)
    encoder, batch = new_encoder(), inputs_of(drawings()[0])
    batch.pop("token_type_ids", None)
    count = len(batch["input_ids"])
    optimizer = torch.optim.AdamW(encoder.parameters(), RATE, weight_decay=0.1)
    steps = EPOCHS * (count // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(count).split(BATCH)[: count // BATCH]:
            loss = encoder(**{name: v[rows] for name, v in batch.items()}, return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return encoder.eval()
