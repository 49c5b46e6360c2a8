"""Gives changed files and odd values to everything that reads: a usable value or one clear line.

    python tests/fuzz.py --inputs 50000 --seed 0      # or `make fuzz INPUTS=50000`
    python tests/fuzz.py --only images:1234 --seed 0  # one input again

Every input has a seed of its own, made of the run's seed, its target and its number. Counted as a
fault: an error that is not the package's own, several lines, a value that is not finite, more than
5 s of work, more than 1 GB, or the death of the process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import psutil

SECONDS, WAITING = 5.0, 120  # of work for an input; of silence until a process is looked at
BYTES = 10**9  # of memory above the start
BATCH = 400  # inputs of one process
SOURCE = str(Path(__file__).resolve().parents[1] / "src" / "pico_hf")


class HangError(BaseException):
    """An input took too long."""


def targets() -> dict[str, tuple[Any, int]]:
    import fuzz_targets

    return {function.__name__: (function, n) for function, n in fuzz_targets.TARGETS.items()}


def fault_of(error: BaseException) -> str | None:
    """What is wrong with an error, None if it is one clear line of the package's own."""
    if isinstance(error, HangError):
        return f"hang over {SECONDS:.0f} s"
    if isinstance(error, AssertionError):
        return f"accepted: {' '.join(str(error).split())[:120] or 'what is of no use'}"
    kind, text = type(error), str(error)
    ours = issubclass(kind, ValueError | OSError) and (
        kind.__module__ in ("builtins", "socket") or kind.__module__.startswith("pico_hf")
    )
    ours = ours and not issubclass(kind, UnicodeError)
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    if not ours:
        return f"raw {kind.__module__}.{kind.__name__} at {where}"
    if "\n" in text or not text.strip():
        return f"{len(text.splitlines())} lines of {kind.__name__} at {where}"
    if len(text) > 3000:
        return f"a line of {len(text)} characters of {kind.__name__} at {where}"
    # Said by the system, or by transformers of a file or folder that it names.
    named = isinstance(error, OSError) and (error.errno is not None or "'" in text)
    if not frames[-1].filename.startswith(SOURCE) and not named:
        return f"raw {kind.__name__} at {where}"
    return None


def outcome(name: str, function: Any, number: int, seed: int, root: Path) -> tuple[str, str]:
    """(`"value"`, `"refused"` or `"fault"`, what is wrong) of one input."""
    folder = root / f"{name}-{number}"
    folder.mkdir(parents=True)
    chance = random.Random(f"{seed}/{name}/{number}")
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of work: others may use the machine
    try:
        function(folder, chance)
        return "value", ""
    except (Exception, HangError) as error:
        fault = fault_of(error)
        text = f"{fault} | {' '.join(str(error).split())[:300]}"
        return ("refused", "") if fault is None else ("fault", text)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _hang(*_: Any) -> None:
    raise HangError


def warm(jobs: list[tuple[str, int]], seed: int, root: Path) -> None:
    """Runs one input of each target that is not counted: it makes what is made once."""
    for name in dict.fromkeys(name for name, _ in jobs):
        with contextlib.suppress(Exception):
            outcome(name, targets()[name][0], -1, seed, root)


def work(jobs: list[tuple[str, int]], seed: int, root: Path, told: Any) -> None:
    """Runs some inputs in a process of their own and tells what became of each."""
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    chosen = targets()
    signal.signal(signal.SIGPROF, _hang)
    warm(jobs, seed, root)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for name, number in jobs:
        told.send((name, number, "begun", ""))
        with contextlib.redirect_stdout(io.StringIO()):
            found = outcome(name, chosen[name][0], number, seed, root)
        told.send((name, number, *found))
    told.close()


def plan(inputs: int, wanted: list[str]) -> list[tuple[str, int]]:
    """The inputs of every target by its share, at least one of each."""
    shares = {name: share for name, (_, share) in targets().items() if name in wanted}
    total = sum(shares.values())
    counts = {name: max(1, round(inputs * share / total)) for name, share in shares.items()}
    return [(name, number) for name, count in counts.items() for number in range(count)]


def stuck(number: int) -> bool:
    """Whether a process that says nothing sleeps, or works longer than any input may."""
    process = psutil.Process(number)
    if sum(process.cpu_times()[:2]) > SECONDS * BATCH:
        return True
    return process.status() not in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


def supervise(jobs: list[tuple[str, int]], seed: int, root: Path, results: list[Any]) -> None:
    """Runs inputs in one process after another; what kills a process is a fault of its own."""
    context = multiprocessing.get_context("fork")
    rest = list(jobs)
    while rest:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(rest[:BATCH], seed, root, theirs))
        process.start()
        theirs.close()
        begun: tuple[str, int] | None = None
        try:
            while ours.poll(WAITING) or not stuck(process.pid):
                if not ours.poll():  # others use the machine
                    continue
                name, number, kind, text = ours.recv()
                begun = (name, number) if kind == "begun" else None
                if begun is None:
                    results.append((name, number, kind, text))
                    rest.remove((name, number))
            problem = f"hang: asleep for {WAITING} s, or at work without end"
        except EOFError:
            process.join()
            problem = f"the process died ({process.exitcode})"
        process.kill()
        process.join()
        if begun is not None:
            results.append((*begun, "fault", problem))
            rest.remove(begun)
        elif process.exitcode != 0:
            raise RuntimeError(f"no input was begun: {problem}, exit code {process.exitcode}")


def fuzz(inputs: int, seed: int, root: Path, wanted: list[str], minutes: float) -> list[Any]:
    """(target, number, kind, what is wrong) of every input that there was time for."""
    os.environ["PICO_FUZZ_ROOT"] = str(root)
    jobs = plan(inputs, wanted)
    random.Random(seed).shuffle(jobs)
    jobs.sort(key=lambda job: job[1] // 50)  # every target comes to its turn early
    results: list[Any] = []
    end = time.monotonic() + 60 * minutes
    shown = 0
    for start in range(0, len(jobs), BATCH):
        if time.monotonic() > end:
            break
        supervise(jobs[start : start + BATCH], seed, root, results)
        faults = [result for result in results if result[2] == "fault"]
        for name, number, _, text in faults[shown:]:
            print(f"{name}:{number} {text}", file=sys.stderr)
        shown = len(faults)
        print(f"{len(results)} of {len(jobs)} inputs, {shown} faults", file=sys.stderr, flush=True)
    return results


def table(results: list[Any], seed: int) -> str:
    """What became of the inputs, by target, and every kind of fault with an input that shows it."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    kinds: dict[str, list[Any]] = collections.defaultdict(list)
    for name, number, kind, text in results:
        counts[name][kind] += 1
        if kind == "fault":
            kinds[f"{name}: {text.split(' | ')[0]}"].append((number, text.partition(" | ")[2]))
    rows = [
        f"seed {seed}",
        "",
        "| target | inputs | values | refused | faults |",
        "|---|---|---|---|---|",
    ]
    total: collections.Counter = collections.Counter()
    for name in [name for name in targets() if name in counts]:
        total += counts[name]
        rows.append(_row(name, counts[name]))
    rows.append(_row("all", total))
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        rows.append(f"FAULT {len(found)} × {kind} [input {found[0][0]}] {found[0][1]}")
    return "\n".join(rows)


def _row(name: str, count: collections.Counter) -> str:
    numbers = (count.total(), count["value"], count["refused"], count["fault"])
    return f"| {name} | {' | '.join(map(str, numbers))} |"


def main() -> None:
    """Fuzzes, prints the table; exit status 1 if there was any fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--targets", nargs="*", default=list(targets()))
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="one input, with its traceback")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="pico-fuzz-") as root:
        os.environ["HF_DATASETS_CACHE"] = f"{root}/datasets"
        if options.only:
            os.environ["PICO_FUZZ_ROOT"] = root
            name, number = options.only.split(":")
            folder = Path(root) / "input"
            folder.mkdir()
            targets()[name][0](folder, random.Random(f"{seed}/{name}/{number}"))
            return
        results = fuzz(options.inputs, seed, Path(root), options.targets, options.minutes)
    print(table(results, seed))
    sys.exit(1 if any(kind == "fault" for _, _, kind, _ in results) else 0)


if __name__ == "__main__":
    main()
