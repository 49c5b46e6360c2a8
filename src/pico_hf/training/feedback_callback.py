"""When a run builds column weights: at its start, between steps and at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class FeedbackCallback(TrainerCallback):
    """Records performance when the dev split was scored, refines right before the next step.

    That holds for what proposes in training, style prototypes. Canonical columns and the share of
    pooled vectors are found when training is over: projections that are being trained would take up
    within an epoch what a rotation brings.

    Refining inside `on_evaluate` would save a checkpoint that was never evaluated, and
    `load_best_model_at_end` would restore another model than the one that scored. Between the
    evaluation and the next step begin the network does not change, so the record stays true; and
    as it is a buffer, a run resumed from that checkpoint refines just as the unbroken run did.

    Args:
        feedback: Gives the [`Feedback`] of the trainer as it is now, with the model and the splits
            that it has by then.
        construct: `PicoTrainer.construct_prototypes`, which logs what it did, told `"training"` or
            `"end"`.
        evaluate: `PicoTrainer.evaluate`.
    """

    def __init__(
        self,
        feedback: Callable[[], Any],
        construct: Callable[[str], Any],
        evaluate: Callable[[], Any],
    ) -> None:
        self.feedback, self.construct, self.evaluate = feedback, construct, evaluate
        self.training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the prototypes afresh, unless the run is being resumed or cannot build any."""
        self.training = True
        if state.global_step == 0 and self.feedback().starts_afresh:
            self.feedback().restart()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tells the dataset the epoch: accelerate forgets it when a run resumes within one."""
        self.feedback().train.set_epoch(int(state.epoch or 0))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Notes that the dev split was scored, during training and after the warm-up only."""
        if self.feedback().metric in metrics and self.training and self._refines(state):
            self.feedback().model.prototypes.note_evaluation()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refines once per evaluation."""
        if self._refines(state) and bool(self.feedback().model.prototypes.evaluated):
            self.construct("training")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Aligns columns with the network as training leaves it, and scores the result.

        The best checkpoint, if that is what the run ends with, is back in place by now.
        """
        self.training = False
        if not (self.feedback().args.refine_prototypes and self.feedback().proposes("end")):
            return
        if self.feedback().dev_split is None:
            logger.warning(
                "There is no `eval_dataset` to tell what canonical columns bring, so %s.",
                "the columns and weights that the model came with stay as they are"
                if int(self.feedback().model.prototypes.iteration)
                else "the encoder columns stay as they are, with uniform weights",
            )
            return
        self.construct("end")
        self.evaluate()

    def _refines(self, state: TrainerState) -> bool:
        run = self.feedback().args
        warm = (state.epoch or 0.0) >= run.prototype_warmup_epochs
        return run.refine_prototypes and warm and self.feedback().proposes("training")
