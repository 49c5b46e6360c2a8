"""Images in whatever form users have them → RGB, or what is wrong with them.

Training, evaluation and the check of a data set all read an image by [`as_rgb`], from the stored
bytes to the last conversion: an image that passes the check is one that trains.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from pico_hf.data.image_files import TooLargeError, file_bytes, loaded, short
from pico_hf.data.image_modes import array_to_rgb, colour_of, image_to_rgb

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


class _WrongKindError(ValueError):
    """A value of a kind that is never an image; its message is a sentence of its own."""


def as_rgb(image: Any, background: str | tuple[int, int, int] = "white") -> Image.Image:
    """A PIL image in RGB that shows what the image shows, upright as its EXIF entry says.

    Args:
        image: A PIL image, a path, the bytes of a file, or both as `{"bytes": …, "path": …}`, the
            form of a `datasets.Image(decode=False)` column; or an array or a tensor of pixels,
            whose shapes and ranges [`pico_hf.data.image_modes.array_to_rgb`] lists. Of a file with
            several frames the first is read. EXIF entries that cannot be read are left out.
        background: A plain colour, which shows where the image is transparent.

    Raises:
        ValueError: If it is none of them, a URL, a file of a format beyond
            `image_files.READ_FORMATS`, or an image that cannot be read (damaged, above the budget
            of `image_files.MAX_PIXELS` and no JPEG, without pixels, not finite).
    """
    colour = colour_of(background)
    with _named():
        return _converted(image, colour)


def image_problem(image: Any) -> str | None:
    """What is wrong with an image, None if [`as_rgb`] reads it."""
    if image is None:
        return "no image"
    try:
        _converted(image, (255, 255, 255))
    except _WrongKindError as error:
        return str(error)
    except Exception as error:  # whatever it is, training would meet it too
        return reason(error)
    return None


def open_image(image: Any) -> Image.Image:
    """A loaded PIL image in its own mode, upright as its EXIF entry says.

    Args:
        image: What [`as_rgb`] takes, arrays excepted.

    Raises:
        ValueError: See [`as_rgb`].
    """
    with _named():
        return _opened(image)


def is_url(value: Any) -> bool:
    """Whether a value is the address of something elsewhere (http, s3, hf, …)."""
    return isinstance(value, str) and "://" in value


@contextmanager
def _named() -> Iterator[None]:
    """Turns any error of reading into one that names the argument."""
    try:
        yield
    except _WrongKindError:
        raise
    except Exception as error:  # PIL's readers raise whatever a damaged file makes them raise
        raise ValueError(
            f"`image` cannot be read ({reason(error)}). Repair it or leave it out."
        ) from error


def _converted(image: Any, background: tuple[int, int, int]) -> Image.Image:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if isinstance(image, np.ndarray):
        return array_to_rgb(image, background)
    return image_to_rgb(_opened(image), background)


def _opened(value: Any) -> Image.Image:
    """The PIL image of a value, loaded and upright."""
    source, name = _source(value)
    return _upright(loaded(source, name))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned once; the copy no longer says that it has to be turned.

    `ImageOps.exif_transpose` writes the other EXIF entries anew, and fails at one of a wrong type.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever the reader of a damaged entry raises
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in _ORIENTATION_SOURCES:
        turned.info.pop(name, None)
    return turned


def _source(value: Any) -> tuple[Image.Image | bytes, str]:
    """A PIL image, or the bytes of a file; its name in messages."""
    kind, name = type(value).__name__, "the image"
    if isinstance(value, dict):
        kind = f"a dict with {', '.join(map(repr, value)) or 'no entries'}"
        name = str(value.get("path") or name)
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if is_url(value):
        raise _WrongKindError(
            f"`image` must be a PIL image, a path or bytes, got the URL {short(repr(value))}. "
            "Nothing is fetched here: download it first, for example with `transformers."
            "image_utils.load_image`."
        )
    if isinstance(value, io.BytesIO):
        return value.getvalue(), name
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), name
    if isinstance(value, str | Path):
        return file_bytes(value), str(value)
    if not isinstance(value, Image.Image):
        raise _WrongKindError(
            "`image` must be a PIL image, a path or bytes, or a dict with one of them as 'path' or "
            f"'bytes', or an array of pixels, got {kind}."
        )
    return value, str(getattr(value, "filename", "") or name)


def reason(error: Exception) -> str:
    """What went wrong, in one short line."""
    if isinstance(error, UnidentifiedImageError):  # its message shows an address in memory
        return "its format is unknown or its header is damaged; EPS files are not read"
    if isinstance(error, TooLargeError):
        return str(error)
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels, `PIL.Image.MAX_IMAGE_PIXELS`"
    if isinstance(error, FileNotFoundError):
        return f"there is no file {short(str(error.filename))}"
    message = " ".join(str(error).split())
    known = isinstance(error, ValueError | OSError | SyntaxError) and message
    return short(message if known else f"{type(error).__name__}: {message}".rstrip(": "))
