"""Tables and plots from lines of results.

Run: python benchmarks/effect/report.py                                  # all tables, to the screen
     python benchmarks/effect/report.py --plots docs/effect --page benchmarks/effect/TABLES.md
     python benchmarks/effect/report.py --tables smoke --output FOLDER   # a single file of results
A number is the mean over seeds ± half of its 95 % interval by Student's t; a difference is taken to
the base of the same seed first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scipy.stats import t as student

BASE, CHOSEN = "w = 1 (base)", "canonical, normalised gain"
KEY = ("dataset", "tower", "loss", "column", "dropout", "tuned", "epochs")
TUNED = {"text": "text tower tuned", "text-lora": "text tower tuned by LoRA"}
TUNED |= {"both": "both towers tuned", "both-lora": "both towers tuned by LoRA"}
NAMES = {"dev": "dev", "seen": "seen styles", "unseen": "unseen family"}
MOVES = {"flickr8k": "photos", "emoji/none": "drawings of all families"}
MOVES |= {"emoji/fluent": "drawings of four families", "fluent": "drawings of the fifth"}
NAMES["themes"] = "icon themes"
NAMES["known concepts, unseen"] = "unseen family, known concepts"
Line = dict[str, Any]


def lines(file: Path) -> list[Line]:
    """The last line of every row, network and seed."""
    latest = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        measured = {"metrics", "seconds", "commit", "spread", "gains", "taken", "share"}
        measured |= {"style", "concept"}
        key = {k: v for k, v in line.items() if k not in measured and v is not None}
        latest[json.dumps(key)] = line
    return [line for line in latest.values() if line["row"] != "complete"]


def interval(values: list[float], digits: int = 1) -> str:
    """Mean ± half of the 95 % interval."""
    mean, half = bounds(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def bounds(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval; 0 for a single value."""
    if len(values) < 2:
        return statistics.mean(values), 0.0
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def rsum(line: Line, part: str) -> float:
    return line["metrics"][part]["rsum"]


def groups(found: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    """Lines by key, in order of appearance."""
    sorted_by: dict[Any, list[Line]] = {}
    for line in found:
        sorted_by.setdefault(key(line), []).append(line)
    return sorted_by


def differences(rows: list[Line], base: list[Line], part: str) -> list[float]:
    """Each line's rSum minus that of the base of its seed."""
    start = {line["seed"]: rsum(line, part) for line in base}
    return [rsum(line, part) - start[line["seed"]] for line in rows if line["seed"] in start]


def setting(line: Line) -> str:
    """What the tables of one group have in common."""
    known = [str(line[key]) for key in ("dataset", "tower", "loss")]
    known += [f"captions: {line['column']}"] if line.get("column") else []
    known += [f"column dropout {line['dropout']}"] if line.get("dropout") else []
    known += [f"{line['epochs']} epochs"] if line.get("epochs") else []
    known += [TUNED[line["tuned"]]] if line.get("tuned") else []
    return ", ".join(known)


def by_setting(found: list[Line]) -> list[list[Line]]:
    """Lines that differ in row and seed alone."""
    return list(groups(found, lambda line: tuple(line.get(key) for key in KEY)).values())


def main_tables(found: list[Line]) -> str:
    """A table per data set, tower and loss: every row, and its difference to the base."""
    out = []
    for group in by_setting(found):
        rows = groups(group, lambda line: line["row"])
        parts = list(rows[BASE][0]["metrics"])
        heads = [f"{NAMES[part]} | − base" for part in parts]
        out += [f"\n**{setting(group[0])}**\n", f"| row | {' | '.join(heads)} | std of w | seeds |"]
        out += ["|---|" + "---:|" * (2 * len(parts) + 2)]
        for name, kept in rows.items():
            cells = []
            for part in parts:
                cells.append(interval([rsum(line, part) for line in kept]))
                gain = differences(kept, rows[BASE], part)
                cells.append("" if name == BASE else interval(gain))
            spreads = [line["spread"] for line in kept if "spread" in line]
            cells.append(f"{statistics.mean(spreads):.2f}" if spreads else "")
            shown = f"**{name}**" if name == CHOSEN else name
            out.append(f"| {shown} | {' | '.join(cells)} | {len(kept)} |")
    return "\n".join(out)


def summary(found: list[Line]) -> str:
    """One line per setting and split: base, canonical columns, and the gain in points and %."""
    out = ["| setting | split | w = 1 | canonical | gain | gain, % | seeds |"]
    out += ["|---|---|---:|---:|---:|---:|---:|"]
    for group in by_setting(found):
        rows = groups(group, lambda line: line["row"])
        for part in rows[BASE][0]["metrics"]:
            base, chosen = rows[BASE], rows.get(CHOSEN, [])
            if not chosen:
                continue
            gain = differences(chosen, base, part)
            start = {line["seed"]: rsum(line, part) for line in base}
            kept = [start[line["seed"]] for line in chosen]
            share = [100 * g / s for g, s in zip(gain, kept, strict=True)]
            cells = [interval(kept), interval([rsum(line, part) for line in chosen])]
            cells += [interval(gain), interval(share), str(len(gain))]
            out.append(f"| {setting(group[0])} | {NAMES[part]} | {' | '.join(cells)} |")
    return "\n".join(out)


def controls(found: list[Line]) -> str:
    """How far canonical columns are above every other row of the settings in which all were run."""
    out = []
    for group in in_full(found):
        rows = groups(group, lambda line: line["row"])
        parts = list(rows[BASE][0]["metrics"])
        out += [f"\n**{setting(group[0])}**\n"]
        out += ["| canonical − | " + " | ".join(NAMES[part] for part in parts) + " | seeds |"]
        out += ["|---|" + "---:|" * (len(parts) + 1)]
        for name, kept in rows.items():
            ahead = [differences(rows[CHOSEN], kept, part) for part in parts]
            if name != CHOSEN:
                out.append(f"| {name} | {' | '.join(map(interval, ahead))} | {len(ahead[0])} |")
    return "\n".join(out)


def in_full(found: list[Line]) -> list[list[Line]]:
    """The settings in which all rows were run."""
    return [group for group in by_setting(found) if len({line["row"] for line in group}) > 10]


def transfer_tables(found: list[Line]) -> str:
    """A table per move: rows against numbers of pairs."""
    out = []
    for (source, target), group in groups(found, lambda x: (x["dataset"], x["target"])).items():
        base = [line for line in group if line["row"] == "as it is"]
        counts = sorted({line["pairs"] for line in group} - {0})
        start = interval([rsum(line, "target") for line in base])
        out += [f"\n**{MOVES[source]} → {MOVES[target]}**, as it is: {start}\n"]
        out += ["| row | " + " | ".join(f"{count} pairs" for count in counts) + " |"]
        out += ["|---|" + "---:|" * len(counts)]
        for row, kept in groups(group, lambda line: line["row"]).items():
            by_count = groups(kept, lambda line: line["pairs"])
            if row == "as it is":
                continue
            if 0 in by_count:
                by_count = dict.fromkeys(counts, by_count[0])  # it takes none
            cells = [
                interval(differences(by_count[count], base, "target")) if count in by_count else ""
                for count in counts
            ]
            out.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(out)


def diagnosis_tables(found: list[Line]) -> str:
    """What columns encode, then how τ, the number of images, K and R matter."""
    out = ["\n| estimator | columns | style, % | concept R@1, % |", "|---|---|---:|---:|"]
    probes = groups(
        [line for line in found if line["row"] == "probe"],
        lambda line: (line["estimator"], line["columns"]),
    )
    for (estimator, columns), kept in probes.items():
        cells = [interval([line[what] for line in kept]) for what in ("style", "concept")]
        out.append(f"| {estimator} | {columns} | {' | '.join(cells)} |")
    base = [line for line in found if line["row"] == BASE]
    out += ["\n| knob | seen − base | unseen − base |", "|---|---:|---:|"]
    knobs = ("images", "tau", "K", "R", "period")
    swept = groups(
        [line for line in found if line["row"] not in ("probe", BASE)],
        lambda line: (line["row"], *((k, line[k]) for k in knobs if k in line)),
    )
    for (row, *values), kept in swept.items():
        label = ", ".join([row, *(f"{name} {value:g}" for name, value in values)])
        cells = [interval(differences(kept, base, part)) for part in ("seen", "unseen")]
        out.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(out)


def plot_gains(found: list[Line], file: Path) -> None:
    """Bars of the gain over the base, a panel per setting in which all rows were run."""
    import matplotlib.pyplot as plt

    full = in_full(found)
    figure, axes = plt.subplots(1, len(full), figsize=(7 * len(full), 8), squeeze=False)
    for axis, group in zip(axes[0], full, strict=True):
        rows = groups(group, lambda line: line["row"])
        part = "dev" if "dev" in rows[BASE][0]["metrics"] else "unseen"
        gains = {
            name: bounds(differences(kept, rows[BASE], part))
            for name, kept in rows.items()
            if name != BASE
        }
        names = sorted(gains, key=lambda name: gains[name][0])
        colours = ["tab:green" if name == CHOSEN else "tab:grey" for name in names]
        axis.barh(
            names,
            [gains[name][0] for name in names],
            xerr=[gains[name][1] for name in names],
            color=colours,
            capsize=2,
        )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{setting(group[0])}: {NAMES[part]}")
        axis.set_xlabel("rSum − base of the same seed, mean and 95 % interval")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_transfer(found: list[Line], file: Path) -> None:
    """Gain against the number of pairs, a panel per move."""
    import matplotlib.pyplot as plt

    moves = groups(found, lambda line: (line["dataset"], line["target"]))
    figure, axes = plt.subplots(1, len(moves), figsize=(7 * len(moves), 5), squeeze=False)
    for axis, ((source, target), group) in zip(axes[0], moves.items(), strict=True):
        base = [line for line in group if line["row"] == "as it is"]
        for row, kept in groups(group, lambda line: line["row"]).items():
            by_count = groups(kept, lambda line: line["pairs"])
            if 0 in by_count:
                continue
            points = [bounds(differences(by_count[n], base, "target")) for n in sorted(by_count)]
            axis.errorbar(
                sorted(by_count),
                [p[0] for p in points],
                [p[1] for p in points],
                label=row,
                capsize=2,
                marker="o",
                markersize=3,
            )
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{MOVES[source]} → {MOVES[target]}")
        axis.set_xlabel("pairs (or images) of the new data")
        axis.set_ylabel("rSum − the network as it is")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


TABLES: dict[str, tuple[Callable[[list[Line]], str], ...]] = {
    "main_table": (summary, controls, main_tables),
    "smoke": (summary, main_tables),
    "transfer": (transfer_tables,),
    "diagnosis": (diagnosis_tables,),
}
PLOTS = {"main_table": plot_gains, "transfer": plot_transfer}


def fill(page: Path, tables: dict[str, str]) -> None:
    """Puts tables between the marks of a page that name them."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table.strip()}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/effect"))
    parser.add_argument("--tables", nargs="+", default=["main_table", "transfer", "diagnosis"])
    parser.add_argument("--plots", type=Path, default=None, help="folder for the plots")
    parser.add_argument("--page", type=Path, default=None, help="page to put the tables into")
    args = parser.parse_args()
    made = {}
    for name in args.tables:
        found = lines(args.output / f"{name}.jsonl")
        made |= {table.__name__: table(found) for table in TABLES[name]}
        if args.plots and name in PLOTS:
            args.plots.mkdir(parents=True, exist_ok=True)
            PLOTS[name](found, args.plots / f"{name}.png")
    if args.page:
        fill(args.page, made)
    else:
        print("\n".join(made.values()))


if __name__ == "__main__":
    main()
