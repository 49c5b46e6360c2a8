"""What a run tells `report_to` besides losses and metrics: phase, speed, memory, column weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pico_hf.cards.plots import spectrum_figure

MEGABYTE = 2**20


class ReportCallback(TrainerCallback):
    """Adds to each log entry how the run goes, for the callbacks that come after this one.

    Stock callbacks send it on to tensorboard, trackio or wandb. The run's own `log_history` does
    not hold it, since times and memory of a resumed run are never those of an unbroken one.

    Args:
        model: Gives the [`PicoModel`] of the trainer as it is now.
        callbacks: Gives all callbacks of the trainer; those with a `tb_writer` get images.
    """

    def __init__(
        self, model: Callable[[], Any], callbacks: Callable[[], Iterable[TrainerCallback]]
    ) -> None:
        self.model, self.callbacks = model, callbacks
        self.steps, self.seconds, self.began = 0, 0.0, 0.0
        self.drawn: int | None = None  # iteration of the weights that were drawn last

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock, which does not run during an evaluation."""
        self.began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock."""
        self.seconds += time.perf_counter() - self.began
        self.steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the values to `logs` in place."""
        if logs is None:
            return
        prototypes = self.model().prototypes
        if self.steps:
            logs["pico_images_per_second"] = (
                self.steps * images_per_step(args, state) / (self.seconds)
            )
            self.steps, self.seconds = 0, 0.0
        logs["pico_peak_memory_mb"] = peak_memory() / MEGABYTE
        logs["pico_phase"] = self._phase(args, state)
        logs["pico_pooled_share"] = self.model().pooled_share
        logs |= self._weights()
        if int(prototypes.iteration) != self.drawn:
            self._draw(state.global_step)
            self.drawn = int(prototypes.iteration)

    def _phase(self, args: Any, state: TrainerState) -> int:
        """0 in the warm-up, 1 in training, 2 when all steps are done."""
        if state.global_step >= state.max_steps:
            return 2
        return int((state.epoch or 0.0) >= args.prototype_warmup_epochs)

    def _weights(self) -> dict[str, float]:
        """Spread and quantiles of the column weights."""
        weights = self.model().column_weights.float()
        tenths = torch.tensor([0.1, 0.5, 0.9], device=weights.device)
        low, middle, high = weights.quantile(tenths).tolist()
        return {
            "pico_weight_std": float(weights.std(correction=0)),
            "pico_weight_min": float(weights.min()),
            "pico_weight_p10": low,
            "pico_weight_p50": middle,
            "pico_weight_p90": high,
            "pico_weight_max": float(weights.max()),
        }

    def _draw(self, step: int) -> None:
        """Gives the sorted semantic probability as an image to whoever takes images."""
        for callback in self.callbacks():
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                figure = spectrum_figure(self.model().semantic_probability)
                writer.add_figure("pico/semantic_probability", figure, step, close=False)


def images_per_step(args: TrainingArguments, state: TrainerState) -> int:
    """Images of an optimizer step, of all processes together."""
    batch = state.train_batch_size or args.train_batch_size
    return batch * args.gradient_accumulation_steps * args.world_size


def peak_memory() -> float:
    """Bytes: the most that torch held on the GPU so far, else the most that this process held."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
