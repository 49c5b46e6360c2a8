"""What adding images to an index has done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class AddReport:
    """What an `add` did.

    Attributes:
        added: Images that are new.
        updated: Images of which content, payload or path changed, or of which an index of an
            older version lacked the pooled feature.
        unchanged: Images that were there already.
        duplicates: Images with the content of another image of the same source: they are stored
            once, with the payload of the first.
        skipped: (image, what is wrong with it) of those that cannot be read.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    duplicates: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def total(cls, reports: Sequence[AddReport]) -> AddReport:
        """What several processes did."""
        counts = ("added", "updated", "unchanged", "duplicates")
        sums = {name: sum(getattr(one, name) for one in reports) for name in counts}
        return cls(**sums, skipped=[skip for one in reports for skip in one.skipped])

    def check(self, images: int) -> None:
        """Raises ValueError if none of so many images could be read."""
        if len(self.skipped) == images:
            raise ValueError(
                f"`source` must hold images that can be read, got {images} that cannot: "
                f"{self.skipped[0][0]} ({self.skipped[0][1]})."
            )
