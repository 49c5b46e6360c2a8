"""Where a Qdrant collection is: in a folder, or at an address."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pico_hf.search.checks import check_manifest
from pico_hf.search.files import MANIFEST, new_folder, read_manifest, write_manifest
from pico_hf.search.qdrant_client_points import SECONDS, ClientPoints, client_library
from pico_hf.search.qdrant_edge_points import EdgePoints, edge_library
from pico_hf.search.qdrant_points import Points

EDGE = "qdrant-edge"  # what the manifest of a folder says
MODEL = "pico_hf_model"  # what a collection's metadata may say besides
_BARE = re.compile(r"[a-z+]+://.*|[\w.-]+:\d+(/.*)?", re.IGNORECASE)
_NO_SHARDS: dict[str, Any] = {"next_shard": 1, "shards": []}  # of an index in files


class QdrantPlace(NamedTuple):
    """Where a collection is and how it is made: what a [`QdrantStore`] is opened with."""

    place: str
    facts: dict[str, Any]
    points: Points | None
    make: Callable[[dict[str, Any]], Points]


def is_url(place: Any) -> bool:
    """Whether an index is on a server.

    Raises:
        ValueError: If it reads like an address and does not begin as one.
    """
    if not isinstance(place, str) or place.startswith(("http://", "https://")):
        return isinstance(place, str)
    if _BARE.fullmatch(place) and not os.path.exists(place):
        raise ValueError(
            f"The address of a collection begins with http:// or https://, got {place!r}. Write "
            "it as http://localhost:6333/photos, or a folder as ./NAME."
        )
    return False


def is_there(place: Any, client: Any = None) -> bool:
    """Whether there is an index, of any kind."""
    if client is None and not is_url(place):
        return (Path(place) / MANIFEST).is_file()
    return _on_server(place, client).facts() is not None


def note_model(address: str, model: str) -> None:
    """Keeps the name of the model that a collection is made with in its metadata."""
    points = _on_server(address, None)
    if (points.metadata() or {}).get(MODEL) != model:
        points.note(MODEL, model)
    points.close()


def model_note(address: str) -> str | None:
    """The name that `note_model` has kept; None without one, or without a collection."""
    points = _on_server(address, None)
    found = (points.metadata() or {}).get(MODEL)
    points.close()
    return None if found is None else str(found)


def create_qdrant(place: Any, facts: dict[str, Any], client: Any = None) -> QdrantPlace:
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
        return _edge_place(folder, read_manifest(folder))
    points = _on_server(place, client)
    if points.facts() is not None:
        raise ValueError(
            f"`folder` {str(place)!r} is a collection already. Open it with `PicoIndex.open`, or "
            "name another one."
        )
    return _server_place(str(place), facts, points, made=False)


def open_qdrant(place: Any, client: Any = None) -> QdrantPlace | None:
    """An index on Qdrant; None if there are files of another kind.

    Raises:
        ValueError: If a server has no such collection.
    """
    if client is None and not is_url(place):
        folder = Path(place)
        there = (folder / MANIFEST).is_file()
        manifest = read_manifest(folder) if there else {}
        return _edge_place(folder, manifest) if manifest.get("store") == EDGE else None
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
    return _server_place(str(place), facts, points, made=True)


def _edge_place(folder: Path, manifest: dict[str, Any]) -> QdrantPlace:
    shard = folder / "shard"

    def make(facts: dict[str, Any]) -> Points:
        points = EdgePoints.create(shard, facts["width"], facts["dtype"])
        made = {**facts, **_NO_SHARDS, "store": EDGE, "generation": 1}
        write_manifest(folder, made)  # from here on the shard is part of the index
        return points

    facts = {key: manifest[key] for key in ("dtype", "width", "merging", "encoder")}
    points = EdgePoints(shard) if manifest["generation"] else None
    return QdrantPlace(str(folder), facts, points, make)


def _server_place(
    place: str, facts: dict[str, Any], points: ClientPoints, made: bool
) -> QdrantPlace:
    def make(facts: dict[str, Any]) -> Points:
        points.create(facts)
        return points

    return QdrantPlace(place, facts, points if made else None, make)


def _on_server(place: Any, client: Any) -> ClientPoints:
    if client is not None:
        return ClientPoints(client, str(place), str(place), owned=False)
    address, _, name = str(place).rstrip("/").rpartition("/")
    if address in ("http:/", "https:/") or not name:
        raise ValueError(
            "The address of a collection ends in its name, as 'http://localhost:6333/photos', got "
            f"{place!r}. Add the name of a collection."
        )
    key = os.environ.get("QDRANT_API_KEY")
    options = {"check_compatibility": False, "timeout": SECONDS}
    client = client_library().QdrantClient(url=address, api_key=key, **options)
    return ClientPoints(client, name, str(place), owned=True)
