"""How large the images may be that a processor's settings ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pico_hf.data.image_files import short

MAX_PROCESSED_PIXELS = 2**22
"""Pixels of an image as a tower gets it: 4,194,304, 50 MB as fp32 in RGB. No encoder of the table
takes a quarter of that."""

_EDGES = ("size", "edge", "height", "width", "divisor", "size_divisible")


def check_image_sizes(image_processor: Any) -> None:
    """Refuses an image processor whose settings would make huge images of small ones.

    Args:
        image_processor: What `AutoImageProcessor` gives.

    Raises:
        ValueError: If a size of its settings is beyond [`MAX_PROCESSED_PIXELS`].
    """
    settings = image_processor.to_dict() if hasattr(image_processor, "to_dict") else {}
    for name, pixels in _sizes(settings):
        if pixels > MAX_PROCESSED_PIXELS:
            raise ValueError(
                f"`{name}` of the image processor must stay within {MAX_PROCESSED_PIXELS} pixels "
                f"({math.isqrt(MAX_PROCESSED_PIXELS)} × {math.isqrt(MAX_PROCESSED_PIXELS)}), got "
                f"{short(repr(settings[name]))}. Check the processor's files."
            )


def _sizes(settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every size among settings, and the pixels of an image that has it."""
    for name, value in settings.items():
        if not str(name).endswith(_EDGES):
            continue
        edges = dict(value) if isinstance(value, Mapping) else {"": value}
        if _is_number(edges.get("shortest_edge")):
            edges.pop("longest_edge", None)  # then it only limits the other
        numbers = [abs(edge) for edge in edges.values() if _is_number(edge)]
        if numbers:
            yield name, max(numbers) * (min(numbers) if len(numbers) == 2 else max(numbers))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
