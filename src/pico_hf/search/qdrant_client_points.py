"""A Qdrant collection by its client: on a server or a cluster, or in the client's local mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from json import JSONDecodeError
from types import SimpleNamespace
from typing import Any

import numpy as np

from pico_hf.search.qdrant_points import (
    DATATYPES,
    POOLED,
    SUMMARY,
    TOKENS,
    Condition,
    Point,
    arrays,
)

FACTS = "pico_hf"  # under which a collection's metadata say what an index is
SECONDS = 60  # for one answer; the client's own five are short for a group of images
REQUEST_NUMBERS = 2**20  # of one upsert: about half of what a server takes by default


def client_library() -> Any:
    """The module; ImportError that says what to install."""
    try:
        import qdrant_client
    except ImportError as error:
        raise ImportError(
            "An index on a Qdrant server needs qdrant-client, which is not installed. Install it "
            "with: pip install 'pico-hf[qdrant]'"
        ) from error
    return qdrant_client


class ClientPoints:
    """See `Points`.

    Args:
        client: A `QdrantClient`.
        name: Of the collection.
        place: Its address, for messages.
        owned: Whether `close` closes the client; one that a user gave stays open.
    """

    truth_values = True

    def __init__(self, client: Any, name: str, place: str, owned: bool) -> None:
        self._models = client_library().models
        self._client, self._name, self._place = client, name, place
        self._owned = owned
        self._kit = _kit(self._models)

    def facts(self) -> dict[str, Any] | None:
        """What the collection's metadata say of the index; None if there is no collection.

        Raises:
            ValueError: If there is one that is no index.
        """
        metadata = self.metadata()
        if metadata is not None and FACTS not in metadata:
            raise ValueError(
                f"The collection {self._place!r} is no index of pico_hf: its metadata do not say "
                "which model made it. Name another collection; Qdrant before 1.16 keeps no "
                "metadata."
            )
        return None if metadata is None else metadata[FACTS]

    def metadata(self) -> dict[str, Any] | None:
        """What is kept beside a collection; None if there is none."""
        if not self._ask(self._client.collection_exists):
            return None
        return self._ask(self._client.get_collection).config.metadata or {}

    def note(self, name: str, value: str) -> None:
        """Keeps a text beside the collection, under a name of its metadata."""
        self._ask(self._client.update_collection, metadata={name: value})

    def create(self, facts: dict[str, Any]) -> None:
        """Makes the collection; ValueError if there is one."""
        models = self._models
        width, kind = facts["width"], models.Datatype(DATATYPES[facts["dtype"]])
        one = models.VectorParams(size=width, distance=models.Distance.DOT, on_disk=True)
        tokens = models.VectorParams(
            size=width,
            distance=models.Distance.DOT,
            datatype=kind,
            on_disk=True,
            hnsw_config=models.HnswConfigDiff(m=0),
            multivector_config=models.MultiVectorConfig(
                comparator=models.MultiVectorComparator.MAX_SIM
            ),
        )
        self._ask(
            self._client.create_collection,
            vectors_config={POOLED: one, TOKENS: tokens, SUMMARY: one},
            metadata={FACTS: facts},
        )
        for field in ("paths", "id"):
            self._ask(
                self._client.create_payload_index,
                field_name=field,
                field_schema=models.PayloadSchemaType.KEYWORD,
            )

    def put(self, points: Sequence[Point]) -> None:
        """See `Points`."""
        group: list[Any] = []
        size = 0
        for one in points:
            numbers = sum(vector.size for vector in one.vectors.values())
            if group and size + numbers > REQUEST_NUMBERS:
                self._ask(self._client.upsert, points=group, wait=True)
                group, size = [], 0
            own = {name: vector.tolist() for name, vector in one.vectors.items()}
            group.append(self._models.PointStruct(id=one.id, vector=own, payload=one.payload))
            size += numbers
        self._ask(self._client.upsert, points=group, wait=True)

    def put_payloads(self, payloads: Mapping[str, dict[str, Any]]) -> None:
        """See `Points`."""
        operations = [
            self._models.OverwritePayloadOperation(
                overwrite_payload=self._models.SetPayload(payload=payload, points=[key])
            )
            for key, payload in payloads.items()
        ]
        self._ask(self._client.batch_update_points, update_operations=operations, wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        """See `Points`."""
        chosen = self._models.PointIdsList(points=list(ids))
        self._ask(self._client.delete, points_selector=chosen, wait=True)

    def get(self, ids: Sequence[str], vectors: Sequence[str] = ()) -> list[Point]:
        """See `Points`."""
        found = self._ask(self._client.retrieve, ids=list(ids), with_vectors=list(vectors))
        return [_point(one) for one in found]

    def page(
        self, condition: Condition, after: Any, limit: int, vectors: Sequence[str] = ()
    ) -> tuple[list[Point], Any]:
        """See `Points`."""
        found, following = self._ask(
            self._client.scroll,
            scroll_filter=condition.filter(self._kit),
            offset=after,
            limit=limit,
            with_vectors=list(vectors),
        )
        return [_point(one) for one in found], following

    def count(self, condition: Condition) -> int:
        """See `Points`."""
        chosen = condition.filter(self._kit)
        return self._ask(self._client.count, count_filter=chosen, exact=True).count

    def nearest(self, name: str, query: np.ndarray, condition: Condition, limit: int) -> list[str]:
        """See `Points`."""
        found = self._ask(
            self._client.query_points,
            query=query.tolist(),
            using=name,
            query_filter=condition.filter(self._kit),
            limit=limit,
            with_payload=False,
        )
        return [str(one.id) for one in found.points]

    def settle(self) -> None:
        """Nothing: a server does so by itself."""

    def close(self) -> None:
        """See `Points`."""
        if self._owned:
            self._client.close()

    def _ask(self, call: Callable[..., Any], **options: Any) -> Any:
        from grpc import RpcError
        from pydantic import ValidationError
        from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

        try:
            return call(collection_name=self._name, **options)
        except UnexpectedResponse as error:
            reason = error.reason_phrase or error.status_code
            content = bytes(error.content or b"").decode(errors="replace")[:300]
            key = error.status_code in (401, 403)
            raise OSError(
                f"The Qdrant server refused {self._place!r} ({reason}: {content}). "
                f"{'Set its key as QDRANT_API_KEY. ' if key else ''}What it held before is still "
                "there."
            ) from error
        except (JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise ConnectionError(
                f"What answers at {self._place!r} is no Qdrant server: its answer cannot be read "
                f"({_short(error)}). Correct the address."
            ) from error
        except (ApiException, RpcError, OSError) as error:
            raise ConnectionError(
                f"No Qdrant server answers at {self._place!r} ({_short(error)}). Start it or "
                "correct the address, and run the same call again; what was stored is still there."
            ) from error


def _short(error: Exception) -> str:
    """What is wrong, in one line that is not long."""
    return " ".join(str(error).split())[:200]


def _point(one: Any) -> Point:
    return Point(str(one.id), one.payload or {}, arrays(one.vector))


def _kit(models: Any) -> SimpleNamespace:
    """What `Condition.filter` is built from."""
    return SimpleNamespace(
        truth_values=True,
        Filter=lambda must: models.Filter(must=must),
        AnyOf=lambda conditions: models.Filter(should=conditions),
        Equal=lambda field, value: models.FieldCondition(
            key=field, match=models.MatchValue(value=value)
        ),
        Between=lambda field, low, high: models.FieldCondition(
            key=field, range=models.Range(gte=low, lte=high)
        ),
        Ids=lambda ids: models.HasIdCondition(has_id=sorted(ids)),
    )
