"""Calibration (`model.calibrate`) where images are stored features, gallery by gallery."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from comparisons import evaluate_form
from pico_hf import PicoModel
from pico_hf.training.encoding import SplitEncoder, encoder_columns
from study import StoredSplit

REFERENCE = 1024  # images like those of the training, to which a gallery's statistics are brought


def calibrate(model: PicoModel, images: StoredSplit | None, reference: StoredSplit) -> None:
    """From now on as if these images' statistics were the reference's; None: as before."""
    if images is None:
        model.calibrate(None)
        return

    def batches(split: StoredSplit) -> Iterator[dict[str, Tensor]]:
        for row in split.images():
            yield {"image_hidden_states": row["image_hidden_states"].unsqueeze(0)}

    model.calibrate(batches(images), reference=batches(reference))


def calibrated_each(
    encoder: SplitEncoder, split: StoredSplit, reference: StoredSplit, form: Tensor
) -> dict[str, float]:
    """Metrics of a split whose galleries are calibrated by themselves, without pairs or labels.

    Args:
        encoder: Gives the encoder columns.
        split: Of several galleries, one style each.
        reference: Of the training data.
        form: Bilinear form that scores are taken with.
    """
    every = []
    for gallery in split.gallery.unique():
        rows = (split.gallery == gallery).nonzero().flatten().tolist()
        part = split.part(rows)
        calibrate(encoder.model, part, reference)
        encoded = encoder.split(part, "gallery", encoder_columns)
        every.append(evaluate_form(encoder.model, encoded, form))
    calibrate(encoder.model, None, reference)
    return {name: sum(metrics[name] for metrics in every) / len(every) for name in every[0]}
