"""Memory and time of a training step that encodes its batch part by part.

Run: python benchmarks/large_batches.py [--batch 64] [--mini_batch 8]
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from transformers import CLIPConfig, CLIPModel

from measurement import cpu_times, peak_megabytes, ratio
from pico_hf import PicoModel
from pico_hf.training.cached_gradients import CachedGradients

TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
WORDS = 32


def small_clip(layers: int) -> PicoModel:
    """A small ViT of 49 patches and a text tower of the same width, with random weights."""
    torch.manual_seed(0)
    vision = {**TOWER, "num_hidden_layers": layers, "image_size": 224, "patch_size": 32}
    text = {**TOWER, "num_hidden_layers": layers, "vocab_size": 1000, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 77}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)
    return PicoModel.from_encoder(CLIPModel(config), loss="infonce", pooled_share=0.0).train()


def step(batch: int, mini_batch: int | None, layers: int, checkpointing: bool = False):
    """A call that adds the gradients of one batch to those of the model, and the model."""
    model = small_clip(layers)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 1000, (batch, WORDS))
    ids[:, -1] = 2
    inputs = {
        "pixel_values": torch.randn(batch, 3, 224, 224),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }

    def plain() -> None:
        model(**inputs).loss.backward()

    def in_parts() -> None:
        cached = CachedGradients(model, model, mini_batch or batch, nullcontext)
        cached.loss(inputs, lambda outputs: outputs.loss)[0].backward()

    return (plain if mini_batch is None else in_parts), model


def call(*args: object) -> Callable[[], object]:
    """The call alone, for a process of its own."""
    return step(*args)[0]


def largest_difference(batch: int, mini_batch: int, layers: int) -> tuple[float, float]:
    """Of the gradients of both steps, and the largest gradient."""
    (plain, one), (parts, other) = step(batch, None, layers), step(batch, mini_batch, layers)
    plain()
    parts()
    pairs = [
        (p.grad, q.grad)
        for p, q in zip(one.parameters(), other.parameters(), strict=True)
        if p.grad is not None
    ]
    return (
        max(float((p - q).abs().max()) for p, q in pairs),
        max(float(p.abs().max()) for p, _ in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--mini_batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    size = options.batch, options.mini_batch, options.layers
    kinds = {
        "whole batch": (options.batch, None, options.layers),
        f"{options.mini_batch} at a time": size,
        "whole batch, checkpointing": (options.batch, None, options.layers, True),
        f"{options.mini_batch} at a time, checkpointing": (*size, True),
    }
    difference, largest = largest_difference(*size)
    print(f"gradients differ by at most {difference:.1e}; the largest is {largest:.2g}\n")
    times = cpu_times({name: call(*args) for name, args in kinds.items()}, options.rounds)
    peaks = {name: peak_megabytes(call, *args) for name, args in kinds.items()}
    print(f"| step, B = {options.batch} | peak MB | of the plain step | time |\n|---|---|---|---|")
    for name, peak in peaks.items():
        share = 100 * peak / peaks["whole batch"]
        print(
            f"| {name} | {peak:.0f} | {share:.0f} % | {ratio(times, name, 'whole batch'):.2f} × |"
        )


if __name__ == "__main__":
    main()
