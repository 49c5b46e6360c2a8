"""What a search finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pico_hf.search.payload import Payload, payload_of

Found = list[tuple[float, dict[str, Any]]]  # (score, record), best first


@dataclass(frozen=True)
class Hit:
    """One image that was found.

    Attributes:
        id: Of the image: as it was named, else a digest of its content.
        score: Of the query and the image, as `PicoModel.score` gives it up to the rounding of the
            storage; S alone in an index that was opened without a model.
        payload: What was stored beside it; `path` of its file, if it has one.
    """

    id: str
    score: float
    payload: Payload

    @property
    def path(self) -> str | None:
        """Where the image's file was when it was added."""
        return self.payload.get("path")


def hits_of(found: Found) -> list[Hit]:
    """What a user sees of scores and records."""
    return [Hit(record["id"], score, payload_of(record)) for score, record in found]
