"""What an index is, told without loading its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def index_facts(source: str, model: str | None, verify: bool = False) -> dict[str, Any]:
    """What an index is; no model is loaded.

    Args:
        source: Its folder, or the address of a collection.
        model: That it was made with.
        verify: True reads every byte of files; Qdrant looks after its own.

    Returns:
        Name → value; None where an index of this kind has none.

    Raises:
        ValueError: If it is damaged, or a server has no such collection.
        ConnectionError: If no server answers.
    """
    from pico_hf.search.qdrant_places import open_qdrant

    found = open_qdrant(source)
    own = _files(source, verify) if found is None else _qdrant(found)
    encoder = own["facts"]["encoder"] or {}
    return {
        "kind": "index",
        "images": own["images"],
        "deleted": own.get("deleted"),
        "without_pooled_feature": own["lacking"],
        "columns": own["facts"]["width"],
        "storage": own["facts"]["dtype"],
        "token_merging": own["facts"]["merging"],
        "shards": own.get("shards"),
        "bytes": folder_bytes(source) if Path(source).is_dir() else None,
        "model": model,
        "encoder": encoder.get("model_type"),
        "fields": sorted({field for payload in own["payloads"] for field in payload}),
        "verified": verify and found is None,
        "fingerprint": encoder.get("tower"),
    }


def _files(source: str, verify: bool) -> dict[str, Any]:
    from pico_hf.search.store import ImageStore

    store = ImageStore(Path(source), verify=verify)
    living = store.alive.nonzero().flatten().tolist()
    return {
        "facts": store.manifest,
        "images": len(living),
        "deleted": len(store.alive) - len(living),
        "lacking": int((~store.known[living]).sum()),
        "shards": len(store.manifest["shards"]),
        "payloads": [store.records[row]["payload"] for row in living],
    }


def _qdrant(place: Any) -> dict[str, Any]:
    """Of the payloads a thousand at most are read."""
    from pico_hf.search.qdrant_points import Condition
    from pico_hf.search.qdrant_store import QdrantStore
    from pico_hf.search.qdrant_view import pages

    store = QdrantStore(*place)
    some = [] if place.points is None else next(pages(place.points, Condition()), [])
    view = store.view(None)
    found = {"facts": store.facts, "images": len(view), "lacking": view.lacking_summary()}
    store.close()
    return {**found, "payloads": [one.payload["payload"] for one in some]}


def folder_bytes(folder: str) -> int:
    """Of all files in a folder and its subfolders."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
