"""`pico-hf index`."""

from __future__ import annotations

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
    strict: own.Strict = False,
) -> Answer:
    """Add images to an index that is searched with `pico-hf search`.

    pico-hf index photos photos.index --model outputs/aligned

    Run it again after images were added, changed or the run was stopped: only what is new is
    encoded. Columns of a table become fields for --filter. On a Qdrant server the index is a
    collection, made if it is not there; QDRANT_API_KEY is the key.
    """
    from pico_hf.cli.indexes import images_for, remember_model
    from pico_hf.retriever import PicoRetriever
    from pico_hf.search.bulk import create_or_open

    rows, name = images_for(index, source, split, model)
    retriever = PicoRetriever.from_pretrained(name, batch_size=batch_size)
    dtype = None if storage is None else storage.value
    opened = create_or_open(index, retriever, dtype=dtype, token_merging=token_merging)
    remember_model(index, name)
    columns = {"image_column": image_column, "id_column": id_column}
    report = opened.add(rows, **columns, skip_bad_images=not strict)
    values = {"index": index, "model": name, "images": len(opened)}
    return added(report, values, f"{len(opened)} images in {index}")
