"""The main table: what column weights bring, literal and canonical, beside controls and peers.

Run: python benchmarks/effect/main_table.py            # benchmarks/effect/main_table.yaml, hours
     python benchmarks/effect/main_table.py --part 0/2 # and 1/2: two processes share the seeds
`features.py` comes first. Every job trains its base, w = 1, once. Rows of canonical columns are
estimated on that network when it is done; rows that weigh columns while the projections are trained
train a network each, from the same start and in the same order of the data. Lines that are in the
file of results already are not run again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comparisons import (
    FUSION_RULES,
    Inverted,
    Mismatched,
    Permuted,
    Pseudo,
    evaluate_form,
    fuse_forms,
    given_gains,
)
from peers import PEERS
from pico_hf import PicoTrainer
from pico_hf.core.canonical import CANDIDATES, bilinear_form
from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.score_form import ScoreForm, compared_forms
from pico_hf.training.encoding import encoder_columns, pair_moments
from pico_hf.training.evaluation import evaluate_retrieval
from pico_hf.training.feedback import Feedback
from study import Job, StoredSplit, Study, from_command_line

BASE, CHOSEN = "w = 1 (base)", "canonical, normalised gain"
COSINE = "pooled cosine of the same network"
LITERAL_PICO = "paper, normalised gain (literal PICO)"
# Literal rows: what takes the place of the method's own estimator or fusion rule.
LITERAL: dict[str, dict[str, Any]] = {
    "p̂ only": {"style": Pseudo()},
    LITERAL_PICO: {},
    "paper, last": {"fusion": FUSION_RULES["last"]},
    "paper, uniform mean": {"fusion": FUSION_RULES["uniform"]},
    "paper, EMA 0.9": {"fusion": FUSION_RULES["ema"]},
    "paper, gated EMA": {"fusion": FUSION_RULES["gated_ema"]},
    "paper, shuffled Δ": {"shuffled": True},
    "paper, permuted w": {"permuted": True},
    "paper, inverted p": {"style": Inverted()},
    "p̂ of mismatched pairs": {"style": Mismatched()},
}
FUSION_LABELS = {"last": "last", "uniform": "uniform mean", "ema": "EMA 0.9"}
FUSION_LABELS |= {"gated_ema": "gated EMA"}


def permutation(columns: int, seed: int) -> Tensor:
    return torch.randperm(columns, generator=torch.Generator().manual_seed(1000 + seed))


# ---- rows that weigh columns in training ---------------------------------------------------------


def control(study: Study, job: Job, trainer: PicoTrainer, wanted: dict[str, Any]) -> None:
    """Gives the trainer's feedback what a row wants in place of the method's own."""
    given = {"fusion": wanted["fusion"]} if "fusion" in wanted else {}
    source = wanted.get("style")
    if wanted.get("permuted"):
        columns = len(trainer.pico_model.semantic_probability)
        source = Permuted(permutation(columns, job.seed))
    if source is not None:
        given["sources"] = {"style": source}
    if wanted.get("shuffled"):
        of = {"row": LITERAL_PICO, **vars(job)}
        lines = (line for line in study.done() if all(line.get(k) == v for k, v in of.items()))
        given["fusion"] = given_gains(next(lines)["gains"], job.seed)
    # Literally: what was proposed is taken, whatever it scores.
    trainer.feedback_class = partial(Feedback, guarded=False, **given)


def run_literal(study: Study, job: Job, rows: list[str]) -> None:
    """Trains one network per literal row that is missing."""
    missing = study.missing(job, rows)
    if not missing:
        return
    splits = study.splits(job)
    for row in missing:
        started = time.time()
        model = study.start(job, estimators=["style"])
        trainer = study.trainer(job, splits, model, eval_strategy="epoch")
        control(study, job, trainer, LITERAL[row])
        trainer.train()
        log = trainer.state.log_history
        study.write(
            job,
            row,
            started,
            metrics=scores(trainer, splits),
            spread=float(model.column_weights.std(correction=0)),
            gains=[e["pico_style_feedback"] for e in log if "pico_style_feedback" in e],
        )


def scores(trainer: PicoTrainer, splits: dict[str, StoredSplit]) -> dict[str, dict[str, float]]:
    """Metrics of every test split."""
    encoder = trainer.split_encoder
    return {
        part: evaluate_retrieval(trainer.pico_model, encoder.split(splits[part]))
        for part in tests(splits)
    }


def tests(splits: dict[str, StoredSplit]) -> list[str]:
    """Names of the splits that numbers are reported on."""
    return [part for part in splits if part not in ("train", "feedback")]


# ---- rows on the trained base --------------------------------------------------------------


def canonical_forms(
    trainer: PicoTrainer,
    splits: dict[str, StoredSplit],
    feedback: EncodedSplit,
    seed: int,
    only: bool,
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Rows of canonical columns as bilinear forms: the fusion rules, then the controls."""
    encoder, model = trainer.split_encoder, trainer.pico_model

    def trial(form: Tensor) -> float:
        return evaluate_form(model, feedback, form)["rsum"]

    own = torch.eye(model.config.encoder_config.projection_dim, dtype=torch.float64)
    before = trial(own)

    def tried(moments: Any) -> tuple[list[Tensor], list[float]]:
        forms = [bilinear_form(moments, candidate) for candidate in CANDIDATES]
        return forms, [trial(form) - before for form in forms]

    moments = pair_moments(encoder, splits["train"])
    forms, gains = tried(moments)
    fused = fuse_forms(forms, gains)
    yield CHOSEN, fused, {"gains": gains}
    basis = ScoreForm.of(fused)
    order = permutation(len(own), seed)

    def weighed(probability: Tensor) -> Tensor:
        return basis.image_basis @ probability.diag() @ basis.text_basis.t()

    yield "canonical, permuted w", weighed(basis.semantic_probability[order]), {}
    yield "canonical, inverted p", weighed(1 - basis.semantic_probability), {}
    if only:
        return
    yield "canonical, w = 1", weighed(torch.ones_like(basis.semantic_probability)), {}
    for rule in FUSION_RULES:
        if rule in FUSION_LABELS:
            yield (
                f"canonical, {FUSION_LABELS[rule]}",
                fuse_forms(forms, gains, FUSION_RULES[rule]),
                {},
            )
    shuffled = random.Random(seed).sample(gains, len(gains))
    yield "canonical, shuffled Δ", fuse_forms(forms, shuffled), {}
    wrong = moments.text_to_image.roll(len(moments.text_to_image) // 2)
    others, their_gains = tried(type(moments)(moments.images, moments.texts, wrong))
    yield "canonical, mismatched pairs", fuse_forms(others, their_gains), {}
    diagonals = [form.diagonal().diag() for form in forms]
    gains = [trial(form) - before for form in diagonals]
    yield "encoder columns, diagonals of the forms", fuse_forms(diagonals, gains), {}


def run_peers(study: Study, job: Job) -> None:
    """Pooled embeddings trained alike, and what is learned by gradient on the trained base."""
    missing = study.missing(job, ("pooled cosine", *PEERS))
    if not missing:
        return
    splits = study.splits(job)
    trainer = study.trainer(job, splits, study.load(job), refine_prototypes=False)
    encoded = {part: trainer.split_encoder.split(splits[part], part) for part in tests(splits)}
    for row in missing:
        started = time.time()
        if row == "pooled cosine":
            pooled = study.splits(job, pooled=True)
            other = study.trainer(job, pooled, refine_prototypes=False)
            other.train()
            metrics = scores(other, pooled)
        else:
            metrics = PEERS[row](trainer, encoded)
        study.write(job, row, started, metrics=metrics)


def run_trained(study: Study, job: Job, rows: str) -> None:
    """Trains the base, unless it is kept, and scores every row that is estimated on it."""
    if study.has(row="complete", **vars(job), rows=rows):
        return
    started = time.time()
    splits = study.splits(job)
    kept = study.network(job).exists()
    model = study.load(job) if kept else None
    trainer = study.trainer(job, splits, model, refine_prototypes=False)
    if not kept:
        trainer.train()
        if job.tuned is None:
            study.save(job, trainer.pico_model)
    model, encoder = trainer.pico_model, trainer.split_encoder
    encoded = {part: encoder.split(splits[part], part, encoder_columns) for part in tests(splits)}
    write = partial(study.write, job, started=started)

    def measure(form: Tensor) -> dict[str, dict[str, float]]:
        return {part: evaluate_form(model, split, form) for part, split in encoded.items()}

    own = torch.eye(model.config.encoder_config.projection_dim, dtype=torch.float64)
    write(row=BASE, metrics=measure(own), spread=0.0)
    cosine = compared_forms(model.prototypes.form)["pooled cosine"]
    found = {part: evaluate_retrieval(model, split, cosine) for part, split in encoded.items()}
    write(row=COSINE, metrics=found)
    feedback = encoder.split(splits["feedback"], "feedback", encoder_columns)
    for row, form, more in canonical_forms(trainer, splits, feedback, job.seed, rows == "chief"):
        values = torch.linalg.svdvals(form)
        spread = float((values / values.mean()).std(correction=0))
        write(row=row, metrics=measure(form), spread=spread, **more)
    write(row="complete", rows=rows)


def main() -> None:
    study, mine = from_command_line(__doc__, __file__)
    chosen = []
    for entry in study.config["jobs"]:
        rows = entry.pop("rows")
        literal = entry.pop("literal", [*LITERAL] if rows == "all" else [])
        jobs = [Job(**entry, seed=seed) for seed in filter(mine, study.config["seeds"])]
        chosen += [(job, rows, literal) for job in jobs]
    for job, rows, _ in chosen:
        run_trained(study, job, rows)
    for job, rows, literal in reversed(chosen):
        run_literal(study, job, literal)
        if rows == "all":
            run_peers(study, job)


if __name__ == "__main__":
    main()
