"""A checkpoint on SIGTERM, from which a run goes on exactly (`enable_jit_checkpoint`)."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

logger = logging.getLogger(__name__)


class CheckpointOnSigterm(TrainerCallback):
    """Saves a checkpoint at the end of the step, then does what SIGTERM did before.

    The stock callback saves between the gradient and the optimizer's step too: then the random
    numbers of a step were drawn already, and a run that repeats it draws others. It also lets the
    run end as if it were done: column weights would be built and the model published.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def listen(self) -> None:
        """Takes SIGTERM over."""
        self.asked = False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for a checkpoint, but at the end of an epoch, whose evaluation is to come."""
        if self.asked and state.epoch != int(state.epoch or 0):
            control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for a checkpoint after the epoch's evaluation."""
        if self.asked:
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the run, unless the program has its own answer to SIGTERM."""
        if self.asked:
            logger.warning("SIGTERM: saved checkpoint-%d.", state.global_step)
            self.listen_no_more()
            signal.raise_signal(signal.SIGTERM)
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives SIGTERM back."""
        self.listen_no_more()

    def listen_no_more(self) -> None:
        """Gives SIGTERM back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def sigterm_saves(trainer: Trainer) -> Iterator[None]:
    """Listens for SIGTERM while a run trains, if it has that callback."""
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, CheckpointOnSigterm)]
    for callback in found:
        callback.listen()
    try:
        yield
    finally:
        for callback in found:
            callback.listen_no_more()


def replace_stock_callback(trainer: Trainer) -> None:
    """Puts [`CheckpointOnSigterm`] in the place of the stock callback, if there is one."""
    stock = trainer.pop_callback(JITCheckpointCallback)
    if stock is None:
        return
    if stock.jit_manager is not None:  # it listens from the moment it is made
        signal.signal(signal.SIGTERM, stock.jit_manager._original_sigterm_handler)
    trainer.add_callback(CheckpointOnSigterm())
