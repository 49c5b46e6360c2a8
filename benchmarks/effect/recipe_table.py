"""The table of recipes, from lines of `recipe.py`.

Run: python benchmarks/effect/recipe_table.py benchmarks/effect/results/recipe.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from report import NAMES, Line, differences, groups, interval, lines, rsum

PLAIN = "w = 1"  # of recipes whose name says that they are to be beaten


def table(found: list[Line]) -> str:
    """Every recipe and row, with its gain over the best recipe with w = 1 of the same length."""
    head = "| data | split | recipe | row | rSum | − best w = 1 | % | seeds |"
    text = [head, "|---|---|---|---|---:|---:|---:|---:|"]
    for dataset, rows in groups(found, lambda line: line["dataset"]).items():
        for part in rows[0]["metrics"]:
            for name, some in groups(rows, lambda line: (line["recipe"], line["row"])).items():
                text.append(_row(dataset, part, name, some, _base(name[0], rows)))
    return "\n".join(text)


def _base(recipe: str, rows: list[Line]) -> list[Line]:
    """Lines of the recipe with w = 1 that was trained as long as this one."""
    longer = "twice as long" in recipe
    return [
        line
        for line in rows
        if line["recipe"].startswith("best w = 1")
        and line["row"] == PLAIN
        and ("twice as long" in line["recipe"]) == longer
    ]


def _row(dataset: str, part: str, name: tuple[str, str], rows: list[Line], base: list[Line]) -> str:
    values = [rsum(line, part) for line in rows]
    gains = differences(rows, base, part)
    cells = [dataset, NAMES[part], *name, interval(values), "", ""]
    if gains and rows != base:
        start = {line["seed"]: rsum(line, part) for line in base}
        seeds = [line["seed"] for line in rows if line["seed"] in start]
        shares = [100 * gain / start[seed] for gain, seed in zip(gains, seeds, strict=True)]
        cells[-2:] = [interval(gains), interval(shares)]
    return "| " + " | ".join([*cells, str(len(rows))]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    print(table(lines(parser.parse_args().file)))


if __name__ == "__main__":
    main()
