"""Image files and bytes → loaded PIL images: formats of a fixed list, within a budget of pixels.

Every image of training, evaluation, retrieval, search and pipelines is opened here.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

MAX_PIXELS = 2**25
"""Pixels (width × height) that are decoded of an image: 33,554,432, 100 MB in RGB."""

MAX_PIXELS_VARIABLE = "PICO_HF_MAX_PIXELS"
"""The environment variable that raises, or lowers, [`MAX_PIXELS`]."""

# What Pillow decodes by itself. EPS starts Ghostscript, WMF, BUFR, GRIB and HDF5 whatever is
# registered for them; the others are rare and their readers little tested.
READ_FORMATS = (
    *("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM"),
    *("QOI", "ICO", "PCX", "SGI", "TGA"),
)
# The path of a file is shorter; a longer text, or one that starts so, holds an image as base64.
LONGEST_PATH = 4096
BASE64_STARTS = ("data:", "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")

_BYTES_PER_PIXEL = 8  # of a file without compression: 16 bits of red, green, blue and alpha
_REDUCTIONS = (2, 4, 8)  # in which a JPEG can be decoded
_PROGRESSIVE = 2  # times the budget: its coefficients are held as a whole, 6 bytes for each pixel


class TooLargeError(ValueError):
    """An image or a file beyond the budget; its message is not cut."""


def pixel_budget() -> int:
    """Pixels that are decoded of an image at most.

    Returns:
        What the environment variable `PICO_HF_MAX_PIXELS` says, else [`MAX_PIXELS`] or, where it
        is lower, `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ValueError: If the variable is no integer >= 1.
    """
    given = os.environ.get(MAX_PIXELS_VARIABLE)
    if not given:
        return min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    if not (given.isascii() and given.isdecimal() and len(given) < 19 and int(given) > 0):
        raise ValueError(f"{MAX_PIXELS_VARIABLE} must be an integer >= 1, got {short(given)!r}")
    return int(given)


def loaded(source: Image.Image | bytes, name: str = "it") -> Image.Image:
    """The pixels of a file, or of an image that may not have been loaded yet.

    A JPEG above the budget is decoded at a half, a quarter or an eighth of its width and height,
    the largest that is within it; of other formats it is refused. Images below it, and those that
    are in memory already, are taken as they are. Of several frames the first is read.

    Args:
        source: Bytes of a file, or an image.
        name: Of the image in messages.

    Raises:
        ValueError: For a format that is not read, no pixels, or too many of them.
        Exception: Whatever Pillow raises at a damaged file.
    """
    if isinstance(source, bytes):
        image = _opened(source, name)
    elif _in_memory(source):
        image = source
    elif source.format not in READ_FORMATS:
        raise ValueError(f"files in {source.format} are not read: convert it to PNG or JPEG")
    elif source.width * source.height > pixel_budget():
        image = _opened(_file_of(source), name)
    else:
        image = source
    if 0 in image.size:
        raise ValueError(f"it has no pixels: its size is {image.size}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an entry that cannot be read is left out
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image.load()
    return image


def largest_file() -> int:
    """Bytes of a file that is read at most: those of the budget without compression."""
    return max(pixel_budget(), MAX_PIXELS) * _BYTES_PER_PIXEL


def file_bytes(path: str | Path) -> bytes:
    """The bytes of a plain file; pipes and devices are not opened.

    Raises:
        ValueError: If it is none, or larger than a file without compression within the budget.
        OSError: If it cannot be read.
    """
    text = os.fspath(path)
    if is_base64(text):
        raise ValueError(
            f"a text of {len(text)} characters is no path: decode base64 with `base64.b64decode`"
        )
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{short(text)} is no plain file")
    most = largest_file()
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size <= most:
            content = file.read(most + 1)  # a file that grows, or that says it has no bytes
            if len(content) <= most:
                return content
    raise TooLargeError(
        f"{short(text)!r} is larger than {most} bytes, {_BYTES_PER_PIXEL} for each pixel of the "
        f"budget: make it smaller, or raise {MAX_PIXELS_VARIABLE} (pixels)"
    )


def is_base64(text: str) -> bool:
    """Whether a text is an image in base64 rather than the path of a file."""
    if len(text) > LONGEST_PATH:
        return True
    return text.startswith(BASE64_STARTS) and not os.path.exists(text)


def short(text: str, longest: int = 160) -> str:
    """A text for a message."""
    return text if len(text) <= longest else f"{text[:longest]}…"


def _opened(content: bytes, name: str) -> Image.Image:
    """An image whose header is read, set to be decoded within the budget."""
    if not content:
        raise ValueError("it has no bytes")
    Image.init()
    formats = [name for name in Image.ID if name in READ_FORMATS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the budget is checked here, before anything is decoded
        image = Image.open(io.BytesIO(content), formats=formats)
    budget, (width, height) = pixel_budget(), image.size
    if width * height <= budget:
        return image
    limits = f"{short(name)} has {width} × {height} pixels, the budget is {budget}"
    if image.format not in ("JPEG", "MPO"):
        raise _too_large(f"{limits} and only JPEG can be decoded at a smaller size", width * height)
    if "progressive" in image.info and width * height > _PROGRESSIVE * budget:
        raise _too_large(f"{limits} and it is progressive", -(-width * height // _PROGRESSIVE))
    for reduction in _REDUCTIONS:
        if -(-width // reduction) * -(-height // reduction) <= budget:
            image.draft(None, (max(1, width // reduction), max(1, height // reduction)))
            return image
    raise _too_large(limits, -(-width // _REDUCTIONS[-1]) * -(-height // _REDUCTIONS[-1]))


def _too_large(problem: str, pixels: int) -> TooLargeError:
    return TooLargeError(f"{problem}: make it smaller, or set {MAX_PIXELS_VARIABLE}={pixels}")


def _in_memory(image: Image.Image) -> bool:
    """Whether the pixels of an image are decoded already."""
    return vars(image).get("_im", vars(image).get("im")) is not None


def _file_of(image: Any) -> bytes:
    """The file of an image that is not loaded; the image stays what it is."""
    place = image.fp.tell()
    try:
        image.fp.seek(0)
        return image.fp.read()
    finally:
        image.fp.seek(place)
