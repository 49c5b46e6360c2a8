"""Train a LoRA adapter on your pairs and push it to the Hub.

    hf auth login
    python examples/03_lora_and_push.py train.parquet dev.parquet me/pico-adapter

Needs peft. The repository then holds the adapter, its prototypes, configuration, processor and
model card; `pico_hf.load_adapter_model("me/pico-adapter")` fetches it together with its base.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from peft import get_peft_model
from transformers import AutoProcessor

from pico_hf import (
    PicoModel,
    PicoTrainer,
    PicoTrainingArguments,
    load_image_text,
    pico_lora_config,
)

CLIP = "openai/clip-vit-base-patch32"


def main(
    train_file: str, dev_file: str, repository: str, encoder: str = CLIP, **options: Any
) -> PicoTrainer:
    """Trains and pushes the adapter; returns the trainer.

    Args:
        train_file: Parquet, jsonl or csv file, or an imagefolder.
        dev_file: Likewise; it chooses the checkpoint and gives the feedback.
        repository: `owner/name` on the Hub, created if need be.
        encoder: Hub repository of a dual encoder with its processor.
        options: Further fields of `PicoTrainingArguments`.
    """
    model = PicoModel.from_pretrained(encoder)
    defaults = {"num_train_epochs": 5, "per_device_train_batch_size": 64}
    trainer = PicoTrainer(
        get_peft_model(model, pico_lora_config(model, r=8)),
        PicoTrainingArguments(
            output_dir=f"outputs/{repository.rsplit('/', 1)[-1]}",
            push_to_hub=True,
            hub_model_id=repository,
            **{**defaults, **options},
        ),
        train_dataset=load_image_text(files=train_file),
        eval_dataset=load_image_text(files=dev_file),
        processing_class=AutoProcessor.from_pretrained(encoder),
    )
    trainer.train()
    trainer.push_to_hub()
    return trainer


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line; they are the arguments of `main`."""
    parser = argparse.ArgumentParser(description="Trains a LoRA adapter and pushes it.")
    parser.add_argument("train_file", help="image-text pairs: parquet, jsonl, csv or a folder")
    parser.add_argument("dev_file", help="other pairs, for feedback")
    parser.add_argument("repository", help="owner/name on the Hub")
    parser.add_argument("--encoder", default=CLIP, help="Hub repository")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(**vars(parse_arguments()))
