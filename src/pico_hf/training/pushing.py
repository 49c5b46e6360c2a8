"""What of a run is uploaded while it trains: never its pickled arguments, which hold the token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from pico_hf.cards.redaction import HIDDEN, is_secret_name, public_value

ARGUMENTS_FILE = "training_args.json"
_PRIVATE = [TRAINING_ARGS_NAME, f"**/{TRAINING_ARGS_NAME}"]


def write_arguments(folder: Path, args: TrainingArguments) -> None:
    """Writes a run's arguments as `training_args.json` in place of the pickled ones.

    Paths are shortened to their last part, and what holds a secret is left out.

    Args:
        folder: Where a model was saved.
        args: The run's arguments.
    """
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
    shown = {
        name: _plain(public_value(name, value))
        for name, value in args.to_dict().items()
        if not is_secret_name(name)
    }
    text = json.dumps(shown, indent=2, sort_keys=True, default=str, allow_nan=False) + "\n"
    if args.hub_token:
        text = text.replace(args.hub_token, HIDDEN)
    (folder / ARGUMENTS_FILE).write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def upload_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Starts the uploads that `hub_strategy` asks for, beside the training.

    Args:
        trainer: Its output folder holds the model's files and the model card already.
        checkpoint: Folder of the checkpoint, with whatever a run needs to go on.
    """
    args, state = trainer.args, trainer.state
    trainer.callback_handler.on_push_begin(args, state, trainer.control)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(args.output_dir)
    place = f"epoch {int(state.epoch or 0)}"
    if args.save_strategy == SaveStrategy.STEPS:
        place = f"step {state.global_step}"
    shared: dict[str, Any] = {
        "repo_id": trainer.hub_model_id,
        "revision": args.hub_revision,
        "run_as_future": True,
    }
    api, message = HfApi(token=args.hub_token), f"Training in progress, {place}"
    ignored = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", *_PRIVATE]
    jobs = [
        api.upload_folder(
            folder_path=args.output_dir, commit_message=message, ignore_patterns=ignored, **shared
        )
    ]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        last = args.hub_strategy == HubStrategy.CHECKPOINT
        jobs.append(
            api.upload_folder(
                folder_path=checkpoint,
                path_in_repo="last-checkpoint" if last else checkpoint.name,
                commit_message=f"{message}, checkpoint",
                ignore_patterns=_PRIVATE,
                **shared,
            )
        )
    running = trainer.push_in_progress
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress(jobs)
    else:
        running.jobs.extend(jobs)
