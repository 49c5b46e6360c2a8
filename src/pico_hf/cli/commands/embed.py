"""`pico-hf embed`."""

from __future__ import annotations

import typer

from pico_hf.cli import options as own
from pico_hf.cli.answers import Answer, added

PANEL = "Search"
STOPPED = "What was stored stays; the same command goes on from there."


def command(
    source: own.Images,
    index: own.Index,
    model: own.Model = None,
    storage: own.NewStorage = None,
    token_merging: own.TokenMerging = None,
    image_column: own.ImageColumn = None,
    id_column: own.IdColumn = None,
    split: own.Split = "train",
    batch_size: own.ImagesAtATime = 32,
) -> Answer:
    """Add many images to an index by several processes or devices.

    torchrun --nproc_per_node 4 -m pico_hf_command embed photos photos.index --model org/pico

    Each process encodes a share; the index is the one that a single process makes.
    """
    from accelerate import PartialState

    from pico_hf.cli.indexes import images_for, remember_model
    from pico_hf.retriever import PicoRetriever
    from pico_hf.search.bulk import embed

    rows, name = images_for(index, source, split, model)
    retriever = PicoRetriever.from_pretrained(name, batch_size=batch_size)
    report = embed(
        rows,
        index,
        retriever,
        dtype=None if storage is None else storage.value,
        token_merging=token_merging,
        image_column=image_column,
        id_column=id_column,
    )
    if not PartialState().is_main_process:
        raise typer.Exit
    remember_model(index, name)
    return added(report, {"index": index, "model": name}, index)
