"""`pico-hf cache`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pico_hf.cli.answers import Answer, Table

PANEL = "Models"


def command(
    folder: Annotated[
        str | None, typer.Argument(help="Folder of the caches; default: the shared one.")
    ] = None,
    clear: Annotated[
        str | None, typer.Option(metavar="KEY", help="Delete this entry, or all.")
    ] = None,
) -> Answer:
    """List or clear the cached features of frozen towers."""
    from pico_hf.training.cache_folder import cache_entries, clear_cache, default_cache_dir

    path = Path(folder) if folder else default_cache_dir()
    key = None if clear == "all" else clear
    entries = cache_entries(path) if clear is None else clear_cache(path, key)
    size = sum(entry.size for entry in entries)
    where = "in" if clear is None else "deleted from"
    rows = [(e.key, e.encoder, e.images, e.captions, f"{e.size / 1e6:.1f} MB") for e in entries]
    table = [Table(("key", "encoder", "#images", "#captions", "#size"), rows)] if rows else []
    values = {
        "folder": str(path),
        "deleted": clear is not None,
        "entries": [asdict(entry) for entry in entries],
        "bytes": size,
    }
    return Answer(values, [*table, f"{len(rows)} entries {where} {path}: {size / 1e6:.1f} MB"])
