"""The `pico-hf` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pico_hf.export import export_encoder, export_processor
from pico_hf.modeling_pico import PicoModel

_EXPORT = """Writes the plain encoder of a Pico model or LoRA adapter, and its processor if there is
one. Lost are the late interaction, the trained scale and, without --fold, the column weights."""
_FOLD = """fold the column weights into the last linear projections: dot products of features as the
projections give them are the weighted ones then; cosines are only up to the features' lengths"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; bad input is answered by one line.

    Args:
        arguments: Of the command line; None takes the process's own.
    """
    options = _parser().parse_args(arguments)
    try:
        export(options.source, options.target, fold=options.fold, base=options.base)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"pico-hf: {error}")


def export(source: str, target: str, *, fold: bool = False, base: str | None = None) -> None:
    """Writes the plain encoder of a model, and its processor if there is one.

    Args:
        source: Folder or Hub repository of a Pico model or of an adapter.
        target: Folder, created if need be.
        fold: True folds the column weights into the projections.
        base: For an adapter: what it was trained on; None takes what it names.

    Raises:
        OSError: If the source cannot be read.
        ValueError: If it is damaged, or if its weights cannot be folded.
    """
    model: Any = PicoModel.from_pretrained(source, base=base)
    export_encoder(model, target, fold=fold)
    found = export_processor(source, target)
    kind = "with the column weights folded in" if fold else "without the column weights"
    print(f"{type(model.encoder).__name__} {kind}, {'and' if found else 'no'} processor: {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pico-hf", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser(
        "export", help="write the plain encoder", description=_EXPORT
    )
    command.add_argument("source", help="folder or Hub repository of a Pico model or adapter")
    command.add_argument("target", help="folder for the plain encoder")
    command.add_argument("--fold", action="store_true", help=_FOLD)
    command.add_argument("--base", help="for an adapter that does not name its base")
    return parser


if __name__ == "__main__":
    main()
