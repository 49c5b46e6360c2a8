"""The `pico-hf` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pico_hf.explanation import explain as explain_pair
from pico_hf.export import check_target, export_encoder, export_processor
from pico_hf.graphs.onnx_files import check_installed, export_onnx
from pico_hf.hub.new_folder import new_folder
from pico_hf.model_and_processor import model_and_processor
from pico_hf.modeling_pico import PicoModel
from pico_hf.training.cache_folder import cache_entries, clear_cache, default_cache_dir

_EXPORT = """Writes the plain encoder of a Pico model or LoRA adapter, and its processor if there is
one. Lost are the late interaction, the trained scale and, without --fold, the column weights.
With --format onnx nothing is lost: the graphs of images and of texts give weighted tokens
and pooled vectors, and late_interaction.py beside them scores those in numpy."""
_FOLD = """fold the column weights into the last linear projections: dot products of features as the
projections give them are the weighted ones then; cosines are only up to the features' lengths"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; answers bad input with one line and exit code 1.

    Args:
        arguments: Of the command line; None takes the process's own.
    """
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        command(**options)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"pico-hf: {error}")


def export(
    source: str,
    target: str,
    *,
    format: str = "encoder",
    fold: bool = False,
    base: str | None = None,
) -> None:
    """Writes the plain encoder of a model or its ONNX graphs, and its processor if there is one.

    Args:
        source: Folder or Hub repository of a Pico model or of an adapter.
        target: Folder, created if need be. Nothing is there until all is written.
        format: `"encoder"` or `"onnx"`.
        fold: True folds the column weights into the encoder's projections; graphs always hold them.
        base: For an adapter: what it was trained on; None takes what it names.

    Raises:
        ImportError: If ONNX is asked for and not installed.
        OSError: If the source cannot be read.
        ValueError: If it is damaged, if its weights cannot be folded, if it has no graph, or if the
            target is the source or holds other files.
    """
    check_target(source, target)
    graphs = format == "onnx"
    if graphs:
        check_installed()
        if fold:
            raise ValueError(
                "`--fold` is for the plain encoder; ONNX graphs hold the column weights anyway. "
                "Leave it out."
            )
    options: Any = {"dtype": torch.float32} if graphs else {}
    model: Any = PicoModel.from_pretrained(source, base=base, **options)
    with new_folder(target) as folder:
        if graphs:
            export_onnx(model, folder)
        else:
            export_encoder(model, folder, fold=fold)
        found = export_processor(source, folder)
    kind = "with the column weights folded in" if fold or graphs else "without the column weights"
    what = "Graphs of images and of texts" if graphs else type(model.encoder).__name__
    print(f"{what} {kind}, {'and' if found else 'no'} processor: {target}")


def explain(
    source: str,
    image: str,
    caption: str,
    *,
    output: str = "explanation.png",
    processor: str | None = None,
    base: str | None = None,
) -> None:
    """Draws why an image and a caption match, and prints how much each word adds to the score.

    Args:
        source: Folder or Hub repository of a Pico model, an adapter or a plain dual encoder.
        image: File of the image.
        caption: The text.
        output: File of the figure.
        processor: Folder or repository of the processor; None takes the model's.
        base: For an adapter: what it was trained on; None takes what it names.

    Raises:
        OSError: If model, processor or image cannot be read.
        ValueError: If they are damaged, or if the output is no format of figures.
    """
    model, processor = model_and_processor(source, processor, base=base)
    explanation = explain_pair(model, processor, image, caption)
    explanation.save(output)
    for word, part in zip(explanation.words, explanation.weighted.words.tolist(), strict=True):
        print(f"{part:8.4f}  {word}")
    print(f"{float(explanation.weighted.patches.sum()):8.4f}  all patches")
    if explanation.weighted.pooled:
        print(f"{explanation.weighted.pooled:8.4f}  image and caption as a whole")
    print(f"{explanation.score:8.4f}  score, drawn in {output}")


def cache(folder: str | None = None, *, clear: str | None = None) -> None:
    """Lists cached features of frozen towers, or deletes them.

    Args:
        folder: Of the caches; None takes the default one.
        clear: Key of the entry to delete, or `"all"`.

    Raises:
        ValueError: If there is no such entry.
    """
    path = Path(folder) if folder else default_cache_dir()
    deleted = clear is not None
    key = None if clear == "all" else clear
    entries = clear_cache(path, key) if deleted else cache_entries(path)
    for entry in entries:
        about = f"{entry.encoder}, {entry.images} images, {entry.captions} captions"
        print(f"{entry.key}  {entry.size / 1e6:10.1f} MB  {about}")
    total = sum(entry.size for entry in entries) / 1e6
    print(f"{len(entries)} entries {'deleted from' if deleted else 'in'} {path}: {total:.1f} MB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pico-hf", description=__doc__)
    commands = parser.add_subparsers(required=True)
    plain = commands.add_parser(
        "export", help="write the plain encoder or ONNX graphs", description=_EXPORT
    )
    plain.add_argument("source", help="folder or Hub repository of a Pico model or adapter")
    plain.add_argument("target", help="folder that is written")
    plain.add_argument(
        "--format", choices=["encoder", "onnx"], default="encoder", help="default: encoder"
    )
    plain.add_argument("--fold", action="store_true", help=_FOLD)
    plain.add_argument("--base", help="for an adapter that does not name its base")
    plain.set_defaults(command=export)
    pair = commands.add_parser("explain", help="draw why an image and a caption match")
    pair.add_argument("source", help="folder or Hub repository of a model or adapter")
    pair.add_argument("image", help="file of the image")
    pair.add_argument("caption", help="the text, in quotes")
    pair.add_argument("--output", default="explanation.png", help="file; default: %(default)s")
    pair.add_argument("--processor", help="folder or repository, if the model's has none")
    pair.add_argument("--base", help="for an adapter that does not name its base")
    pair.set_defaults(command=explain)
    kept = commands.add_parser("cache", help="list or clear cached features of frozen towers")
    kept.add_argument("folder", nargs="?", help="folder of the caches; default: the shared one")
    kept.add_argument("--clear", metavar="KEY", help="delete this entry, or all")
    kept.set_defaults(command=cache)
    return parser


if __name__ == "__main__":
    main()
