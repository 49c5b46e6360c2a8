"""A trainer of tiny models and images, with any argument of the trainer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny import tiny_encoder, tiny_processor, tiny_rows

# What a run without evaluation and checkpoints takes.
BARE = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "refine_prototypes": False,
}


TINY_RUN: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def tiny_model(**knobs: Any):
    from pico_hf import PicoModel

    torch.manual_seed(0)
    return PicoModel.from_encoder(
        tiny_encoder(), **{"num_prototypes": 3, "probe_size": 8, "pooled_share": 0.0, **knobs}
    )


def tiny_args(folder: Path, **knobs: Any):
    from pico_hf import PicoTrainingArguments

    options = {"num_train_epochs": 1, **TINY_RUN, **knobs}
    return PicoTrainingArguments(output_dir=str(folder / "run"), **options)


def tiny_trainer(folder: Path, options: dict[str, Any] | None = None, **knobs: Any):
    """A trainer.

    Args:
        folder: Where it writes.
        options: Arguments of the trainer; the others are 24 training rows, 12 dev rows, a CLIP.
        knobs: Training arguments.
    """
    from pico_hf import PicoTrainer

    given = {
        "args": tiny_args(folder, **knobs),
        "train_dataset": tiny_rows(24),
        "eval_dataset": tiny_rows(12),
        "processing_class": tiny_processor(),
        **(options or {}),
    }
    if "model" not in given and "model_init" not in given:
        given["model"] = tiny_model()
    return PicoTrainer(**given)
