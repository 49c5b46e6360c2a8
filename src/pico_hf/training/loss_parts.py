"""What the loss of a run consists of, for its log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import nested_gather


class LossParts(TrainerCallback):
    """Adds up the parts of the loss on their device, as the Trainer does with the loss itself."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets what an earlier run has not logged."""
        self.sums, self.steps = {}, 0.0

    def add(self, parts: Mapping[str, Tensor] | None, share: float, skip_nan: bool) -> None:
        """Adds the parts of a batch.

        Args:
            parts: Of a [`PicoOutput`]; None counts as 0.
            share: Part of an optimizer step that the batch is.
            skip_nan: True replaces those of a batch whose loss is no number by the mean so far.
        """
        parts = dict(parts or {})
        if parts and skip_nan:
            finite = torch.isfinite(torch.stack(list(parts.values())).sum())
            parts = {
                name: torch.where(finite, part, self._mean(name, part))
                for name, part in parts.items()
            }
        for name, part in parts.items():
            self.sums[name] = self.sums[name] + share * part if name in self.sums else share * part
        self.steps += share

    def _mean(self, name: str, like: Tensor) -> Tensor:
        return self.sums[name] / self.steps if name in self.sums else torch.zeros_like(like)

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each part over the steps since the last call, and over processes.

        Args:
            gather: Gives what all processes have. Called once by each.

        Returns:
            `loss_{part}` for every part; empty before any.
        """
        sums, steps = self.sums, self.steps
        self.sums, self.steps = {}, 0.0
        if not sums:
            return {}
        values = gather(torch.stack(list(sums.values())).unsqueeze(0)).mean(dim=0) / steps
        return {f"loss_{name}": value for name, value in zip(sums, values.tolist(), strict=True)}


class LossPartsTrainer(Trainer):
    """A Trainer whose log holds the parts of the loss beside it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.loss_parts = LossParts()
        super().__init__(*args, **kwargs)
        self.add_callback(self.loss_parts)

    def count_parts(self, outputs: Any) -> None:
        """Adds the parts of a batch's loss to the next entry of the log, unless it is the user's.

        Args:
            outputs: Of the model.
        """
        if self.compute_loss_func is None and self.model.training:
            share = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
            self.loss_parts.add(outputs.get("loss_parts"), share, self.args.logging_nan_inf_filter)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts to an entry that has the loss; see `Trainer.log` for the arguments."""
        if self.is_in_train and "loss" in logs:
            logs |= self.loss_parts.take(lambda sums: nested_gather(sums, self.args.parallel_mode))
        super().log(logs, start_time)
