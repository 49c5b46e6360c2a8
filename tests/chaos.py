"""Kills short runs at random moments, resumes them, and compares the end with undisturbed runs.

    python tests/chaos.py --kills 30 --minutes 10 --seed 0      # or `make chaos`

A run trains a tiny encoder on a few of the embedded drawings. `kill -9` hits it at a random moment
of a random phase, again and again, until it comes to its end; then every tensor of the saved model
must be equal to the bit to that of a run that nobody disturbed. Nothing is deleted by hand.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pico_hf import PicoModel, PicoTrainer, PicoTrainingArguments, load_image_text
from pico_hf.training import checkpoints, resumable
from tiny import tiny_encoder, tiny_processor
from tiny_trainer import TINY_RUN

TESTS = Path(__file__).resolve().parent
DRAWINGS = TESTS.parent / "examples" / "data" / "emoji-styles"
RUNS = {  # style prototypes in the middle of epochs alone; and with all else at the end
    "style": {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1},
    "all": {"save_strategy": "epoch", "save_total_limit": 2},
}
ESTIMATORS = {"style": ["style"], "all": ["style", "canonical", "pooled"]}
# Phase → what is being done in it: an attribute of an object that is wrapped in the child.
PHASES: dict[str, tuple[Any, str]] = {
    "resuming": (resumable, "chosen_checkpoint"),
    "tidying": (resumable, "tidy"),
    "training": (PicoTrainer, "training_step"),
    "evaluating": (PicoTrainer, "evaluation_loop"),
    "building weights": (PicoTrainer, "construct_prototypes"),
    "saving": (PicoTrainer, "_save_checkpoint"),
    "renaming": (resumable, "put_in_place"),
    "removing": (checkpoints, "remove"),
    "pruning": (resumable, "prune"),
    "loading the best": (PicoTrainer, "_load_best_model"),
    "saving the end": (PicoTrainer, "save_model"),
}


@dataclass
class Tally:
    """What happened to the kills of one phase."""

    kills: int = 0
    exact: int = 0


@dataclass
class Report:
    """What came of all runs.

    Attributes:
        phases: Phase → kills, and how many of them were in runs that ended exactly.
        runs: Runs that came to their end.
        wrong: What was wrong, empty if nothing was.
    """

    phases: dict[str, Tally] = field(default_factory=lambda: collections.defaultdict(Tally))
    runs: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(tally.kills for tally in self.phases.values())

    def table(self) -> str:
        rows = ["| phase | kills | resumed exactly |", "|---|---|---|"]
        order = ["loading", *PHASES, "between"]
        for name in sorted(self.phases, key=order.index):
            rows.append(f"| {name} | {self.phases[name].kills} | {self.phases[name].exact} |")
        exact = sum(tally.exact for tally in self.phases.values())
        return "\n".join([*rows, f"| all, in {self.runs} runs | {self.kills} | {exact} |"])


def build(folder: Path, kind: str) -> PicoTrainer:
    """The trainer of a run; equal calls train alike."""
    columns = {"image_id_column": "concept", "gallery_column": "style"}
    train, dev = (
        load_image_text(files=DRAWINGS / f"{name}.parquet", max_samples=limit, **columns)
        for name, limit in (("train", 40), ("validation_seen", 20))
    )
    torch.manual_seed(0)
    model = PicoModel.from_encoder(
        tiny_encoder(), num_prototypes=3, probe_size=16, estimators=ESTIMATORS[kind]
    )
    args = {"num_train_epochs": 3, **TINY_RUN, **RUNS[kind]}
    args = PicoTrainingArguments(output_dir=str(folder), **args)
    return PicoTrainer(model, args, train, dev, processing_class=tiny_processor())


def child(folder: Path, kind: str, told: Connection) -> None:
    """Trains, or goes on where a run was killed, and says in which phase it is."""
    quiet = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    stack = ["between"]

    def watched(phase: str, function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            stack.append(phase)
            told.send(phase)
            try:
                return function(*args, **kwargs)
            finally:
                stack.pop()
                told.send(stack[-1])

        return call

    for phase, (owner, name) in PHASES.items():
        setattr(owner, name, watched(phase, getattr(owner, name)))
    told.send("loading")
    trainer = build(folder, kind)
    told.send("between")
    there = [path for path in checkpoints.checkpoints(folder) if checkpoints.damage(path)]
    if there:
        raise AssertionError(f"not whole, but has its name: {there}")
    waiting = folder / checkpoints.SAVING
    staged = [path for path in waiting.glob("*") if checkpoints.damage(path) is None]
    trainer.train(resume_from_checkpoint=bool(checkpoints.checkpoints(folder) or staged))
    trainer.save_model()
    rest = sorted(path.name for path in folder.glob("_*") if path.name != "_run.lock")
    if rest:
        raise AssertionError(f"left behind: {rest}")
    (folder / "done.json").write_text(json.dumps(trainer.state.best_metric))


def start(folder: Path, kind: str) -> tuple[Any, Connection]:
    """A run in a process that needs not import anything first."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=child, args=(folder, kind, theirs))
    process.start()
    theirs.close()
    return process, ours


def phases_of(process: Any, told: Connection) -> dict[str, list[float]]:
    """Phase → how long each of its calls took, of a run that nobody disturbs."""
    spent: dict[str, list[float]] = {}
    phase, since = "loading", time.monotonic()
    while True:
        try:
            following = told.recv()
        except EOFError:
            process.join()
            return spent
        now = time.monotonic()
        spent.setdefault(phase, []).append(now - since)
        phase, since = following, now


def kill(process: Any, told: Connection, phase: str, call: int, delay: float) -> str | None:
    """Kills a run after a delay in a phase's call; the phase that it hit, None if it was over."""
    now, seen, deadline = "loading", 0, None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if deadline is not None and not told.poll(left):
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            while told.poll():  # it may have gone on meanwhile
                try:
                    now = told.recv()
                except EOFError:
                    break
            return now if process.exitcode == -signal.SIGKILL else None
        try:
            now = told.recv()
        except EOFError:
            process.join()
            return None
        if now == phase and deadline is None:
            seen += 1
            if seen > call:
                deadline = time.monotonic() + delay


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def differences(folder: Path, undisturbed: Path) -> list[str]:
    """What is not as in the undisturbed run, to the bit."""
    one, other = weights(folder), weights(undisturbed)
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    changed = [name for name in one if not torch.equal(one[name], other[name])]
    best = [(path / "done.json").read_text() for path in (folder, undisturbed)]
    return changed + (["best metric"] if best[0] != best[1] else [])


def disturb(
    folder: Path, kind: str, chance: random.Random, spent: dict[str, list[float]], limit: int
) -> tuple[list[str], str | None]:
    """Kills a run up to `limit` times and lets it end: phases that were hit, and what failed."""
    hit: list[str] = []
    while True:
        process, told = start(folder, kind)
        if len(hit) < limit:
            phase = chance.choice(sorted(spent) + (["resuming", "tidying"] if hit else []))
            times = spent.get(phase, [0.005])
            call = chance.randrange(len(times))
            found = kill(process, told, phase, call, chance.uniform(0, times[call]))
            if found is not None:
                hit.append(found)
                continue
        else:
            phases_of(process, told)
        if process.exitcode != 0:
            lines = folder.with_suffix(".log").read_text().strip().splitlines()
            return hit, lines[-1] if lines else f"exit code {process.exitcode}"
        return hit, None


def chaos(kills: int, minutes: float, seed: int, root: Path, per_run: int = 4) -> Report:
    """Kills runs until there were so many kills or the time is over.

    Args:
        kills: How many.
        minutes: How long at most; a run that was begun comes to its end.
        seed: Of phases and moments.
        root: Where the runs write.
        per_run: Kills of one run at most.
    """
    torch.set_num_threads(1)  # before processes are forked
    chance, report = random.Random(seed), Report()
    end = time.monotonic() + 60 * minutes
    spent = {}
    for kind in RUNS:
        spent[kind] = phases_of(*start(root / f"undisturbed-{kind}", kind))
    while report.kills < kills and time.monotonic() < end:
        kind = sorted(RUNS)[report.runs % len(RUNS)]
        folder, limit = root / f"run-{report.runs}", min(per_run, kills - report.kills)
        hit, failed = disturb(folder, kind, chance, spent[kind], limit)
        wrong = [failed] if failed else differences(folder, root / f"undisturbed-{kind}")
        for phase in hit:
            report.phases[phase].kills += 1
            report.phases[phase].exact += not wrong
        report.wrong += [f"{kind} {folder.name}, killed while {hit}: {w}" for w in wrong[:3]]
        report.runs += 1
        print(f"{folder.name} {kind}: killed while {', '.join(hit) or '-'}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return report


def main() -> None:
    """Kills, resumes, compares, prints the table; exit status 1 if anything was not exact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pico-chaos-") as root:
        os.environ["PICO_HF_CACHE"] = f"{root}/cache"
        report = chaos(options.kills, options.minutes, seed, Path(root))
    print(f"\n{report.table()}\n\nDeleted by hand: none.")
    for line in report.wrong:
        print(f"NOT EXACT: {line}")
    sys.exit(1 if report.wrong or not report.kills else 0)


if __name__ == "__main__":
    main()
