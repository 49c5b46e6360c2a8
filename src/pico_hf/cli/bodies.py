"""What happens around the body of every command."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pico_hf.cli.answers import Failed, Stopped, show

_JSON = typer.Option("--json", help="Print one JSON object and nothing else.")


class Bodies:
    """Makes the function of a command one that typer can run.

    Attributes:
        modules: What `--import` names; they are run before the command.
    """

    modules: Sequence[str] = ()

    def of(self, module: Any) -> Callable[..., None]:
        """The command of a module, with `--json`; what its libraries print goes to stderr."""
        command = module.command

        @functools.wraps(command)
        def body(as_json: bool = False, **options: Any) -> None:
            try:
                with redirect_stdout(sys.stderr):
                    self._prepare()
                    answer = command(**options)
                show(answer, as_json)
            except KeyboardInterrupt as stop:  # typer would leave without a word
                raise Stopped(getattr(module, "STOPPED", "")) from stop

        hints = get_type_hints(command, include_extras=True)
        known = inspect.signature(command).parameters.values()
        parameters = [own.replace(annotation=hints[own.name]) for own in known]
        own = inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_JSON_FLAG
        )
        body.__signature__ = inspect.Signature([*parameters, own])
        body.__annotations__ = {each.name: each.annotation for each in [*parameters, own]}
        del body.__wrapped__
        return body

    def _prepare(self) -> None:
        if not logging.getLogger().handlers:
            logging.basicConfig(level=logging.WARNING, format="pico-hf: %(message)s")
            own = logging.getLogger("huggingface_hub")
            own.propagate = not own.handlers  # each of its lines once
        import_module("pico_hf.registration")
        from transformers.utils import logging as transformers_logging

        from pico_hf.data.progress import bars_are_shown, choose_bars

        # Bars of what takes long; those of loading and saving a model only flicker.
        choose_bars(bars_are_shown())
        transformers_logging.disable_progress_bar()
        # Said of every machine without a GPU, and there is nothing to do about it.
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set")
        for name in self.modules:
            _import(name)


_JSON_FLAG = Annotated[bool, _JSON]


def _import(name: str) -> None:
    """Runs a module of the user: by its name, or the file."""
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise Failed(f"`--import` must name a module or a .py file, got {name!r}, not there.")
        sys.path.insert(0, str(path.parent))
        name = path.stem
    elif "" not in sys.path:
        sys.path.insert(0, "")
    import_module(name)
