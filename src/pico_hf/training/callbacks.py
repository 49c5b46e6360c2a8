"""When feedback happens in a run. The callback keeps no state: all of it lives in model buffers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from pico_hf.training.trainer import PicoTrainer

logger = logging.getLogger(__name__)


class PrototypeFeedbackCallback(TrainerCallback):
    """Records performance when the dev split was scored, refines right before the next step.

    Style prototypes, that is. Canonical columns are aligned once, when training is over: heads that
    are being trained would take up within an epoch what a rotation of their columns brings.

    Refining inside `on_evaluate` would save a checkpoint that was never evaluated, and
    `load_best_model_at_end` would restore another model than the one that scored. Between the
    evaluation and the next step begin the network does not change, so the record stays true; and
    as it is a buffer, a run resumed from that checkpoint refines just as the unbroken run did.

    Args:
        trainer: The trainer whose run this is.
    """

    def __init__(self, trainer: PicoTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the prototypes afresh, unless the run is being resumed."""
        if state.global_step == 0 and self.trainer.args.refine_prototypes:
            self.trainer.restart_prototypes()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tells the dataset the epoch: accelerate forgets it when a run resumes within one."""
        self.trainer.train_dataset.set_epoch(int(state.epoch or 0))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Records the dev split's rSum, during training and after the warm-up only."""
        performance = metrics.get(self.trainer.feedback_metric)
        if performance is None or not self.trainer.is_in_train or not self._active(state):
            return
        self.trainer.pico_model.prototypes.record(performance=performance)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refines once per recorded performance."""
        if self._active(state) and bool(self.trainer.pico_model.prototypes.has_performance):
            self.trainer.refine_prototypes()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Aligns canonical columns with the network as training leaves it, and scores the result.

        The best checkpoint, if that is what the run ends with, is back in place by now.
        """
        if not (self.trainer.args.refine_prototypes and self._canonical()):
            return
        if self.trainer.eval_dataset is None:
            logger.warning(
                "There is no `eval_dataset` to tell what canonical columns bring, so the encoder's "
                "own columns stay as they are, with uniform weights."
            )
            return
        self.trainer.refine_prototypes()
        self.trainer.evaluate()

    def _canonical(self) -> bool:
        return self.trainer.pico_model.prototypes.canonical

    def _active(self, state: TrainerState) -> bool:
        run = self.trainer.args
        warm = (state.epoch or 0.0) >= run.prototype_warmup_epochs
        return run.refine_prototypes and warm and not self._canonical()
