"""Runs and parses commands as users type them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer
from typer.testing import CliRunner

from pico_hf.cli.main import build


def run(*arguments: Any) -> Any:
    """The result of a command in this process: `exit_code`, `stdout`, `stderr`."""
    return CliRunner().invoke(build(), [str(one) for one in arguments])


def done(*arguments: Any) -> str:
    """What a command prints that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def read(*arguments: Any) -> dict[str, Any]:
    """What a command answers with `--json`, and nothing else on stdout."""
    return json.loads(done(*arguments, "--json"))


def refused(*arguments: Any, code: int = 1) -> str:
    """The last line on stderr of a command that must fail, without a traceback."""
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("pico-hf: ")
    return line


def parse(arguments: Sequence[str]) -> None:
    """Parses a command without running it; what it does not know raises."""
    group: Any = typer.main.get_command(build())
    context = group.make_context("pico-hf", list(arguments))
    words = [*getattr(context, "_protected_args", []), *context.args]
    name, command, rest = group.resolve_command(context, words)
    parsed = command.make_context(name, rest, parent=context)
    if name == "train":
        from pico_hf.cli.job_arguments import job_arguments

        job_arguments([*parsed.params["pairs"], *parsed.args], {"output_dir": "out"})
