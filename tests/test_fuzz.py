"""A few changed files and odd values; `make fuzz` tries many."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fuzz
import fuzz_targets

FUZZ = Path(fuzz.__file__)


def test_some_hundred_inputs_give_a_value_or_one_clear_line():
    done = subprocess.run(
        [sys.executable, str(FUZZ), "--inputs", "300", "--seed", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    last = [line for line in done.stdout.splitlines() if line.startswith("| all |")]
    inputs, values, refused, faults = map(int, last[0].split("|")[2:6])
    assert (inputs, faults) == (values + refused, 0)
    assert values > 20
    assert refused > 100


WHOLE = ["config", "weights", "index", "prototypes", "processor", "checkpoint", "adapter"]


@pytest.mark.parametrize("name", [*WHOLE, "cached_features", "collection"])
def test_what_is_not_changed_is_taken(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PICO_FUZZ_ROOT", str(tmp_path))
    for made in (fuzz_targets._live, fuzz_targets._trained):
        made.cache_clear()
    (tmp_path / "input").mkdir()
    fuzz.targets()[name][0](tmp_path / "input", fuzz_targets.NoChange(0))


def _raw(*_):
    json.loads("{")


def _lines(*_):
    raise ValueError("two\nlines")


def _silent(*_):
    raise ValueError("")


def _foreign(*_):
    torch.zeros(2).reshape(3)


def _hangs(*_):
    while True:
        pass


def _infinite(*_):
    fuzz_targets.finite(torch.tensor(torch.inf))


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (_raw, r"raw json\.decoder\.JSONDecodeError"),
        (_lines, "2 lines of ValueError"),
        (_silent, "0 lines of ValueError"),
        (_foreign, "raw builtins.RuntimeError"),
        (lambda *_: int("x"), "raw ValueError"),
        (lambda *_: {}["a"], "raw builtins.KeyError"),
        (_infinite, "accepted: not finite"),
    ],
)
def test_faults_are_told_from_refusals(function, fault, tmp_path):
    kind, text = fuzz.outcome("one", function, 0, 0, tmp_path)
    assert kind == "fault"
    assert re.search(fault, text)


def test_our_own_refusal_is_none(tmp_path):
    from pico_hf.data.images import as_rgb

    assert fuzz.outcome("one", lambda *_: as_rgb(b"x"), 0, 0, tmp_path) == ("refused", "")
    assert fuzz.outcome("one", lambda *_: None, 0, 0, tmp_path) == ("value", "")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are Linux's")
def test_hangs_deaths_and_large_allocations_are_faults(tmp_path, monkeypatch):
    def hungry(*_):
        return bytearray(3 * 10**9)

    harmful = {"hangs": _hangs, "dies": lambda *_: os._exit(3), "hungry": hungry}
    monkeypatch.setattr(fuzz, "targets", lambda: {n: (f, 1) for n, f in harmful.items()})
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    monkeypatch.setattr(fuzz, "warm", lambda *_: None)
    results: list = []
    fuzz.supervise([(name, 0) for name in harmful], 0, tmp_path, results)
    found = {name: text.split(" | ")[0] for name, _, kind, text in results if kind == "fault"}
    assert "hang" in found["hangs"]
    assert found["dies"] == "the process died (3)"
    assert "MemoryError" in found["hungry"]


def test_an_input_depends_on_its_seed_alone():
    chances = [random.Random(f"{seed}/images/3") for seed in (0, 0, 1)]
    made = [fuzz_targets.change_bytes(b"x" * 50, chance) for chance in chances]
    assert made[0] == made[1] != made[2]
