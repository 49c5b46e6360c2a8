"""`pico-hf embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pico_hf.cli.answers import Answer, added
from pico_hf.cli.sources import Storage, image_rows

PANEL = "Search"
STOPPED = "What was stored stays; the same command goes on from there."


def command(
    source: Annotated[
        str, typer.Argument(help="Folder of images, one image, a table of rows, or a data set.")
    ],
    index: Annotated[str, typer.Argument(help="Folder of the index, or address of a server.")],
    model: Annotated[str, typer.Option(help="Model that encodes the images.")],
    storage: Annotated[Storage, typer.Option(help="Of a new index.")] = Storage.float16,
    token_merging: Annotated[
        int, typer.Option(help="Of a new index: 2 or 4 keeps a half or a quarter.")
    ] = 1,
    image_column: Annotated[str | None, typer.Option(help="Default: found by its type.")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Default: an image is known by its content.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a named data set.")] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
) -> Answer:
    """Add many images to an index by several processes or devices.

    torchrun --nproc_per_node 4 -m pico_hf_command embed photos photos.index --model org/pico

    Each process encodes a share; the index is the one that a single process makes.
    """
    from accelerate import PartialState

    from pico_hf.cli.sources import remember_model
    from pico_hf.retriever import PicoRetriever
    from pico_hf.search.bulk import embed
    from pico_hf.search.sources import images_of

    rows = image_rows(source, split)
    if isinstance(rows, Path):
        images_of(rows)  # nothing is made for a folder without images
    retriever = PicoRetriever.from_pretrained(model, batch_size=batch_size)
    report = embed(
        rows,
        index,
        retriever,
        dtype=storage.value,
        token_merging=token_merging,
        image_column=image_column,
        id_column=id_column,
    )
    if not PartialState().is_main_process:
        raise typer.Exit
    if Path(index).is_dir():
        remember_model(Path(index), model)
    return added(report, {"index": index, "model": model}, index)
