"""What a training job shows while it runs: a bar, and a short line where something was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.trainer_callback import ProgressCallback


class ShortLog(ProgressCallback):
    """The stock bar; of a log it shows what people look at, all of it is in trainer_state.json."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Writes a line above the bar."""
        line = log_line(logs or {})
        if line and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


def show_short_log(trainer: Any) -> None:
    """Lets a trainer show short lines in place of whole logs; one without bars stays as it is.

    Args:
        trainer: A `Trainer`, before its training.
    """
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ShortLog)


def log_line(logs: Mapping[str, Any]) -> str:
    """A line for people; empty where a progress bar shows as much, as for proposals.

    Args:
        logs: Of one call of `Trainer.log`.

    Example:
        >>> log_line({"eval_rsum": 510.0, "eval_encoder_rsum": 470.0, "epoch": 2})
        'epoch 2: rSum on the dev split 510.0, encoder alone 470.0'
        >>> log_line({"loss": 1.25, "learning_rate": 2e-4, "epoch": 0.5})
        'epoch 0.5: loss 1.250, learning rate 0.0002'
        >>> log_line({"pico_style_iteration": 3, "epoch": 2})
        ''
    """
    told = []
    if "loss" in logs:
        told += [f"loss {logs['loss']:.3f}", f"learning rate {logs.get('learning_rate', 0):.2g}"]
    if "train_runtime" in logs:
        told.append(
            f"{logs['train_runtime']:.0f} s of training, mean loss {logs['train_loss']:.3f}"
        )
    for name, value in logs.items():
        if name.startswith("eval_") and name.endswith("_rsum"):
            told.append(_rsum(name.removeprefix("eval_").removesuffix("rsum"), value))
    return f"epoch {logs.get('epoch', 0):.3g}: {', '.join(told)}" if told else ""


def _rsum(name: str, value: float) -> str:
    """One sum of recalls, of a split among several or of the encoder in a model."""
    split, encoder, _ = name.partition("encoder_")
    if encoder:
        return f"encoder alone {value:.1f}"
    return f"rSum on {split.rstrip('_') or 'the dev split'} {value:.1f}"
