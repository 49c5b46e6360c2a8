"""Recipes compared: the default for new heads on frozen towers against the best one with w = 1.

Run: python benchmarks/effect/recipe.py   # after features.py, icons included; an hour on one core
Every recipe is trained from the same seed and scored as it is (w = 1), by its pooled vectors alone,
and after its feedback: the share of pooled vectors, canonical columns, and the share again.
"""

from __future__ import annotations

import time
from typing import Any

from pico_hf import PicoModel, PicoTrainer
from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.pooled_share import SHARES
from pico_hf.training.evaluation import evaluate_retrieval
from pico_hf.training.trials import DevTrials
from study import Job, Study, from_command_line

TESTS = ("dev", "seen", "unseen", "themes", "new style", "old styles")
Metrics = dict[str, dict[str, float]]


def encoded(trainer: PicoTrainer, splits: dict[str, Any]) -> dict[str, EncodedSplit]:
    """The test splits in the columns that the model has now."""
    names = [name for name in TESTS if name in splits]
    return {name: trainer.split_encoder.split(splits[name], name) for name in names}


def before(trainer: PicoTrainer, splits: dict[str, Any]) -> tuple[dict[str, Metrics], float]:
    """Rows before any feedback on columns, and the pooled share that feedback would take."""
    model, encoder = trainer.pico_model, trainer.split_encoder
    own = model.prototypes.form
    trial = DevTrials(model, encoder.split(splits["feedback"], "feedback"))
    share = max(SHARES, key=lambda tried: trial(own._replace(pooled_share=tried)))
    found = encoded(trainer, splits)
    rows = {"w = 1": 0.0, "w = 1, pooled": share, "pooled cosine": 1.0}
    return {
        row: {
            name: evaluate_retrieval(model, one, own._replace(pooled_share=tried))
            for name, one in found.items()
        }
        for row, tried in rows.items()
    }, share


def after(trainer: PicoTrainer, splits: dict[str, Any], constructed: bool = False) -> Metrics:
    """The row with everything that feedback found, or is to find unless all is constructed."""
    if not constructed:
        trainer.construct_prototypes()
    model = trainer.pico_model
    return {name: evaluate_retrieval(model, one) for name, one in encoded(trainer, splits).items()}


def run(study: Study, job: Job, recipe: str, seed_started: float) -> None:
    """Trains one recipe with one seed and writes its rows."""
    knobs = study.config["recipes"][recipe]
    splits = study.splits(job)
    if job.dataset != "flickr8k":
        splits["themes"] = study.unseen_themes(job)
    model: PicoModel = study.start(job, **knobs.get("model", {}))
    trainer = study.trainer(job, splits, model, refine_prototypes=False, **knobs["training"])
    trainer.train()
    rows, share = before(trainer, splits)
    for row, metrics in rows.items():
        study.write(job, row, seed_started, metrics=metrics, recipe=recipe, share=share)
    if knobs.get("feedback", True):
        metrics = after(trainer, splits)
        values = {"share": model.pooled_share, "spread": float(model.column_weights.std())}
        study.write(job, "feedback", seed_started, metrics=metrics, recipe=recipe, **values)
    study.write(job, "complete", seed_started, recipe=recipe)


def main() -> None:
    study, mine = from_command_line(__doc__, __file__)
    for recipe, knobs in study.config["recipes"].items():
        for entry in study.config["jobs"]:
            for seed in filter(mine, study.config["seeds"]):
                job = Job(**entry, seed=seed, **knobs["job"])
                if entry["dataset"] not in knobs.get("only", [entry["dataset"]]):
                    continue
                if not study.has(row="complete", recipe=recipe, **vars(job)):
                    run(study, job, recipe, time.time())


if __name__ == "__main__":
    main()
