"""Style prototypes while a network is trained, at its end only, or not at all: what do they bring?

Run: python benchmarks/effect/sources.py   # after features.py; an hour and a half on one core
Every loss and seed trains three networks from one start: one with uniform weights, which is then
scored with and without a proposal of style prototypes; one that constructs them at every
evaluation; and one that takes them whatever they bring, as the paper does. Canonical columns and
the share of pooled vectors are found at the end of all, never worse than what is there.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from pico_hf import PicoTrainer
from pico_hf.core.construction import Refinement
from pico_hf.training.feedback import Feedback
from pico_hf.training.feedback_log import logged_refinements
from recipe import after
from study import Job, Study, from_command_line

WITHOUT, AT_END, IN_TRAINING = "without", "proposed at the end", "in training and at the end"
UNGUARDED = "in training, always taken"


class Unguarded(Feedback):
    """Takes what is proposed in training whatever it brings; the guard stands at the end."""

    def construct(self, when: str | None = None) -> list[Refinement]:
        return Feedback.construct(replace(self, guarded=when != "training"), when)


def run(study: Study, job: Job, row: str) -> None:
    """Trains the network of a row and writes its lines."""
    started, splits, knobs = time.time(), study.splits(job), study.config["model"]
    how: dict[str, Any] = {"eval_strategy": "epoch"} | study.config["run"]
    if row == WITHOUT:
        how |= {"eval_strategy": "no", "refine_prototypes": False}
    trainer = study.trainer(job, splits, study.start(job, **knobs), **how)
    if row == UNGUARDED:
        trainer.feedback_class = Unguarded
    trainer.train()  # constructs at every evaluation and at the end
    write(study, job, row, started, trainer, splits, constructed=row != WITHOUT)
    if row == WITHOUT:
        trainer.feedback.restart()
        trainer.pico_model.prototypes.share_score(knobs["pooled_share"])
        trainer.construct_prototypes("training")
        write(study, job, AT_END, started, trainer, splits, constructed=False)


def write(
    study: Study,
    job: Job,
    row: str,
    started: float,
    trainer: PicoTrainer,
    splits: dict[str, Any],
    constructed: bool,
) -> None:
    """A line with what the proposals of style prototypes brought, and how many were taken."""
    metrics = after(trainer, splits, constructed)
    proposed = logged_refinements(trainer.state.log_history)
    style = [entry for entry in proposed if entry["source"] == "style"]
    study.write(
        job,
        row,
        started,
        metrics=metrics,
        gains=[entry["feedback"] for entry in style],
        taken=sum(entry["fused_weight"] > 0 for entry in style),
        spread=float(trainer.pico_model.column_weights.std()),
        share=trainer.pico_model.pooled_share,
    )


def main() -> None:
    study, mine = from_command_line(__doc__, __file__)
    for seed in filter(mine, study.config["seeds"]):
        for entry in study.config["jobs"]:
            job = Job(**entry, seed=seed)
            for row in study.missing(job, (WITHOUT, IN_TRAINING, UNGUARDED)):
                run(study, job, row)


if __name__ == "__main__":
    main()
