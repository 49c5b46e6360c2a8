"""The command line: finds its commands, and answers every way to end by an exit code.

A command is a file in `commands/`: a function `command` with a typer signature and a docstring,
which returns an [`Answer`], and `PANEL`, the part of the help where it stands. `SETTINGS` and
`STOPPED` are optional: typer's context settings, and what to do after ^C.
"""

from __future__ import annotations

import errno
import inspect
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pico_hf.cli import commands
from pico_hf.cli.answers import Failed, Stopped, one_line, say
from pico_hf.cli.bodies import Bodies

HELP = """Search images with words, and see why: train, align, index, search, explain.

A model is a folder or a Hub repository: a Pico model, an adapter, or any supported dual encoder
such as openai/clip-vit-base-patch32. Every command has --json. Exit codes: 0 done, 1 failed (one
line on stderr says why), 2 wrong usage, 130 stopped by ^C."""
DEBUG = "--debug"
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
FAILED_CODE, USAGE_CODE, STOPPED_CODE = 1, 2, 130


class _Commands(TyperGroup):
    """Ends with an exit code and one line, whoever runs it."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Runs one command and exits; a traceback is shown with `--debug` only."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        debug = DEBUG in words[:end]
        words = [word for word in words[:end] if word != DEBUG] + words[end:]
        extra["standalone_mode"] = False
        sys.exit(_exit_code(lambda: super(_Commands, self).main(words, *rest, **extra), debug))


def _exit_code(call: Any, debug: bool) -> int:
    try:
        code = call()
        if code == STOPPED_CODE:  # before the body of a command
            raise Stopped
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort, Stopped) as stop:
        say(f"stopped. {stop}".rstrip())
        return STOPPED_CODE
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        return _told(error)


def _told(error: Exception) -> int:
    """The exit code of an error, after a line about it."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own
        context = getattr(error, "ctx", None)
        hint = f" Try '{context.command_path} --help'." if context is not None else ""
        if text := one_line(error.format_message()):
            say((text if text[-1] in ".?!" else f"{text}.") + hint)
        return error.exit_code
    if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
        say(f"{error.strerror}. What was there before stays: make room, and give the same words.")
    elif isinstance(error, ImportError | OSError | ValueError | Failed):
        say(one_line(str(error)) or type(error).__name__)
    else:
        name = type(error).__name__
        say(f"unexpected {name}: {one_line(str(error))} ({DEBUG} shows where it comes from)")
    return FAILED_CODE


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pico-hf {metadata.version('pico-hf')}")
        raise typer.Exit()


def _paragraphs(text: str) -> str:
    """A docstring whose paragraphs are lines, which the help breaks where the terminal ends."""
    parts = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


def build() -> typer.Typer:
    """The application with all its commands."""
    app = typer.Typer(
        name="pico-hf",
        cls=_Commands,
        help=_paragraphs(HELP),
        add_completion=False,
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    bodies = Bodies()

    @app.callback()
    def options(
        context: typer.Context,
        modules: Annotated[
            list[str] | None,
            typer.Option(
                "--import",
                metavar="MODULE",
                help="Module or .py file that registers an encoder of your own; it is run.",
            ),
        ] = None,
        debug: Annotated[
            bool, typer.Option(DEBUG, help="Show tracebacks; may stand anywhere.")
        ] = False,
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
        ] = False,
    ) -> None:
        bodies.modules = list(modules or ())
        if context.invoked_subcommand is None:
            print(context.get_help())
            raise typer.Exit(USAGE_CODE)

    for found in pkgutil.iter_modules(commands.__path__):
        module: Any = import_module(f"{commands.__name__}.{found.name}")
        app.command(
            found.name.replace("_", "-"),
            help=_paragraphs(module.command.__doc__),
            rich_help_panel=module.PANEL,
            context_settings=getattr(module, "SETTINGS", None),
        )(bodies.of(module))
    return app


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        build()(list(arguments), prog_name="pico-hf")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED_CODE
    return 0
