"""Trials: what a form would score on the dev split, the network frozen."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.metrics import NotNumbersError
from pico_hf.core.score_form import ScoreForm
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.training.evaluation import GalleryScores, gallery_scores, mean_metrics

TRIAL_PAIRS = 1_250_000  # 500 images × 2,500 captions: feedback on photos in the effect study


class DevTrials:
    """Scores forms on a split; forms that differ in the share of pooled vectors cost one scoring.

    Args:
        model: Scores.
        split: In the encoder columns.
    """

    def __init__(self, model: PreTrainedModel, split: EncodedSplit) -> None:
        self.model, self.split = model, split
        self._columns: ScoreForm | None = None
        self._pure: dict[float, list[GalleryScores]] = {}

    def __call__(self, form: ScoreForm) -> float:
        """The rSum of a form, in points; NaN if its scores hold NaN, which counts for nothing."""
        self.split.processes.copy_from_first(form.tensors())
        try:
            return mean_metrics([one.metrics() for one in self._galleries(form)])["rsum"]
        except NotNumbersError:
            return math.nan

    def _galleries(self, form: ScoreForm) -> list[GalleryScores]:
        share = form.pooled_share
        if share in (0.0, 1.0):
            return self._unmixed(form, share)
        pairs = zip(self._unmixed(form, 0.0), self._unmixed(form, 1.0), strict=True)
        return [tokens.mixed(pooled, share) for tokens, pooled in pairs]

    def _unmixed(self, form: ScoreForm, share: float) -> list[GalleryScores]:
        """Scores of tokens or pooled vectors alone, kept until other columns are tried."""
        if self._columns is None or not form.same_columns(self._columns):
            self._columns, self._pure = form, {}
        if share not in self._pure:
            tried = form._replace(pooled_share=share)
            self._pure[share] = list(gallery_scores(self.model, self.split, tried))
        return self._pure[share]


def trial_part(split: ImageTextDataset) -> ImageTextDataset:
    """Chooses the part of a split that trials rank, with at most `TRIAL_PAIRS` pairs."""
    images = split.gallery.bincount()
    captions = split.gallery[split.text_to_image].bincount()
    pairs = int(images @ captions)  # each gallery is ranked by itself
    return split.sample(int(len(split) * math.sqrt(TRIAL_PAIRS / pairs)))
