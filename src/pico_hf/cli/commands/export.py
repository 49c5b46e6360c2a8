"""`pico-hf export`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Failed
from pico_hf.cli.options import Base

PANEL = "Models"


class Kind(StrEnum):
    """What is written."""

    encoder = "encoder"
    onnx = "onnx"


def command(
    source: Annotated[str, typer.Argument(help="Pico model or adapter: a folder or repository.")],
    target: Annotated[str, typer.Argument(help="New folder that is written.")],
    format: Annotated[Kind, typer.Option(help="The plain encoder, or ONNX graphs.")] = Kind.encoder,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold the column weights into the last projections.")
    ] = False,
    base: Base = None,
) -> Answer:
    """Write the plain encoder or ONNX graphs, and the processor if there is one.

    pico-hf export outputs/mine outputs/plain --fold

    Lost with the plain encoder are the late interaction, the trained scale and, without --fold, the
    column weights. Folded dot products of features, as the projections give them, are the weighted
    ones; cosines are so only up to the features' lengths.

    With --format onnx nothing is lost: the graphs of images and of texts give weighted tokens and
    pooled vectors, and late_interaction.py beside them scores those in numpy.
    """
    import torch

    from pico_hf.export import check_target, export_encoder, export_processor
    from pico_hf.graphs.onnx_files import check_installed, export_onnx
    from pico_hf.hub.new_folder import new_folder
    from pico_hf.modeling_pico import PicoModel

    check_target(source, target)
    graphs = format is Kind.onnx
    if graphs:
        check_installed()
        if fold:
            raise Failed(
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
    weighted = fold or graphs
    kind = "with the column weights folded in" if weighted else "without the column weights"
    what = "Graphs of images and of texts" if graphs else type(model.encoder).__name__
    values = {"target": target, "format": format.value, "weighted": weighted, "processor": found}
    return Answer(values, [f"{what} {kind}, {'and' if found else 'no'} processor: {target}"])
