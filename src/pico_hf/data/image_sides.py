"""Rows that name images and what belongs together → the images of either side, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from pico_hf.data.checking import check_kind, readable_rows, stored_images
from pico_hf.data.columns import find_image_column, not_found, require_column
from pico_hf.data.dataset import StoredImages
from pico_hf.data.identity import identity_name, rows_of_images
from pico_hf.data.reading import Read, is_made_on_the_fly

TARGET_NAMES = ("target_image", "positive_image")  # not "target", which is often a class
LABEL_NAMES = ("label", "labels", "class")
_HINT = (
    " Images find images by a column of target images (`target_image_column`) or by what they show."
)


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


def image_sides(
    rows: datasets.Dataset,
    targets: datasets.Dataset | None,
    *,
    image_column: str | None,
    target_image_column: str | None,
    label_column: str | None,
    skip_bad_images: bool,
) -> tuple[ImageSide, ImageSide]:
    """The images that search and those that are searched, in any of the forms of the data.

    For arguments and errors see [`pico_hf.data.image_pairs.ImagePairDataset`].

    Returns:
        Queries and targets; twice the same object if all images are both.
    """
    rows = _plain("rows", rows)
    image = image_column or find_image_column(rows)
    if targets is not None and target_image_column is not None:
        raise ValueError(
            "`target_image_column` must be left out where `targets` is given, got "
            f"{target_image_column!r}. Give target images in a column or in a second data set."
        )
    target = target_image_column or _usual(rows, TARGET_NAMES)
    if target is not None and targets is None:
        return _pairs(rows, image, target, label_column, skip_bad_images)
    label = label_column or _usual(rows, LABEL_NAMES)
    if label is None:
        raise not_found("label_column", rows.column_names, reason=_HINT)
    queries = _labelled(rows, image, label, skip_bad_images)
    if targets is None:
        return queries, queries
    return queries, _labelled(_plain("targets", targets), image, label, skip_bad_images)


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
