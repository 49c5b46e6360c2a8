"""Builds column weights and judges them on the dev split."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from pico_hf.core.construction import Refinement, construct
from pico_hf.core.estimator import Estimator
from pico_hf.core.estimators import ESTIMATORS, ORDER
from pico_hf.core.fusion import FusionRule, normalised_gain
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.state import SOURCES
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.progress import progress_bar
from pico_hf.data.stream import ImageTextStream
from pico_hf.hub.adapter_files import live_module
from pico_hf.training.dev_split import dev_metric, first_split
from pico_hf.training.encoding import SplitEncoder, encoder_columns, pair_moments
from pico_hf.training.trials import DevTrials, trial_part
from pico_hf.training_args import PicoTrainingArguments

logger = logging.getLogger(__name__)

LEAST_DEV_IMAGES = 64  # with fewer, or none, an alignment cost a pretrained encoder 2 to 12 rSum


@dataclass(frozen=True)
class Feedback:
    """Builds column weights from training pairs and judges them on the dev split.

    Attributes:
        encoder: Model, collator and batch size.
        train: Training split, which statistics come from; None if there is none.
        dev: Dev split or a dict of splits, of which the first one is used; None: every proposal
            counts alike.
        args: The run's knobs.
        sources: What proposes, by the names that a model's configuration has.
        fusion: How much of a proposal is taken, by what it brought.
        guarded: False takes what proposals are fused to even if it scores less than before.
    """

    encoder: SplitEncoder
    train: ImageTextDataset | ImageTextStream | None
    dev: ImageTextDataset | Mapping[str, ImageTextDataset] | None
    args: PicoTrainingArguments
    sources: Mapping[str, Estimator] = field(default_factory=lambda: ESTIMATORS)
    fusion: FusionRule = normalised_gain
    guarded: bool = True

    @property
    def model(self) -> PreTrainedModel:
        """The [`PicoModel`]."""
        return self.encoder.model

    @property
    def estimators(self) -> list[Estimator]:
        """Those of the model, in the order in which they propose."""
        return [self.sources[name] for name in ORDER if name in self.model.prototypes.estimators]

    def proposes(self, when: str) -> bool:
        """Whether any estimator proposes in `"training"`, or at its `"end"`."""
        return any(SOURCES[name] == when for name in self.model.prototypes.estimators)

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

    def construct(self, when: str | None = None) -> list[Refinement]:
        """Lets the model's estimators propose, and takes what helps.

        Args:
            when: Those that propose in `"training"`, or at its `"end"`; None: the latter, which
                need no training, or all of a model that has none of them.

        Returns:
            What each proposal brought; nothing where a pretrained encoder that is scored by its
            pooled features alone has too few dev images to tell what is better.

        Raises:
            ValueError: If there are no training pairs.
        """
        if self.train is None:
            raise ValueError(
                "Column weights are built from pairs, and there are none. Pass `train_dataset`."
            )
        if self.model.pooled_share == 1 and len(self.dev_split or ()) < LEAST_DEV_IMAGES:
            logger.warning(
                "The encoder's own ranking stays: what is better cannot be told from %d dev "
                "images, of which there should be %d.",
                *(len(self.dev_split or ()), LEAST_DEV_IMAGES),
            )
            return []
        when = "end" if when is None and self.proposes("end") else when
        return construct(
            live_module(self.model.prototypes),
            [one for one in self.estimators if when in (None, SOURCES[one.source])],
            EncodedPairs(self.encoder, self.train, self.args),
            self._trial(),
            fusion=self.fusion,
            guarded=self.guarded,
            progress=self._shown,
        )

    def _trial(self) -> DevTrials | None:
        if self.dev_split is None:
            return None
        part = trial_part(self.dev_split)
        return DevTrials(self.model, self.encoder.split(part, "Feedback", encoder_columns))

    def _shown(self, proposals: Iterable[Any], source: str) -> Iterable[Any]:
        return progress_bar(proposals, f"Feedback on {source}", hidden=self.encoder.disable_tqdm)


@dataclass(frozen=True)
class EncodedPairs:
    """Training pairs in the encoder columns, as the network encodes them now.

    Attributes:
        encoder: Encodes.
        train: Training split.
        args: The run's knobs.
    """

    encoder: SplitEncoder
    train: ImageTextDataset | ImageTextStream
    args: PicoTrainingArguments

    def probe(self) -> Iterator[tuple[TokenFeatures, TokenFeatures]]:
        """A fixed part of the training pairs in fixed order."""
        probe = self.train.probe(self.encoder.model.config.probe_size)
        return self.encoder.batches(probe, "Probe statistics", encoder_columns)

    def moments(self) -> PairMoments:
        """Of a sample of images, and all of their captions."""
        return pair_moments(self.encoder, self.train.sample(self.args.alignment_images))
