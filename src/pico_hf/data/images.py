"""Pictures in whatever form users have them → RGB, or what is wrong with them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps


def as_rgb(image: Any) -> Image.Image:
    """A PIL image in RGB, the right way up as its EXIF entry says.

    Args:
        image: A PIL image, a path, the bytes of a file, or both as `{"bytes": …, "path": …}`, the
            form of a `datasets.Image(decode=False)` column.

    Raises:
        ValueError: If it is none of them, a URL, or no readable picture.
    """
    source = _source(image)
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source)
        # datasets turns pictures when it decodes them; the same file must not give two pictures.
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError) as error:  # PIL raises both for damaged files
        raise ValueError(f"`image` cannot be read ({error}). Repair it or leave it out.") from error


def _source(image: Any) -> Any:
    """What PIL can open, or a PIL image."""
    kind = type(image).__name__
    if isinstance(image, dict):
        kind = f"a dict with {', '.join(map(repr, image)) or 'no entries'}"
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if is_url(image):
        raise ValueError(
            f"`image` must be a PIL image, a path or bytes, got the URL {image!r}. Nothing is "
            "fetched here: download it first, for example with `transformers.image_utils."
            "load_image`."
        )
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if not isinstance(image, Image.Image | str | Path | io.BytesIO):
        raise ValueError(
            "`image` must be a PIL image, a path or bytes, or a dict with one of them as 'path' or "
            f"'bytes', got {kind}."
        )
    return image


def is_url(value: Any) -> bool:
    """Whether a value is the address of something elsewhere (http, s3, hf, …)."""
    return isinstance(value, str) and "://" in value


def image_problem(value: dict[str, Any] | None) -> str | None:
    """What is wrong with an encoded image (`{"bytes", "path"}`), None if it decodes."""
    if value is None:
        return "no image"
    try:
        with Image.open(_source(value)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        return str(error) or type(error).__name__
    return None
