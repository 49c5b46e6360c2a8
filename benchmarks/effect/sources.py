"""Style prototypes while a network is trained, at its end only, or not at all: what do they bring?

Run: python benchmarks/effect/sources.py   # after features.py; an hour and a half on one core
Every loss and seed trains two networks from one start: one with uniform weights, which is then
scored with and without a proposal of style prototypes, and one that constructs them at every
evaluation. Canonical columns and the share of pooled vectors are found at the end of all three.
"""

from __future__ import annotations

import time
from typing import Any

from pico_hf import PicoTrainer
from pico_hf.training.feedback_log import logged_refinements
from recipe import after
from study import Job, Study, from_command_line

WITHOUT, AT_END, IN_TRAINING = "without", "proposed at the end", "in training and at the end"


def run(study: Study, job: Job, started: float) -> None:
    """Trains both networks of one seed and writes their rows."""
    splits = study.splits(job)
    knobs = study.config["model"]
    trainer = study.trainer(
        job, splits, study.start(job, **knobs), refine_prototypes=False, **study.config["run"]
    )
    trainer.train()
    write(study, job, WITHOUT, started, trainer, splits)
    trainer.feedback.restart()
    trainer.pico_model.prototypes.share_score(knobs["pooled_share"])
    trainer.construct_prototypes("training")
    write(study, job, AT_END, started, trainer, splits)

    trainer = study.trainer(
        job, splits, study.start(job, **knobs), eval_strategy="epoch", **study.config["run"]
    )
    trainer.train()  # constructs at every evaluation and at the end
    write(study, job, IN_TRAINING, started, trainer, splits, constructed=True)
    study.write(job, "complete", started)


def write(
    study: Study,
    job: Job,
    row: str,
    started: float,
    trainer: PicoTrainer,
    splits: dict[str, Any],
    constructed: bool = False,
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
            if not study.has(row="complete", **vars(job)):
                run(study, job, time.time())


if __name__ == "__main__":
    main()
