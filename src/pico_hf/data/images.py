"""Images in whatever form users have them → RGB that shows the same, or what is wrong with them."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

BACKGROUND = "white"
# EPS files are programs, which Pillow hands to another program.
REFUSED_FORMATS = ("EPS",)
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
_LONGEST_REASON = 200  # characters of a message


def as_rgb(image: Any, background: str = BACKGROUND) -> Image.Image:
    """Turns an image upright, as its EXIF entry says, and converts it to RGB.

    What it shows is kept. Depth: 16 bits are scaled by their range; 32 bits and floats, which have
    no range of their own, by the smallest usual range that holds their values (1 for floats, 255,
    65535), else from their least to their largest value. Transparency: shown on a background. Of
    several frames the first is taken. An EXIF entry that cannot be read is left out.

    Args:
        image: A PIL image, an array or tensor (height, width) or (height, width, 1 to 4 channels),
            a path, the bytes of a file, or both as `{"bytes": …, "path": …}`, the form of a
            `datasets.Image(decode=False)` column.
        background: Colour behind transparent pixels, as `PIL.ImageColor` names it.

    Raises:
        ValueError: If it is none of them, a URL, or no image that can be read.
    """
    try:
        colour = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise ValueError(f"`background` must name a colour, got {background!r}.") from error
    source = _source(image)
    try:
        opened = source if isinstance(source, Image.Image) else _opened(source)
        return _on_background(_eight_bits(_upright(opened)), colour)
    # Plugins of Pillow raise whatever a damaged file makes them stumble over.
    except Exception as error:
        raise ValueError(
            f"`image` cannot be read ({one_line(error)}). Repair it or leave it out."
        ) from error


def image_problem(value: Any) -> str | None:
    """What is wrong with an image, None if `as_rgb` converts it.

    Args:
        value: See `as_rgb`.
    """
    if value is None:
        return "no image"
    try:
        as_rgb(value)
    except ValueError as error:
        return one_line(error.__cause__ or error)
    return None


def check_regular_file(path: str | os.PathLike) -> None:
    """Raises ValueError unless there is an ordinary file: a pipe or device would never end.

    Args:
        path: Of an image.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no file {str(path)[:_LONGEST_REASON]!r}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise ValueError(f"{str(path)[:_LONGEST_REASON]!r} is {kind}")


def is_url(value: Any) -> bool:
    """Whether a value is the address of something elsewhere (http, s3, hf, …)."""
    return isinstance(value, str) and "://" in value[:32]


# ---- opening -----------------------------------------------------------------------------------


def _source(image: Any) -> Any:
    """A PIL image, a path or a file that Pillow can open."""
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
    if isinstance(image, bytes | bytearray | memoryview):
        return io.BytesIO(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, Image.Image | str | os.PathLike | io.BytesIO):
        raise ValueError(
            "`image` must be a PIL image, a path or bytes, or a dict with one of them as 'path' or "
            f"'bytes', got {kind}."
        )
    return image


def _from_array(values: np.ndarray) -> Image.Image:
    """(height, width) or (height, width, channels) → a PIL image of 8 bits per channel."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or 0 in values.shape:
        raise ValueError(
            "`image` must be an array of shape (height, width) or (height, width, 1 to 4 "
            f"channels), got {values.shape}. Move channels last: `array.transpose(1, 2, 0)`."
        )
    if values.dtype.kind not in "buif":
        raise ValueError(f"`image` must be an array of numbers, got {values.dtype}.")
    depth = {np.dtype(bool): 1, np.dtype(np.uint16): 65535}.get(values.dtype)
    scaled = values if values.dtype == np.uint8 else _to_bytes(values, depth)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    return Image.frombytes(mode, values.shape[1::-1], np.ascontiguousarray(scaled).tobytes())


def _opened(source: str | Path | io.BytesIO) -> Image.Image:
    if isinstance(source, str | os.PathLike):
        check_regular_file(source)
    try:
        picture = Image.open(source)
    except UnidentifiedImageError as error:  # whose message has the address of an object
        raise ValueError("it is cut short, or of no known format") from error
    if picture.format in REFUSED_FORMATS:
        raise ValueError(f"{picture.format} files can run programs and are not read")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise ValueError(f"{picture.width} × {picture.height} pixels are more than {limit}")
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    """The image turned as its EXIF entry says, decoded to the last byte."""
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # an entry of a wrong type; the pixels are fine
        return picture


# ---- converting --------------------------------------------------------------------------------


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The image with 8 bits per channel, in a mode that Pillow converts."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray(_to_bytes(np.asarray(picture), 65535))
    if picture.mode in ("I", "F"):
        return Image.fromarray(_to_bytes(np.asarray(picture), None))
    if picture.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
    return picture


def _to_bytes(values: np.ndarray, largest: float | None) -> np.ndarray:
    """Numbers scaled to 0 to 255: from 0 to `largest`, or by their own range."""
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    if not finite.any():
        raise ValueError("it has no finite value")
    low, high = numbers[finite].min(), numbers[finite].max()
    numbers = np.where(finite, numbers, low)  # where nothing was measured
    if largest is None:
        usual = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
        fitting = [top for top in usual if low >= 0 and high <= top]
        if fitting:
            largest = fitting[0]
        else:
            numbers, largest = numbers - low, high - low or 1.0
    return np.rint(numbers * (255.0 / largest)).clip(0, 255).astype(np.uint8)


def _on_background(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """RGB; transparent pixels show the background."""
    if picture.mode not in _TRANSPARENT and "transparency" not in picture.info:
        return picture.convert("RGB")
    if picture.mode in ("La", "RGBa"):  # colours times opacity
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, colour), layer).convert("RGB")


def one_line(error: BaseException | str) -> str:
    """What an error says, in one line of at most `_LONGEST_REASON` characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"
