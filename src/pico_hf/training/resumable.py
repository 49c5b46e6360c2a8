"""A Trainer whose checkpoints are whole or not there, and are checked before a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from pico_hf.training.checkpoints import SAVING, prune, put_in_place, run_lock, saving, tidy
from pico_hf.training.interruption import replace_stock_callback, sigterm_saves
from pico_hf.training.pushing import upload_checkpoint, write_arguments
from pico_hf.training.resuming import (
    asked_for,
    best_of,
    check_checkpoint_weights,
    chosen_checkpoint,
    run_facts,
)


class ResumableTrainer(Trainer):
    """`transformers.Trainer` that can be killed at any moment and goes on exactly.

    One run at a time writes to a folder. See `pico_hf.training.checkpoints` for how checkpoints are
    written, and `pico_hf.training.resuming` for what is checked.
    """

    _staged: Path | None = None  # where a checkpoint is being written
    _facts: Mapping[str, Any] = MappingProxyType({})  # of the run, for its checkpoints

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_stock_callback(self)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains under the lock of `output_dir`; see `Trainer.train` for the arguments."""
        folder, chosen = Path(str(self.args.output_dir)), asked_for(resume_from_checkpoint)
        main = self.args.should_save
        with run_lock(folder) if main else nullcontext(), sigterm_saves(self):
            if main:
                tidy(folder)
            self.accelerator.wait_for_everyone()
            self._facts = run_facts(self.model, self.train_dataset, self.eval_dataset)
            if chosen is not None:
                chosen = chosen_checkpoint(chosen, folder, self._facts)
            self._before_loading()
            return super().train(chosen, trial, ignore_keys_for_eval)

    def _before_loading(self) -> None:
        """What a subclass does once it is known that the run may start."""

    def _get_output_dir(self, trial: Any) -> str:
        """The run's folder; while a checkpoint is being written, the one beside its place."""
        return super()._get_output_dir(trial) if self._staged is None else str(self._staged)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint beside its place, renames it when it is whole, and uploads it."""
        run = Path(self._get_output_dir(trial))
        name, main = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self.args.should_save
        with saving(run, name) if main else nullcontext(run / SAVING / name) as staged:
            self.accelerator.wait_for_everyone()
            self._staged = staged.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staged = None
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(run / name)
            self.accelerator.wait_for_everyone()
            if main:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                put_in_place(staged, run, self._facts)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if main:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            prune(run, limit, run / name, best)
        self.accelerator.wait_for_everyone()

    def _finalize_training(self, trial: Any, *args: Any) -> TrainOutput:
        """Removes the last checkpoint before stock code does, which would do it file by file."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            prune(Path(self._get_output_dir(trial)), 1, best)
        return super()._finalize_training(trial, *args)

    def _init_training_state(
        self, steps: int, steps_per_epoch: int, epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        """Finds the best checkpoint of a run that was moved: beside the one it goes on from."""
        done = super()._init_training_state(steps, steps_per_epoch, epochs, resume, trial)
        if resume is not None:
            best = best_of(Path(resume), Path(self.args.output_dir))
            self.state.best_model_checkpoint = best
        return done

    def _run_epoch(self, **kwargs: Any) -> None:
        """Trains no further step if the last one was that of the checkpoint it goes on from."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves the model, with arguments that can be read and hold no secret."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_arguments(Path(output_dir or str(self.args.output_dir)), self.args)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Refuses damaged or missing weights before the live model changes."""
        check_checkpoint_weights(Path(resume_from_checkpoint), self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Refuses damaged or missing weights before the live model changes."""
        check_checkpoint_weights(Path(str(self.state.best_model_checkpoint)), self.model)
        super()._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads nothing from a folder that has not its name yet."""
        if self._staged is None:
            self._publish(Path(checkpoint_folder))

    def _publish(self, checkpoint: Path) -> None:
        """Uploads what a checkpoint holds."""
        upload_checkpoint(self, checkpoint)
