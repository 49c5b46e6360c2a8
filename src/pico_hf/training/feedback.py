"""Builds column weights, judges them on the dev split, and decides when a run does so."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pico_hf.core.canonical import CANDIDATES
from pico_hf.core.construction import (
    ProbabilityEstimate,
    Refinement,
    align_columns,
    complement_of_style,
    refine_style,
)
from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.fusion import FusionRule, normalised_gain
from pico_hf.core.metrics import NotNumbersError
from pico_hf.core.pooled_share import choose_share
from pico_hf.core.semantic import ColumnStatistics, column_statistics, column_weights
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.stream import ImageTextStream
from pico_hf.hub.adapter_files import live_module
from pico_hf.training.dev_split import dev_metric, first_split
from pico_hf.training.encoding import SplitEncoder, encoder_columns, pair_moments
from pico_hf.training.evaluation import evaluate_form, evaluate_retrieval, evaluate_shares
from pico_hf.training_args import PicoTrainingArguments

logger = logging.getLogger(__name__)

TRIAL_PAIRS = 1_250_000  # 500 images × 2,500 captions: feedback on photos in the effect study


@dataclass(frozen=True)
class Feedback:
    """Builds column weights from training pairs and judges them on the dev split.

    Attributes:
        encoder: Model, collator and batch size.
        train: Training split, which statistics come from; None if there is none.
        dev: Dev split or a dict of splits, of which the first one is used; None: every candidate
            for canonical columns counts alike.
        args: The run's knobs.
        estimate: How style prototypes become a semantic probability.
        fusion: How much of a proposal is taken, by what it brought.
    """

    encoder: SplitEncoder
    train: ImageTextDataset | ImageTextStream | None
    dev: ImageTextDataset | Mapping[str, ImageTextDataset] | None
    args: PicoTrainingArguments
    estimate: ProbabilityEstimate = complement_of_style
    fusion: FusionRule = normalised_gain

    @property
    def model(self) -> PreTrainedModel:
        """The [`PicoModel`]."""
        return self.encoder.model

    @property
    def canonical(self) -> bool:
        """True aligns canonical columns at the end, False refines style prototypes on the way."""
        return self.model.prototypes.canonical

    @property
    def dev_split(self) -> ImageTextDataset | None:
        """The split that feedback and checkpoint selection use."""
        return first_split(self.dev)

    @property
    def metric(self) -> str:
        """Name of the dev split's rSum in the metrics of a run."""
        return dev_metric("rsum", self.dev)

    @property
    def starts_afresh(self) -> bool:
        """Whether a run builds column weights anew; without a dev split it keeps what there are."""
        return self.args.refine_prototypes and self.dev_split is not None

    @property
    def too_few_pairs(self) -> bool:
        """Whether the training split is smaller than the probe set of the prototypes."""
        return self.model.config.probe_size > self.pairs_in_probe

    @property
    def pairs_in_probe(self) -> int:
        """How many training pairs the probe set has: as configured, or all that there are."""
        return len(self.train.probe(self.model.config.probe_size))

    def restart(self) -> None:
        """Forgets prototypes and feedback; the first pairs of the training split are the probe."""
        self.model.restart_prototypes(self.pairs_in_probe)

    def construct(self) -> list[Refinement]:
        """One iteration of style prototypes, or one alignment of canonical columns.

        Returns:
            What each proposal brought.

        Raises:
            ValueError: If there are no training pairs.
        """
        if self.train is None:
            raise ValueError(
                "Column weights are built from pairs, and there are none. Pass `train_dataset`."
            )
        return self._align() if self.canonical else [self._refine()]

    def _refine(self) -> Refinement:
        dev = self.encoder.split(self.dev_split, "Feedback trial")

        def trial(probability: Tensor) -> float:
            self.encoder.processes.copy_from_first([probability])
            return _rsum(lambda: evaluate_retrieval(self.model, dev, column_weights(probability)))

        return refine_style(
            live_module(self.model.prototypes),
            self.probe_statistics(),
            trial,
            estimate=self.estimate,
            fusion=self.fusion,
        )

    def _align(self) -> list[Refinement]:
        prototypes = live_module(self.model.prototypes)
        pairs = self.train.sample(self.args.alignment_images)
        moments = pair_moments(self.encoder, pairs)
        if self.dev_split is None:
            return align_columns(prototypes, moments, fusion=self.fusion)
        part = trial_part(self.dev_split)
        dev = self.encoder.split(part, "Feedback trials", encoder_columns)

        def trial(form: Tensor) -> float:
            self.encoder.processes.copy_from_first([form])
            return _rsum(lambda: evaluate_form(self.model, dev, form))

        candidates = tqdm(
            CANDIDATES, "Feedback trials", disable=self.encoder.disable_tqdm, leave=False
        )
        reports = self._choose_share(dev)
        reports += align_columns(prototypes, moments, trial, candidates, fusion=self.fusion)
        return reports + self._choose_share(dev)

    def _choose_share(self, dev: EncodedSplit) -> list[Refinement]:
        """How much the pooled vectors count, in the columns that the prototypes have now."""
        prototypes = live_module(self.model.prototypes)

        def trial(shares: Sequence[float]) -> list[float]:
            ranked = evaluate_shares(self.model, dev, shares, prototypes.columns)
            return [metrics["rsum"] for metrics in ranked]

        return choose_share(prototypes, trial, fusion=self.fusion)

    def probe_statistics(self) -> ColumnStatistics:
        """Column statistics of the probe set: a fixed part of the training pairs in fixed order."""
        probe = self.train.probe(self.model.config.probe_size)
        batches = self.encoder.batches(probe, "Probe statistics")
        return ColumnStatistics.concatenate([column_statistics(*pair) for pair in batches])


def _rsum(metrics: Callable[[], dict[str, float]]) -> float:
    """The rSum of a trial; NaN if its scores hold NaN, which counts for nothing."""
    try:
        return metrics()["rsum"]
    except NotNumbersError:
        return math.nan


def trial_part(split: ImageTextDataset) -> ImageTextDataset:
    """Chooses the part of a split that trials rank, with at most `TRIAL_PAIRS` pairs."""
    images = split.gallery.bincount()
    captions = split.gallery[split.text_to_image].bincount()
    pairs = int(images @ captions)  # each gallery is ranked by itself
    return split.sample(int(len(split) * math.sqrt(TRIAL_PAIRS / pairs)))


class FeedbackCallback(TrainerCallback):
    """Records performance when the dev split was scored, refines right before the next step.

    That holds for style prototypes. Canonical columns are aligned once, when training is over:
    projections that are being trained would take up within an epoch what a rotation brings.

    Refining inside `on_evaluate` would save a checkpoint that was never evaluated, and
    `load_best_model_at_end` would restore another model than the one that scored. Between the
    evaluation and the next step begin the network does not change, so the record stays true; and
    as it is a buffer, a run resumed from that checkpoint refines just as the unbroken run did.

    Args:
        feedback: Gives the [`Feedback`] of the trainer as it is now, with the model and the splits
            that it has by then.
        construct: `PicoTrainer.construct_prototypes`, which logs what it did.
        evaluate: `PicoTrainer.evaluate`.
    """

    def __init__(
        self,
        feedback: Callable[[], Feedback],
        construct: Callable[[], Any],
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
        """Records the dev split's rSum, during training and after the warm-up only."""
        performance = metrics.get(self.feedback().metric)
        if performance is not None and self.training and self._refines(state):
            self.feedback().model.prototypes.record(performance=performance)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refines once per recorded performance."""
        if self._refines(state) and bool(self.feedback().model.prototypes.has_performance):
            self.construct()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Aligns canonical columns with the network as training leaves it, and scores the result.

        The best checkpoint, if that is what the run ends with, is back in place by now.
        """
        self.training = False
        if not (self.feedback().args.refine_prototypes and self.feedback().canonical):
            return
        if self.feedback().dev_split is None:
            logger.warning(
                "There is no `eval_dataset` to tell what canonical columns bring, so %s.",
                "the columns and weights that the model came with stay as they are"
                if int(self.feedback().model.prototypes.iteration)
                else "the encoder columns stay as they are, with uniform weights",
            )
            return
        self.construct()
        self.evaluate()

    def _refines(self, state: TrainerState) -> bool:
        run = self.feedback().args
        warm = (state.epoch or 0.0) >= run.prototype_warmup_epochs
        return run.refine_prototypes and warm and not self.feedback().canonical
