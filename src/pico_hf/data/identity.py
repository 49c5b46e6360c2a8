"""Which rows show one image, and which images are one thing: from names, else from content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def content_digest(content: bytes | str) -> str:
    """Equal for equal files or texts, wherever they are stored."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def pixel_digest(image: Image.Image) -> str:
    """Equal for images of equal mode, size and pixels."""
    header = f"{image.mode}/{image.size}/".encode()
    return hashlib.blake2b(header + image.tobytes(), digest_size=16).hexdigest()


def identity_name(value: Any) -> str | None:
    """The identity a user gave as text; None where it is missing (None, NaN or empty)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value) if str(value).strip() else None


def identity_codes(values: Sequence[Any]) -> Tensor:
    """(rows,) equal numbers for equal values, from 0 in order of appearance.

    Args:
        values: Names or numbers; each missing one (None, NaN or empty) gets a number of its own.

    Example:
        >>> identity_codes(["mug", None, "mug", None]).tolist()
        [0, 1, 0, 2]
    """
    numbers: dict[Hashable, int] = {}
    codes = []
    for row, value in enumerate(values):
        name = identity_name(value)
        key: Hashable = (row,) if name is None else name
        codes.append(numbers.setdefault(key, len(numbers)))
    return torch.tensor(codes, dtype=torch.long)


def rows_of_images(
    keys: Sequence[str], names: Sequence[str | None], galleries: Sequence[str]
) -> list[list[int]]:
    """Rows of each image, in order of first appearance.

    Rows of one gallery with the same path or content are one image, unless they are named
    differently: a placeholder may stand for several products. A row without a name takes the name
    of another row of its image.

    Args:
        keys: Path or content of each row's image.
        names: What the user calls it, None where that is missing.
        galleries: Of each row.
    """
    known: dict[tuple[str, str], str] = {}
    for place, name in zip(zip(galleries, keys, strict=True), names, strict=True):
        if name is not None:
            known[place] = min(name, known.get(place, name))  # the same in whatever order of rows
    images: dict[Hashable, list[int]] = {}
    for row, (gallery, key, name) in enumerate(zip(galleries, keys, names, strict=True)):
        found = name if name is not None else known.get((gallery, key))
        images.setdefault((gallery, key, found), []).append(row)
    return list(images.values())


def canonical_order(
    digests: Sequence[str],
    galleries: Sequence[str],
    captions: Sequence[Sequence[str]],
    identities: Sequence[str],
) -> list[int]:
    """Images in an order that depends on their content alone and not on how rows list them.

    Args:
        digests: Of each image's content; the rest only tells apart those of equal content.
        galleries: Of each image.
        captions: Of each image, in any order.
        identities: Of each image.
    """
    texts = [sorted(own) for own in captions]
    keys = list(zip(digests, galleries, texts, identities, strict=True))
    return sorted(range(len(keys)), key=keys.__getitem__)
