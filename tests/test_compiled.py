"""Runs `compiled_cases.py` where no shapes are checked: no compiler can look into such checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("compiled_cases.py")


@pytest.mark.parametrize(
    "marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["fast", "slow"]
)
def test_compiled_and_exported_scores_are_those_of_the_model(marked):
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q --strict-markers", "-m", marked]
    paths = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run(
        [*command, "--show-capture=no", "-rs", str(CASES)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": paths},
        cwd=CASES.parents[1],
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
