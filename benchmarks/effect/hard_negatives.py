"""Do mined hard negatives bring rSum? Photos and drawings, at the same pairs per step and steps.

Run: python benchmarks/effect/hard_negatives.py          # benchmarks/effect/hard_negatives.yaml
It goes on where it was stopped, and ends with the table of what is done. `features.py` comes first.
For every seed a network is trained with batches at random. It mines the negatives of a second one,
which starts from the same weights and takes as many steps of as many pairs: half of them drawn at
random, and one mined negative of each. What mining costs comes on top. Both are scored with equal
column weights, w = 1, and with columns that are constructed after training.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from pico_hf import PicoTrainer, mine_hard_negatives
from pico_hf.data.cached_dataset import CachedImageTextDataset
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.training.evaluation import evaluate_retrieval
from report import differences, groups, interval, lines, rsum
from study import Job, Study, from_command_line

RANDOM, MINED, ALIGNED = "at random", "mined", ", aligned"
PARTS = ("dev", "seen", "unseen")


def run(study: Study, job: Job) -> None:
    """Trains both networks of a seed and writes their scores."""
    if not study.missing(job, [RANDOM, MINED, RANDOM + ALIGNED, MINED + ALIGNED]):
        return
    splits: dict[str, Any] = study.splits(job)
    splits["train"] = splits["train"].sample(study.config["images"])
    first = trained(study, job, splits)
    report_scores(study, job, RANDOM, first, splits)
    started = time.time()
    mining = study.config["mining"]
    rows = mine_hard_negatives(first.split_encoder, splits["train"], **mining)
    seconds = round(time.time() - started, 1)
    source, stored = ImageTextDataset(rows, job.seed), splits["train"]
    mined = CachedImageTextDataset(source, stored.images(), stored.captions())
    facts = {"negatives": mined.negatives.per_pair, "mining_seconds": seconds}
    steps = first.state.max_steps
    second = trained(study, job, {**splits, "train": mined}, steps)
    report_scores(study, job, MINED, second, splits, **facts)


def trained(study: Study, job: Job, splits: dict[str, Any], steps: int = -1) -> PicoTrainer:
    """A trainer that has trained.

    Args:
        study: The study.
        job: What is trained.
        splits: Of the job; a training split with mined negatives doubles the pairs of a batch.
        steps: How many; -1: the job's epochs.
    """
    model = study.start(job)
    with torch.no_grad():
        model.pair_logits.logit_scale.fill_(math.log(study.config["scale"]))
    whole = study.config["training"]["batch_size"]
    doubled = splits["train"].negatives is not None
    study.config["training"]["batch_size"] = whole // 2 if doubled else whole
    trainer = study.trainer(job, splits, model, refine_prototypes=False, max_steps=steps)
    study.config["training"]["batch_size"] = whole
    trainer.train()
    return trainer


def report_scores(
    study: Study, job: Job, row: str, trainer: PicoTrainer, splits: dict[str, Any], **facts: Any
) -> None:
    """Writes a line of equal weights, and one of columns constructed after training."""
    parts = [part for part in PARTS if part in splits]
    encoder = trainer.split_encoder
    for name in (row, row + ALIGNED):
        started = time.time()
        if name != row:
            trainer.construct_prototypes("end")
        metrics = {
            part: evaluate_retrieval(trainer.pico_model, encoder.split(splits[part]))
            for part in parts
        }
        study.write(job, name, started, metrics=metrics, **facts)


def table(study: Study) -> str:
    """rSum of each arm and the paired difference, mean over seeds ± half of the 95 % interval."""
    found = [
        "| data, split | columns | seeds | at random | mined | difference |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for dataset, of in groups(lines(study.file), lambda line: line["dataset"]).items():
        rows = groups(of, lambda line: line["row"])
        for part in (part for part in PARTS if part in of[0]["metrics"]):
            for more, columns in (("", "w = 1"), (ALIGNED, "aligned")):
                seeds = {line["seed"] for line in rows.get(MINED + more, [])}
                base = [line for line in rows[RANDOM + more] if line["seed"] in seeds]
                if not base:
                    continue
                mined = rows[MINED + more]
                cells = [f"{dataset}, {part}", columns, str(len(base))]
                cells += [interval([rsum(line, part) for line in arm]) for arm in (base, mined)]
                found.append(
                    f"| {' | '.join(cells)} | {interval(differences(mined, base, part))} |"
                )
    return "\n".join(found)


def main() -> None:
    study, mine = from_command_line(__doc__, __file__)
    knobs = {"tower": "lite0", "loss": "infonce", "dropout": 0.3}
    for seed in filter(mine, study.config["seeds"]):
        for dataset in study.config["datasets"]:
            run(study, Job(dataset, seed=seed, **knobs))
    print(table(study))


if __name__ == "__main__":
    main()
