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
    digests: Sequence[str], names: Sequence[str | None], galleries: Sequence[str]
) -> list[list[int]]:
    """Rows of each image, in order of first appearance.

    Rows of one gallery with the same content are one image, unless they are named differently: a
    placeholder may stand for several products. A row without a name takes that of its content.

    Args:
        digests: Content of each row's image.
        names: What the user calls it, None where that is missing.
        galleries: Of each row.
    """
    known: dict[tuple[str, str], str] = {}
    for key, name in zip(zip(galleries, digests, strict=True), names, strict=True):
        if name is not None:
            known[key] = min(name, known.get(key, name))  # the same in whatever order of rows
    images: dict[Hashable, list[int]] = {}
    for row, (gallery, digest, name) in enumerate(zip(galleries, digests, names, strict=True)):
        found = name if name is not None else known.get((gallery, digest))
        images.setdefault((gallery, digest, found), []).append(row)
    return list(images.values())


def canonical_order(
    digests: Sequence[str], galleries: Sequence[str], identities: Sequence[str]
) -> list[int]:
    """Rows in an order that depends on their content alone and not on how they were listed."""
    keys = list(zip(digests, galleries, identities, strict=True))
    return sorted(range(len(keys)), key=keys.__getitem__)
