"""`pico-hf index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pico_hf.cli.answers import Answer, Failed, added
from pico_hf.cli.sources import Storage

PANEL = "Search"
STOPPED = "What was stored stays; the same command goes on from there."


def command(
    source: Annotated[
        str, typer.Argument(help="Folder of images, one image, a table of rows, or a data set.")
    ],
    index: Annotated[str, typer.Argument(help="Folder of the index; made if it is not there.")],
    model: Annotated[
        str | None, typer.Option(help="Model; default: the one the index was made with.")
    ] = None,
    storage: Annotated[
        Storage | None, typer.Option(help="Of a new index; default: float16.")
    ] = None,
    token_merging: Annotated[
        int | None, typer.Option(help="Of a new index: 2 or 4 keeps a half or a quarter.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Default: found by its type.")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Default: an image is known by its content.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a named data set.")] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")
    ] = False,
) -> Answer:
    """Add images to an index that is searched with `pico-hf search`.

    Run it again after images were added, changed or the run was stopped: only what is new is
    encoded. Columns of a table become fields for --filter.
    """
    from pico_hf.cli.sources import image_rows, model_of, remember_model
    from pico_hf.retriever import PicoRetriever
    from pico_hf.search.index import PicoIndex
    from pico_hf.search.sources import images_of

    there = Path(index, "index.json").is_file()
    if not there and model is None:
        raise Failed(
            f"{index!r} is a new index: name the model that encodes its images by --model."
        )
    if there and (storage or token_merging):
        raise Failed(
            f"{index!r} is there already; --storage and --token-merging are for a new index. Leave "
            "them out, or name another folder."
        )
    rows = image_rows(source, split)
    if isinstance(rows, Path):
        images_of(rows)  # nothing is made for a folder without images
    name = model_of(index, model)
    retriever = PicoRetriever.from_pretrained(name, batch_size=batch_size)
    options = {"dtype": (storage or Storage.float16).value, "token_merging": token_merging or 1}
    opened = (
        PicoIndex.open(index, retriever) if there else PicoIndex.create(index, retriever, **options)
    )
    remember_model(Path(index), name)
    columns = {"image_column": image_column, "id_column": id_column}
    report = opened.add(rows, **columns, skip_bad_images=not strict)
    values = {"index": index, "model": name, "images": len(opened)}
    return added(report, values, f"{len(opened)} images in {index}")
