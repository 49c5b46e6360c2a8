"""Diagnosis: what columns of high and low probability encode, and how τ, K and R matter.

Run: python benchmarks/effect/diagnosis.py  # after main_table.py, whose networks it takes; minutes
A set of columns is probed by what can be read from the mean patch in these columns alone: the
drawing style, by logistic regression from training images to the seen test split, and the
concept, by whether the nearest image of another style shows the same one (R@1).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from comparisons import evaluate_form, fuse_forms
from galleries import REFERENCE, calibrated_each
from pico_hf import PicoCollator
from pico_hf.core.canonical import CANDIDATES, bilinear_form
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.score_form import ScoreForm, column_weights
from pico_hf.core.semantic import ColumnStatistics, column_statistics
from pico_hf.core.style import StyleClusters
from pico_hf.training.encoding import SplitEncoder, encoder_columns, pair_moments
from pico_hf.training.evaluation import evaluate_retrieval
from pico_hf.training.feedback import Feedback
from study import Job, StoredSplit, Study, from_command_line
from towers import processor


def mean_patches(encoder: SplitEncoder, split: StoredSplit) -> Tensor:
    """(images, columns) in the encoder columns."""
    batches = encoder.batches(split.images(), "Means", encoder_columns)
    return torch.cat([image.features.mean(dim=1) for image, _ in batches])


def style_accuracy(train: Tensor, styles: list[str], test: Tensor, truth: list[str]) -> float:
    """Percentage of images whose drawing style is read off these columns."""
    scale = train.std(dim=0).clamp(min=1e-6)
    probe = LogisticRegression(max_iter=300).fit((train / scale).numpy(), styles)
    return 100.0 * float(probe.score((test / scale).numpy(), truth))


def concept_recall(features: Tensor, styles: list[str], concepts: list[str]) -> float:
    """R@1 in percent, among the images of all other styles."""
    unit = torch.nn.functional.normalize(features - features.mean(dim=0), dim=1)
    scores = unit @ unit.t()
    style, concept = (_codes(names) for names in (styles, concepts))
    scores[style.unsqueeze(1) == style] = -torch.inf
    found = concept[scores.argmax(dim=1)] == concept
    return 100.0 * found.double().mean().item()


def _codes(names: list[str]) -> Tensor:
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names])


def statistics(encoder: SplitEncoder, split: StoredSplit, size: int) -> ColumnStatistics:
    """Column statistics of a probe set of `size` pairs."""
    batches = encoder.batches(split.probe(size), "Probe", encoder_columns)
    return ColumnStatistics.concatenate([column_statistics(*pair) for pair in batches])


def literal(probe: ColumnStatistics, prototypes: int) -> Tensor:
    """Semantic probability of the encoder columns, from one iteration."""
    module = StylePrototypes(len(probe.positive), prototypes, probe.image_columns.shape[1])
    (proposal,) = StyleClusters().propose(module, probe)
    return StyleClusters().probability(probe, *proposal)


def run(study: Study, job: Job) -> None:
    if study.has(row="complete", **vars(job)):
        return
    started = time.time()
    write = partial(study.write, job, started=started)
    model, splits = study.load(job).eval(), study.splits(job)
    encoder = SplitEncoder(model, PicoCollator(processor(job.tower)), disable_tqdm=True)
    feedback = encoder.split(splits["feedback"], "feedback", encoder_columns)
    tests = {
        part: encoder.split(splits[part], part, encoder_columns) for part in ("seen", "unseen")
    }

    def measure(form: Tensor) -> dict[str, dict[str, float]]:
        return {part: evaluate_form(model, split, form) for part, split in tests.items()}

    own = torch.eye(len(model.semantic_probability), dtype=torch.float64)
    before = evaluate_form(model, feedback, own)["rsum"]
    write("w = 1 (base)", metrics=measure(own))
    for images in study.config["images"]:
        moments = pair_moments(encoder, splits["train"].sample(images))
        candidates = [bilinear_form(moments, candidate) for candidate in CANDIDATES]
        gains = [evaluate_form(model, feedback, form)["rsum"] - before for form in candidates]
        write("canonical", metrics=measure(fuse_forms(candidates, gains)), images=images)
    for tau in study.config["temperatures"]:  # with the most images
        form = fuse_forms(candidates, gains, temperature=tau)
        write("canonical", metrics=measure(form), tau=tau)
    fused = fuse_forms(candidates, gains)
    reference = splits["train"].sample(REFERENCE)
    for row, form in (("w = 1", own), ("canonical", fused)):
        metrics = {part: calibrated_each(encoder, splits[part], reference, form) for part in tests}
        write(f"{row}, galleries calibrated", metrics=metrics)
    basis = ScoreForm.of(fused)
    largest = statistics(encoder, splits["train"], max(study.config["probes"]))
    for probes in study.config["probes"]:
        probe = statistics(encoder, splits["train"], probes)
        for prototypes in study.config["prototypes"]:
            weights = column_weights(literal(probe, prototypes))
            spread = float(weights.std(correction=0))
            form = weights.double().diag()
            write("paper", metrics=measure(form), K=prototypes, R=probes, spread=spread)
    estimators = {
        "canonical": (basis.image_basis, basis.semantic_probability),
        "paper": (own, literal(largest, 8)),
        "p̂": (own, largest.pseudo_semantic_probability),
    }
    probe_columns(encoder, splits, estimators, study.config["quarter"], job.seed, write)
    write("complete")


def probe_columns(
    encoder: SplitEncoder,
    splits: dict[str, StoredSplit],
    estimators: dict[str, tuple[Tensor, Tensor]],
    size: int,
    seed: int,
    write: Callable[..., None],
) -> None:
    """What the columns with the highest, the lowest and any probability encode.

    Args:
        encoder: Gives the encoder columns.
        splits: Probes are fitted on `train` and read on `seen`.
        estimators: (basis, probability of its columns) by name.
        size: Columns in a set.
        seed: Of the random set.
        write: Takes the row's name and what was measured.
    """
    sides = {part: mean_patches(encoder, splits[part]) for part in ("train", "seen")}
    names = {part: (splits[part].rows["gallery"], splits[part].rows["image_id"]) for part in sides}
    for estimator, (basis, probability) in estimators.items():
        order = probability.argsort(descending=True)
        generator = torch.Generator().manual_seed(seed)
        sets = {"highest p": order[:size], "lowest p": order[-size:]}
        sets["random"] = torch.randperm(len(order), generator=generator)[:size]
        for name, columns in sets.items():
            read = {part: (side @ basis.float())[:, columns] for part, side in sides.items()}
            write(
                "probe",
                estimator=estimator,
                columns=name,
                style=style_accuracy(
                    read["train"], names["train"][0], read["seen"], names["seen"][0]
                ),
                concept=concept_recall(read["seen"], *names["seen"]),
            )


def run_periods(study: Study, job: Job) -> None:
    """Trains with the literal reconstruction, refined every so many epochs."""
    row, periods = "paper in training", study.config["periods"]
    missing = [n for n in periods if not study.has(row=row, period=n, **vars(job))]
    if not missing:
        return
    splits = study.splits(job)
    epochs = study.schedule(job)["num_train_epochs"]
    for period in missing:
        started = time.time()
        every = {"eval_strategy": "steps", "eval_steps": period / epochs}  # a share of all steps
        model = study.start(job, estimators=["style"])
        trainer = study.trainer(job, splits, model, **every)
        trainer.feedback_class = partial(Feedback, guarded=False)
        trainer.train()
        encoder = trainer.split_encoder
        metrics = {
            part: evaluate_retrieval(model, encoder.split(splits[part]))
            for part in ("seen", "unseen")
        }
        study.write(job, row, started, metrics=metrics, period=period)


def main() -> None:
    study, mine = from_command_line(__doc__, __file__)
    for network in study.config["networks"]:
        for seed in filter(mine, study.config["seeds"]):
            job = Job(**network, seed=seed)
            run(study, job)
            run_periods(study, job)


if __name__ == "__main__":
    main()
