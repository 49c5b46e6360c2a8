"""Images that are to find images: pairs of a query and its target, or images of one class."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pico_hf.data.checking import check_kind, readable_rows, stored_images
from pico_hf.data.columns import find_image_column, not_found, require_column
from pico_hf.data.dataset import StoredImages
from pico_hf.data.identity import identity_codes, identity_name, rows_of_images
from pico_hf.data.reading import Read, is_made_on_the_fly

logger = logging.getLogger(__name__)

TARGET_NAMES = ("target_image", "target", "positive_image", "positive")
LABEL_NAMES = ("label", "labels", "class")


@dataclass(frozen=True)
class ImageSide:
    """The images that search, or those that are searched, each of them once.

    Attributes:
        images: Rows `{"image": PIL image}`.
        digests: Of each image's content.
        names: Of what each image shows.
    """

    images: StoredImages
    digests: list[str]
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)


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
        rows = _plain("rows", rows)
        self.seed = seed
        image = image_column or find_image_column(rows)
        target = target_image_column or (_usual(rows, TARGET_NAMES) if targets is None else None)
        if target is not None and targets is None:
            label = label_column
            sides = _pairs(rows, image, target, label, skip_bad_images)
        elif target is not None:
            raise ValueError(
                f"`target_image_column` must be left out where `targets` is given, got {target!r}. "
                "Give target images in a column or in a second data set."
            )
        else:
            label = label_column or _usual(rows, LABEL_NAMES)
            if label is None:
                raise not_found("label_column", rows.column_names, reason=_HINT)
            query = _labelled(rows, image, label, skip_bad_images)
            other = query
            if targets is not None:
                targets = _plain("targets", targets)
                other = _labelled(targets, image, label, skip_bad_images)
            sides = query, other
        self.queries, self.targets = sides
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
                f"`rows` must hold a query with a match, got {len(self.queries)} queries and none. "
                "Name the column that says what belongs together with `label_column`."
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


_HINT = (
    " Images find images by a column of target images (`target_image_column`) or by what they show."
)


def _plain(argument: str, rows: Any) -> datasets.Dataset:
    """Rows as they are stored."""
    check_kind(rows)
    if is_made_on_the_fly(rows):
        raise ValueError(
            f"`{argument}` must hold stored images, got rows with a transform. Apply it with "
            "`datasets.Dataset.map`, or take `rows.with_format(None)`."
        )
    return rows.with_format(None)


def _usual(rows: datasets.Dataset, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in rows.column_names), None)


def _codes(first: Sequence[str], second: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Numbers that are equal for equal names, on either side."""
    codes = identity_codes([*first, *second])
    return codes[: len(first)], codes[len(first) :]


def _names(rows: datasets.Dataset, column: str | None) -> list[str | None]:
    if column is None:
        return [None] * len(rows)
    require_column(rows.column_names, "label_column", column)
    return [identity_name(value) for value in rows[column]]


def _labelled(rows: datasets.Dataset, image: str, label: str, skip: bool) -> ImageSide:
    """Images with their labels; those of one image and label are one."""
    require_column(rows.column_names, "image_column", image)
    images, reads = stored_images(rows, image)
    names = _names(rows, label)
    good = readable_rows(reads, skip)
    groups = _groups(reads, names, good)
    shown = [
        next((f"label {names[row]}" for row in group if names[row] is not None), None)
        for group in groups
    ]
    alone = [f"image {reads[group[0]].key}" for group in groups]
    return _side(images, reads, groups, [a or b for a, b in zip(shown, alone, strict=True)])


def _pairs(
    rows: datasets.Dataset, image: str, target: str, label: str | None, skip: bool
) -> tuple[ImageSide, ImageSide]:
    """Queries and targets of rows that name both."""
    require_column(rows.column_names, "image_column", image)
    require_column(rows.column_names, "target_image_column", target)
    (queries, query_reads), (targets, target_reads) = (
        stored_images(rows, column) for column in (image, target)
    )
    names = _names(rows, label)
    good = readable_rows(
        [q if q.problem else t for q, t in zip(query_reads, target_reads, strict=True)], skip
    )
    groups = [_groups(reads, names, good) for reads in (query_reads, target_reads)]
    things = _things(len(rows), [*groups[0], *groups[1], *_named(names, good)])
    return (
        _side(queries, query_reads, groups[0], [things[group[0]] for group in groups[0]]),
        _side(targets, target_reads, groups[1], [things[group[0]] for group in groups[1]]),
    )


def _groups(
    reads: Sequence[Read], names: Sequence[str | None], good: Sequence[int]
) -> list[list[int]]:
    """Rows of each image, of the readable rows."""
    found = rows_of_images([reads[n].key for n in good], [names[n] for n in good], [""] * len(good))
    return [[good[number] for number in group] for group in found]


def _named(names: Sequence[str | None], good: Sequence[int]) -> list[list[int]]:
    """Rows of each name."""
    rows: dict[str, list[int]] = {}
    for row in good:
        name = names[row]
        if name is not None:
            rows.setdefault(name, []).append(row)
    return list(rows.values())


def _things(rows: int, groups: Sequence[Sequence[int]]) -> list[str]:
    """What each row shows: rows that any groups link, however indirectly, show one thing."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = [(group[0], row) for group in groups for row in group]
    first, second = zip(*links, strict=True)
    graph = coo_array(([1] * len(links), (first, second)), shape=(rows, rows))
    _, numbers = connected_components(graph, directed=False)
    return [f"thing {number}" for number in numbers]


def _side(
    images: datasets.Dataset,
    reads: Sequence[Read],
    groups: Sequence[Sequence[int]],
    names: list[str],
) -> ImageSide:
    firsts = [group[0] for group in groups]
    kept = images if len(firsts) == len(images) else images.select(firsts)
    return ImageSide(StoredImages(kept), [reads[row].digest for row in firsts], names)
