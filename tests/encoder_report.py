"""Runs the tests of every architecture and prints them as a table: `make encoders`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tiny_encoders import BUILDERS

COLUMNS = {
    "test_wrapped_features_are_those_of_the_bare_encoder": "features",
    "test_tokens_reproduce_the_pooled_features": "identity",
    "test_training_lowers_the_loss": "trains",
    "test_a_saved_model_scores_as_before": "saves",
    "test_a_resumed_run_is_the_unbroken_one": "resumes",
    "test_half_precision_gives_finite_fp32_scores": "bfloat16",
}


class Outcomes:
    """Collects what became of each column's test."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, name = report.nodeid.rpartition("::")[2].partition("[")
        if test not in COLUMNS or not (report.when == "call" or report.outcome != "passed"):
            return
        cell = "n/a: " + report.longrepr[2] if report.skipped else report.outcome[:4]
        self.cells[name.rstrip("]"), COLUMNS[test]] = cell


def lines(cells: dict[tuple[str, str], str]) -> list[str]:
    width = max(map(len, BUILDERS))
    titles = list(COLUMNS.values())
    rows = [[cells.get((name, title), "-") for title in titles] for name in BUILDERS]
    notes = {name: note for name in BUILDERS if (note := identity_note(name))}
    table = [f"{'architecture':{width}}  " + "  ".join(f"{title:8}" for title in titles)]
    for name, row in zip(BUILDERS, rows, strict=True):
        mark = " *" if name in notes else ""
        table.append(f"{name:{width}}  " + "  ".join(f"{cell:8}" for cell in row) + mark)
    passed = sum(all(cell == "pass" for cell in row) for row in rows)
    table.append(f"{passed} of {len(rows)} rows pass all columns.")
    return table + [f"* {name}: {note}" for name, note in notes.items()]


def identity_note(name: str) -> str:
    """What the identity column shows, where tokens do not pool to the pooled feature."""
    # Late: the test run checks shapes in modules that it is the first to import.
    from pico_hf.encoders.spec import POOLED_BY
    from pico_hf.encoders.table import ENCODERS, architecture

    row = ENCODERS[architecture(BUILDERS[name]())]
    if row.image.pooled_by != "mean_first":
        return ""
    return f"image pooled by {POOLED_BY['mean_first']}; shown for the mean, not for single tokens"


def main() -> int:
    outcomes = Outcomes()
    here = Path(__file__).parent
    chosen = " or ".join(COLUMNS)
    options = [str(here / "test_architectures.py"), "-k", chosen, "-q"]
    code = pytest.main(options, plugins=[outcomes])
    sys.stdout.write("\n".join(["", *lines(outcomes.cells), ""]))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
