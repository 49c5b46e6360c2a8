"""Builds column weights and judges them on the dev split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pico_hf.core.alignment import align_columns
from pico_hf.core.canonical import CANDIDATES
from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.fusion import FusionRule, normalised_gain
from pico_hf.core.metrics import NotNumbersError
from pico_hf.core.pooled_share import choose_share
from pico_hf.core.refinement import Refinement
from pico_hf.core.semantic import ColumnStatistics, column_statistics, column_weights
from pico_hf.core.style_refinement import (
    ProbabilityEstimate,
    complement_of_style,
    refine_style,
)
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.stream import ImageTextStream
from pico_hf.hub.adapter_files import live_module
from pico_hf.training.dev_split import dev_metric, first_split
from pico_hf.training.encoding import SplitEncoder, encoder_columns, pair_moments
from pico_hf.training.evaluation import evaluate_form, evaluate_retrieval, share_metrics
from pico_hf.training_args import PicoTrainingArguments

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
        metrics = share_metrics(self.model, dev, prototypes.columns)
        return choose_share(
            prototypes, lambda share: _rsum(lambda: metrics(share)), fusion=self.fusion
        )

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
