"""What a command answers: tables for people, one JSON object for scripts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


class Failed(Exception):  # noqa: N818
    """A command that could not do what it was asked; its text is the line that is shown."""


class Stopped(Exception):  # noqa: N818
    """A command that ^C has stopped; its text says how to go on."""


@dataclass(frozen=True)
class Table:
    """Rows under headings; nothing in a cell is cut or read as markup.

    Attributes:
        headings: Of the columns; one that begins with `#` holds numbers, which stand to the right.
        rows: Cells as they are shown.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Answer:
    """What a command found or did.

    Attributes:
        values: For `--json`: what JSON can hold.
        shown: Otherwise: lines and tables.
    """

    values: Mapping[str, Any]
    shown: Sequence[str | Table] = field(default_factory=list)


def say(text: str) -> None:
    """One line on stderr."""
    print(f"pico-hf: {text}", file=sys.stderr, flush=True)


def say_if_cut(text: str, longest: int) -> None:
    """Says that a tower does not read all of a text, if it has more words than tokens are read."""
    if (words := len(text.split())) > longest:
        say(f"a text has {words} words: what is beyond {longest} tokens is not read.")


def one_line(text: str) -> str:
    """A text without line breaks and control characters."""
    return " ".join(printable(text).split())


def printable(text: Any) -> str:
    """A text whose control characters cannot move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() or c in "\n\t " else "\ufffd" for c in str(text))


def show(answer: Answer, as_json: bool) -> None:
    """Writes an answer to stdout."""
    if as_json:
        print(json.dumps(_plain(answer.values), indent=2, allow_nan=False))
        return
    for part in answer.shown:
        if isinstance(part, Table):
            _draw(part)
        else:
            print(printable(part))
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(table: Table) -> None:
    from rich import box
    from rich import table as tables
    from rich.console import Console
    from rich.text import Text

    # A file or a pipe has no width: there a row is a line.
    width = None if sys.stdout.isatty() else _width(table)
    console = Console(file=sys.stdout, width=width, highlight=False)
    drawn = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in table.headings:
        right = heading.startswith("#")
        text = Text(heading.removeprefix("#"))
        drawn.add_column(text, justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    console.print(drawn)


def _width(table: Table) -> int:
    rows = [table.headings, *table.rows]
    lines = [[str(cell).splitlines() or [""] for cell in row] for row in rows]
    widest = [max(2 * len(line) for row in lines for line in row[n]) for n in range(len(rows[0]))]
    return max(80, sum(widest) + 4 * len(widest))


def results_table(results: dict[str, dict[str, dict[str, float]]]) -> list[Any]:
    """One row per split and model, R@k in percent."""
    from pico_hf.cards.model_card import HEADINGS, METRICS

    rows = [
        (split, name, *(f"{metrics[each]:.1f}" for each in METRICS))
        for split, models in results.items()
        for name, metrics in models.items()
    ]
    return [Table(("split", "model", *(f"#{text}" for text in HEADINGS)), rows)] if rows else []


def added(report: Any, values: dict[str, Any], where: str) -> Answer:
    """What adding images to an index has done.

    Args:
        report: An `AddReport`.
        values: What else is told with `--json`.
        where: End of the line for people.
    """
    facts = asdict(report)
    skipped = [{"image": place, "reason": why} for place, why in facts.pop("skipped")]
    counts = ", ".join(f"{number} {kind}" for kind, number in facts.items() if number)
    lines = [f"{counts or 'nothing new'}; {where}"]
    if skipped:
        first = skipped[0]
        lines.append(f"{len(skipped)} left out, first: {first['image']}: {first['reason']}")
    return Answer({**values, **facts, "skipped": skipped}, lines)
