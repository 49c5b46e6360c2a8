"""Embeds a large collection of images with several processes or devices."""

from __future__ import annotations

import os
from typing import Any

from accelerate import PartialState

from pico_hf.core.processes import Processes
from pico_hf.search.add_report import AddReport
from pico_hf.search.index import PicoIndex
from pico_hf.search.qdrant_places import is_there
from pico_hf.search.sources import Share, images_of


def embed(
    source: Any,
    folder: str | os.PathLike,
    retriever: Any,
    *,
    dtype: str | None = None,
    token_merging: int | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    skip_bad_images: bool = True,
    commit_images: int = 256,
    show_progress: bool = True,
    client: Any = None,
) -> AddReport:
    """Adds images to an index, shared among all processes that `accelerate launch` has started.

    Every process calls it with the same arguments. Each encodes a share of the images on a device
    of its own and stores them in groups, as shards of one index: in files, or on a Qdrant server.
    Started again, with any number of processes, it goes on with what is not there yet. Vectors are
    those that one process gives; which of several equal images gives the payload may differ.

    Args:
        source: See `PicoIndex.add`; all processes have to see the same.
        folder: Of the index, or its address, see `PicoIndex.create`; made if need be.
        retriever: A [`PicoRetriever`]; its model is moved to the process's device.
        dtype: Of a new index; None: float16.
        token_merging: Of a new index; None: 1.
        image_column: See `PicoIndex.add`.
        id_column: See `PicoIndex.add`; rows with one id go to one process.
        skip_bad_images: See `PicoIndex.add`.
        commit_images: Images after which a process stores them for good.
        show_progress: True shows a progress bar of the first process's share.
        client: See `PicoIndex.create`.

    Returns:
        What all processes did, the same in each. A copy of an image that another process has stored
        already counts as updated.

    Raises:
        ValueError: If no image can be read, arguments do not fit, or the index is of another model.
        OSError: If the disk is full or a server is gone; what was stored stays.
        RuntimeError: If another process has failed.
    """
    device = PartialState().device
    together = Processes.all()
    retriever.model.to(device)
    images = images_of(source, image_column=image_column, id_column=id_column)
    index, report, error = None, AddReport(), None
    try:
        if together.first:
            storage = {"dtype": dtype, "token_merging": token_merging, "client": client}
            index = create_or_open(folder, retriever, **storage)
    except Exception as raised:
        error = raised
    _raise_together(together, error)
    try:
        if index is None:
            index = PicoIndex.open(folder, retriever, verify=False, client=client)
        share = Share(images, together.rank, together.count, id_column is not None)
        report = index.add_share(
            share, skip_bad_images, commit_images, show_progress and together.first
        )
    except Exception as raised:
        error = raised
    _raise_together(together, error)
    total = AddReport.total(together.every(report))
    total.check(len(images))
    return total


def create_or_open(
    folder: str | os.PathLike,
    retriever: Any,
    *,
    dtype: str | None = None,
    token_merging: int | None = None,
    client: Any = None,
) -> PicoIndex:
    """The index that is there, or a new one.

    Args:
        folder: See `PicoIndex.create`.
        retriever: A [`PicoRetriever`].
        dtype: Of a new index; None: float16.
        token_merging: Of a new index; None: 1.
        client: See `PicoIndex.create`.

    Raises:
        ValueError: If one is there that was made with another model or with other options.
        ConnectionError: If no server answers.
    """
    if not is_there(folder, client):
        options: Any = {"dtype": dtype or "float16", "token_merging": token_merging or 1}
        return PicoIndex.create(folder, retriever, **options, client=client)
    index = PicoIndex.open(folder, retriever, client=client)
    wanted = {"dtype": dtype, "token_merging": token_merging}
    for name, value in index.storage.items():
        if wanted[name] not in (None, value):
            index.close()
            raise ValueError(
                f"`{name}` of the index {str(folder)!r}, which is there already, is {value!r}, got "
                f"{wanted[name]!r}. Leave it out, or name another index."
            )
    return index


def _raise_together(together: Processes, error: Exception | None) -> None:
    """Raises in all processes if one has failed, so that none waits for it."""
    failed = together.every(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(failed):
        if message is not None:
            raise RuntimeError(f"Process {rank} of {together.count} has failed: {message}")
