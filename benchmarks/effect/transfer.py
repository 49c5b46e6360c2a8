"""Transfer: a network trained elsewhere meets new data and 16 to 1,024 pairs or images of it.

Run: python benchmarks/effect/transfer.py  # after main_table.py, whose networks it takes; minutes
Nothing is trained. From the pairs come canonical columns, weights of the encoder columns, or
style prototypes; from the images alone comes a calibration. Pairs are drawn anew for every seed
from concepts that are in no test split.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from comparisons import evaluate_form, fuse_forms
from diagnosis import literal, statistics
from galleries import REFERENCE, calibrate, calibrated_each
from main_table import permutation
from pico_hf import PicoCollator
from pico_hf.core.canonical import CANDIDATES, bilinear_form
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.score_form import ScoreForm, column_weights
from pico_hf.training.encoding import SplitEncoder, encoder_columns, pair_moments
from study import Job, StoredSplit, Study, from_command_line, row_numbers
from towers import processor

EACH = "no pairs: every gallery calibrated by itself"
LEAST_FEEDBACK = 64  # pairs from which on a quarter of them can be spared for feedback


def target_rows(study: Study, move: dict[str, str]) -> tuple[list[int], list[int]]:
    """Row numbers that pairs are drawn from, and those of the test split.

    From photos to drawings: all styles. From some drawing families to another: that family.
    """
    rows = row_numbers("emoji/" + move["target"].removeprefix("emoji/"), study.data)
    if move["target"] == "emoji/none":
        return rows["train"], rows["seen"]
    return rows["known concepts, unseen"], rows["unseen"]


def fused(moments: PairMoments) -> Tensor:
    """Canonical columns without feedback: all candidates count alike."""
    forms = [bilinear_form(moments, candidate) for candidate in CANDIDATES]
    return fuse_forms(forms, [0.0] * len(forms))


def forms(
    encoder: SplitEncoder,
    pairs: StoredSplit,
    halves: tuple[StoredSplit, StoredSplit] | None,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """Rows that need pairs, as bilinear forms."""
    moments = pair_moments(encoder, pairs)
    form = fused(moments)
    yield "canonical", form
    basis = ScoreForm.of(form)
    order = permutation(len(form), seed)
    for name, p in (
        ("canonical, permuted w", basis.semantic_probability[order]),
        ("canonical, inverted p", 1 - basis.semantic_probability),
    ):
        yield name, basis.image_basis @ p.diag() @ basis.text_basis.t()
    wrong = PairMoments(moments.images, moments.texts, moments.text_to_image.roll(1))
    yield "canonical, mismatched pairs", fused(wrong)
    if halves is not None:
        most, rest = halves
        feedback = encoder.split(rest, "feedback", encoder_columns)
        kept = pair_moments(encoder, most)
        tried = [bilinear_form(kept, candidate) for candidate in CANDIDATES]

        def rsum(form: Tensor) -> float:
            return evaluate_form(encoder.model, feedback, form)["rsum"]

        before = rsum(torch.eye(len(form), dtype=form.dtype))
        gains = [rsum(form) - before for form in tried]
        yield "canonical, a quarter for feedback", fuse_forms(tried, gains)
    yield "encoder columns, diagonals of the forms", form.diagonal().diag()
    probability = literal(statistics(encoder, pairs, len(pairs)), prototypes=8)
    yield "encoder columns, style prototypes (paper)", column_weights(probability).double().diag()


def run(study: Study, move: dict[str, str], seed: int) -> None:
    """All rows of one source network."""
    job = Job(move["source"], move["tower"], move["loss"], seed)
    key = {"target": move["target"]}
    if study.has(row="complete", **vars(job), **key):
        return
    started = time.time()
    model = study.load(job).eval()
    encoder = SplitEncoder(model, PicoCollator(processor(job.tower)), disable_tqdm=True)
    pool, test_rows = target_rows(study, move)
    test = study.chosen("emoji", test_rows, job)
    source = study.splits(job)["train"].sample(REFERENCE)
    own = torch.eye(len(model.semantic_probability), dtype=torch.float64)

    def write(row: str, pairs: int, form: Tensor, split: Any) -> None:
        metrics = {"target": evaluate_form(model, split, form)}
        study.write(job, row, started, metrics=metrics, pairs=pairs, **key)

    plain = encoder.split(test, "test", encoder_columns)
    write("as it is", 0, own, plain)
    metrics = {"target": calibrated_each(encoder, test, source, own)}
    study.write(job, EACH, started, metrics=metrics, pairs=0, **key)
    order = random.Random(seed).sample(pool, max(study.config["pairs"]))
    for count in study.config["pairs"]:
        pairs = study.chosen("emoji", order[:count], job)
        quarter = count - count // 4
        halves = (
            study.chosen("emoji", order[:quarter], job),
            study.chosen("emoji", order[quarter:count], job),
        )
        for row, form in forms(encoder, pairs, halves if count >= LEAST_FEEDBACK else None, seed):
            write(row, count, form, plain)
        calibrate(model, pairs, source)
        moved = encoder.split(test, "test", encoder_columns)
        write("calibrated on all styles at once", count, own, moved)
        write("calibrated, then canonical", count, fused(pair_moments(encoder, pairs)), moved)
        calibrate(model, None, source)
    study.write(job, "complete", started, **key)


def main() -> None:
    study, mine = from_command_line(__doc__, __file__)
    for seed in filter(mine, study.config["seeds"]):
        for move in study.config["moves"]:
            run(study, move, seed)


if __name__ == "__main__":
    main()
