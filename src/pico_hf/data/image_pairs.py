"""Images that are to find images: pairs of a query and its target, or images of one class."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pico_hf.data.identity import identity_codes
from pico_hf.data.image_sides import image_sides

logger = logging.getLogger(__name__)


class ImagePairDataset(Dataset):
    """Images that are to find images of the same thing, for training and for ranking.

    Three forms:

    - rows with `image` and `target_image`: a query and its target, such as a snapshot and the
      product photo, a sketch and the photo. What several rows have in common is joined: rows of one
      image (by path, else content) or of one label show one thing, and all their targets match.
    - rows with `image` and `label`: every image is a query and a target; those of its class match.
    - `rows` and `targets`, both with `image` and `label`: images of the first find those of the
      other.

    An image is never its own match: see [`pico_hf.core.match_metrics.match_metrics`]. Where a label
    is missing (None, NaN or empty), the image is a class of its own.

    As a sequence it gives training pairs, each query that has a match once: a row of the query, as
    `image`, of one match, as `target_image`, and of `image_ids`, which are equal for equal classes.
    The match is chosen by a function of (seed, epoch, query) alone.

    Args:
        rows: A `datasets.Dataset`. Paths of images are those of the working folder if they are not
            absolute; an imagefolder whose metadata have `image_file_name` and
            `target_image_file_name` resolves them by itself.
        targets: A second one, that `rows` search; None: see above.
        seed: Seed of the choice of matches.
        image_column: None finds it by its type or name.
        target_image_column: None takes a column with a usual name, if there is one.
        label_column: What images show; of pairs too, where it may join more rows. None takes a
            column with a usual name if there are no target images.
        skip_bad_images: True leaves rows with unreadable images out and logs how many.

    Attributes:
        queries: The images that search.
        targets: The images that are searched; the same object if they are the queries.
        query_ids: (queries,) number of what each query shows.
        target_ids: (targets,) likewise.
        query_images: (queries,) number of each query's content.
        target_images: (targets,) likewise.

    Raises:
        ValueError: If a column is missing, an image unreadable, or no query has a match.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        targets: datasets.Dataset | None = None,
        seed: int = 0,
        *,
        image_column: str | None = None,
        target_image_column: str | None = None,
        label_column: str | None = None,
        skip_bad_images: bool = False,
    ) -> None:
        self.seed = seed
        self.queries, self.targets = image_sides(
            rows,
            targets,
            image_column=image_column,
            target_image_column=target_image_column,
            label_column=label_column,
            skip_bad_images=skip_bad_images,
        )
        self.query_ids, self.target_ids = _codes(self.queries.names, self.targets.names)
        self.query_images, self.target_images = _codes(self.queries.digests, self.targets.digests)
        # Workers that live on between epochs have copies of all but what is in shared memory.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._matches = self._find_matches()
        digests = self.queries.digests
        self._order = sorted(self._matches, key=lambda query: (digests[query], query))
        left = len(self.queries) - len(self._order)
        if not self._order:
            raise ValueError(
                f"`rows` must hold a query with a match, got {len(self.queries)} queries and none: "
                "an image is never its own match. Name the column that says what belongs together "
                "with `label_column`."
            )
        if left:
            logger.warning("%d of %d queries have no match.", left, len(self.queries))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One training pair, see the class."""
        query = self._order[number]
        matches = self._matches[query]
        key = f"{self.seed}/{self.epoch}/{self.queries.digests[query]}".encode()
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
        target = matches[drawn % len(matches)]
        return {
            "image": self.queries.images[query]["image"],
            "target_image": self.targets.images[target]["image"],
            "image_ids": int(self.query_ids[query]),
        }

    @property
    def epoch(self) -> int:
        """Whose matches the pairs have."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the matches of an epoch; accelerate's data loaders call it."""
        self._epoch.fill_(epoch)

    def _find_matches(self) -> dict[int, list[int]]:
        """Query → its matches, in an order that does not depend on that of the rows."""
        by_id: dict[int, list[int]] = {}
        digests = self.targets.digests
        for target in sorted(range(len(self.targets)), key=digests.__getitem__):
            by_id.setdefault(int(self.target_ids[target]), []).append(target)
        found = {}
        for query, name in enumerate(self.query_ids.tolist()):
            own = self.queries.digests[query]
            matches = [target for target in by_id.get(name, ()) if digests[target] != own]
            if matches:
                found[query] = matches
        return found


def _codes(first: Sequence[str], second: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Numbers that are equal for equal names, on either side."""
    codes = identity_codes([*first, *second])
    return codes[: len(first)], codes[len(first) :]
