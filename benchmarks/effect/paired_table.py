"""Every row of a file of results beside a base, paired by data set and seed.

Run, in this folder: python paired_table.py results/sources.jsonl --base without
     python paired_table.py results/variants.jsonl --base default --rows feedback
     python paired_table.py results/tuned.jsonl --base "clip, own loss: pooled cosine"
The base is a row, of one recipe where there are several; or a recipe, and then every row of another
recipe is beside that row of the base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from report import NAMES, Line, groups, interval, lines, rsum

NAMES |= {name: name for name in ("new style", "old styles")}
NAMES |= {"test": "test part of the fold", "feedback": "feedback part of the fold"}


def table(found: list[Line], base: str) -> str:
    """Rows by kind of data and loss, with their differences to the base."""
    text = [
        "| data | loss | split | row | rSum | − base | runs |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for (kind, loss), some in groups(found, lambda x: (_kind(x), x["loss"])).items():
        for part in some[0]["metrics"]:
            for name, rows in groups(some, _name).items():
                start = {
                    _run(line): rsum(line, part) for line in some if _is_base(line, rows[0], base)
                }
                gains = [rsum(x, part) - start[_run(x)] for x in rows if _run(x) in start]
                cells = [
                    interval([rsum(line, part) for line in rows]),
                    interval(gains) if gains else "",
                ]
                label = f"| {kind} | {loss} | {NAMES[part]} | {name} |"
                text.append(f"{label} {' | '.join(cells)} | {len(rows)} |")
    return "\n".join(text)


def _kind(line: Line) -> str:
    return "photos" if line["dataset"] == "flickr8k" else "drawings"


def _run(line: Line) -> tuple[str, int]:
    return line["dataset"], line["seed"]


def _name(line: Line) -> str:
    return ": ".join(line[key] for key in ("recipe", "row") if key in line)


def _is_base(line: Line, row: Line, base: str) -> bool:
    """Whether a line is what a row is compared with."""
    same = line.get("recipe") == base and line["row"] == row["row"]
    return same or _name(line) == base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--base", required=True, help="a row or a recipe")
    parser.add_argument("--rows", nargs="+", help="only these")
    args = parser.parse_args()
    found = lines(args.file)
    if args.rows:
        found = [line for line in found if line["row"] in args.rows]
    print(table(found, args.base))


if __name__ == "__main__":
    main()
