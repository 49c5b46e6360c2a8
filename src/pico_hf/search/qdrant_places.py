"""Where a Qdrant collection is: in a folder, or at an address."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pico_hf.search.checks import check_manifest
from pico_hf.search.files import MANIFEST, new_folder, read_manifest, write_manifest
from pico_hf.search.qdrant_client_points import ClientPoints, client_library
from pico_hf.search.qdrant_edge_points import EdgePoints, edge_library
from pico_hf.search.qdrant_points import Points
from pico_hf.search.qdrant_store import QdrantStore

EDGE = "qdrant-edge"  # what the manifest of a folder says
_NO_SHARDS: dict[str, Any] = {"next_shard": 1, "shards": []}  # of an index in files


def is_url(place: Any) -> bool:
    """Whether an index is on a server."""
    return isinstance(place, str) and place.startswith(("http://", "https://"))


def is_there(place: Any, client: Any = None) -> bool:
    """Whether there is an index, of any kind."""
    if client is None and not is_url(place):
        return (Path(place) / MANIFEST).is_file()
    return _on_server(place, client).facts() is not None


def create_qdrant(place: Any, facts: dict[str, Any], client: Any = None) -> QdrantStore:
    """A new collection; without a width it is made with the first image.

    Args:
        place: A folder, an address, or with `client` a name.
        facts: See `Store`.
        client: A `QdrantClient`.

    Raises:
        ValueError: If there is one, or the folder holds other files.
    """
    if client is None and not is_url(place):
        edge_library()
        folder = Path(place)
        new_folder(folder)
        write_manifest(folder, {**facts, **_NO_SHARDS, "store": EDGE, "generation": 0})
        store = _edge_store(folder, read_manifest(folder))
        store.make_ready()
        return store
    points = _on_server(place, client)
    if points.facts() is not None:
        raise ValueError(
            f"`folder` {str(place)!r} is a collection already. Open it with `PicoIndex.open`, or "
            "name another one."
        )
    store = _server_store(str(place), facts, points, made=False)
    store.make_ready()
    return store


def open_qdrant(place: Any, client: Any = None) -> QdrantStore | None:
    """An index on Qdrant; None if there are files of another kind.

    Raises:
        ValueError: If a server has no such collection.
    """
    if client is None and not is_url(place):
        folder = Path(place)
        there = (folder / MANIFEST).is_file()
        manifest = read_manifest(folder) if there else {}
        return _edge_store(folder, manifest) if manifest.get("store") == EDGE else None
    points = _on_server(place, client)
    facts = points.facts()
    if facts is None:
        raise ValueError(
            f"`folder` must be a collection on the server, got {str(place)!r}, which is not there. "
            "Make it with `PicoIndex.create`, and add an image."
        )
    try:
        check_manifest({**facts, **_NO_SHARDS, "generation": 1})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The metadata of the collection {str(place)!r} do not fit an index ({error}). Make it "
            "anew."
        ) from error
    return _server_store(str(place), facts, points, made=True)


def _edge_store(folder: Path, manifest: dict[str, Any]) -> QdrantStore:
    shard = folder / "shard"

    def make(facts: dict[str, Any]) -> Points:
        points = EdgePoints.create(shard, facts["width"], facts["dtype"])
        made = {**facts, **_NO_SHARDS, "store": EDGE, "generation": 1}
        write_manifest(folder, made)  # from here on the shard is part of the index
        return points

    facts = {key: manifest[key] for key in ("dtype", "width", "merging", "encoder")}
    points = EdgePoints(shard) if manifest["generation"] else None
    return QdrantStore(str(folder), facts, points, make)


def _server_store(
    place: str, facts: dict[str, Any], points: ClientPoints, made: bool
) -> QdrantStore:
    def make(facts: dict[str, Any]) -> Points:
        points.create(facts)
        return points

    return QdrantStore(place, facts, points if made else None, make)


def _on_server(place: Any, client: Any) -> ClientPoints:
    if client is not None:
        return ClientPoints(client, str(place), str(place), owned=False)
    address, _, name = str(place).rstrip("/").rpartition("/")
    if address in ("http:/", "https:/") or not name:
        raise ValueError(
            "`folder` must be the address of a collection, as 'http://localhost:6333/photos', got "
            f"{place!r}. Add the name of a collection."
        )
    key = os.environ.get("QDRANT_API_KEY")
    client = client_library().QdrantClient(url=address, api_key=key, check_compatibility=False)
    return ClientPoints(client, name, str(place), owned=True)
