"""Pixels of any mode, depth and number of channels → RGB that shows the same."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageColor

RGB = tuple[int, int, int]

# Values of 32-bit images are read as the smallest of these depths that holds them.
_DEPTHS = (1, 8, 10, 12, 14, 16)
_STRIP = 2**20  # values that are scaled at a time, in 8 bytes each


def colour_of(background: str | tuple[int, int, int]) -> RGB:
    """Red, green and blue of a plain colour.

    Args:
        background: A name or code that `PIL.ImageColor` knows, or three integers of 0 to 255.

    Raises:
        ValueError: If it is neither.
    """
    try:
        values = ImageColor.getrgb(background) if isinstance(background, str) else background
        red, green, blue = values
    except (TypeError, ValueError):
        values = ()
    if not values or not all(type(value) is int and 0 <= value <= 255 for value in values):
        raise ValueError(
            "`background` must be a plain colour, such as 'white', '#ffffff' or (255, 255, 255), "
            f"got {background!r}. Pass a colour without transparency."
        )
    return red, green, blue


def image_to_rgb(image: Image.Image, background: RGB) -> Image.Image:
    """A loaded PIL image of any mode in RGB.

    Args:
        image: Any mode. 16-bit modes are scaled by 65535, modes without a range of their own (I, F)
            by the range of their data.
        background: What shows where the image is transparent.

    Raises:
        ValueError: If a float image has values that are not finite.
    """
    if image.mode == "I" and image.format == "PNG":  # older versions of PIL read 16 bits as 32
        return array_to_rgb(np.asarray(image).astype(np.uint16), background)
    if image.mode.startswith("I;16") and isinstance(image.info.get("transparency"), int):
        values = np.asarray(image)
        opaque = values != image.info["transparency"]
        return _on(background, Image.fromarray(_bytes(values)), Image.fromarray(opaque))
    if image.mode.startswith(("I", "F")):
        return array_to_rgb(np.asarray(image), background)
    if image.mode == "La":  # PIL turns it into nothing but LA
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image = image.copy()  # PIL cuts a 16-bit PNG to 8 bits, but not its transparent colour
        image.info["transparency"] = tuple(value >> 8 for value in key)
    image = image.convert("RGBA")
    return _on(background, image, image.getchannel("A"))


def array_to_rgb(array: np.ndarray, background: RGB) -> Image.Image:
    """An array of pixels in RGB.

    Args:
        array: (height, width), (height, width, channels) or (channels, height, width), of 1 (grey),
            2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha) channels. bool, uint8 and uint16 are scaled
            by their range; floats by 1 if they are within 0…1, else from their lowest to their
            highest value; other integers by the smallest of 1, 8, 10, 12, 14 or 16 bits that holds
            them, else from their lowest to their highest value.
        background: What shows where alpha is below its maximum.

    Raises:
        ValueError: If it has another shape or type, if its channels may be first or last, or if it
            has values that are not finite.
    """
    if array.dtype.kind not in "buif":
        raise ValueError(f"an array of {array.dtype} is no image: pass integers or floats")
    pixels = _channels_last(array)
    channels = pixels.shape[2]
    colours = channels if channels % 2 else channels - 1
    shown = _bytes(pixels[:, :, :colours])
    image = Image.fromarray(shown if colours == 3 else shown[:, :, 0]).convert("RGB")
    if colours == channels:
        return image
    return _on(background, image, Image.fromarray(_bytes(pixels[:, :, -1])))


def _on(background: RGB, image: Image.Image, alpha: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image.convert("RGB"), mask=alpha)
    return canvas


def _channels_last(array: np.ndarray) -> np.ndarray:
    """(height, width, channels) of an array that says which axis holds the channels."""
    if 0 in array.shape:
        raise ValueError(f"it has no pixels: its shape is {array.shape}")
    if array.ndim == 2:
        return array[:, :, None]
    last = array.ndim == 3 and array.shape[2] <= 4
    first = array.ndim == 3 and array.shape[0] <= 4
    if last and first:
        raise ValueError(
            f"an array of shape {array.shape} may have its channels first or last: pass a PIL image"
        )
    if not last and not first:
        raise ValueError(
            f"an array of shape {array.shape} is no image: pass (height, width), (height, width, "
            "channels) or (channels, height, width) with 1 to 4 channels"
        )
    return array if last else array.transpose(1, 2, 0)


def _bytes(values: np.ndarray) -> np.ndarray:
    """The values as uint8, from black to white over their range."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    low, high = _range(values)
    if low == high:  # a constant that no range says anything about: neither black nor white
        return np.full(values.shape, 128, np.uint8)
    shown = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), rows := max(1, _STRIP * len(values) // values.size)):
        strip = values[start : start + rows].astype(np.float64)
        # Halves keep the difference of the largest floats finite.
        scaled = (strip / 2 - low / 2) / (high / 2 - low / 2)
        shown[start : start + rows] = np.rint(scaled * 255)
    return shown


def _range(values: np.ndarray) -> tuple[float, float]:
    """What is black and what is white."""
    kind, low, high = values.dtype.kind, values.min(), values.max()
    if kind == "f" and not np.isfinite([low, high]).all():
        raise ValueError("it has values that are NaN or infinite: replace them by numbers")
    if kind == "b" or (kind == "f" and low >= 0 and high <= 1):
        return 0.0, 1.0
    if kind == "u" and values.dtype.itemsize == 2:
        return 0.0, 65535.0
    if kind in "ui" and low >= 0 and high < 2 ** _DEPTHS[-1]:
        return 0.0, float(next(2**bits - 1 for bits in _DEPTHS if high < 2**bits))
    return float(low), float(high)
