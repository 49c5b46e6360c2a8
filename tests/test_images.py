"""Anything that shows an image becomes RGB that shows the same; the check converts it too."""

import io
import os
import struct

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pico_hf import PicoCollator
from pico_hf.data.images import as_rgb, image_problem
from pico_hf.data.loading import load_image_text
from tiny import tiny_processor

RAMP = np.linspace(0, 1, 16).reshape(4, 4)
GREY = np.rint(RAMP * 255).astype(np.uint8)


def grey() -> Image.Image:
    return Image.fromarray(GREY)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(grey().convert("RGB"), *profiles, outputMode="LAB")


DEEP = (RAMP * 65535).astype(np.uint16)
KINDS = {
    "L": grey(),
    "LA": grey().convert("LA"),
    "La": grey().convert("LA").convert("La"),
    "PA": grey().convert("LA").convert("PA"),
    "P": grey().convert("P"),
    "RGB": grey().convert("RGB"),
    "RGBA": grey().convert("RGBA"),
    "RGBa": grey().convert("RGBA").convert("RGBa"),
    "CMYK": grey().convert("RGB").convert("CMYK"),
    "YCbCr": grey().convert("YCbCr"),
    "HSV": grey().convert("RGB").convert("HSV"),
    "LAB": lab(),
    "I;16": Image.fromarray(DEEP),
    "I;16B": Image.frombytes("I;16B", (4, 4), DEEP.astype(">u2").tobytes()),
    "I of 16 bits": Image.fromarray(DEEP.astype(np.int32)),
    "I of 8 bits": Image.fromarray(GREY.astype(np.int32)),
    "I of all bits": Image.fromarray((RAMP * 4e9 - 2e9).astype(np.int32)),
    "F to 1": Image.fromarray(RAMP.astype(np.float32)),
    "F to 255": Image.fromarray((RAMP * 255).astype(np.float32)),
    "F to 65535": Image.fromarray((RAMP * 65535).astype(np.float32)),
    "F of any range": Image.fromarray((RAMP * 3e6 - 5).astype(np.float32)),
    "16-bit PNG": encoded(Image.fromarray(DEEP)),
    "float TIFF": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "array of 8 bits": GREY,
    "array of 16 bits": DEEP,
    "array of floats": RAMP,
    "array of channels": np.repeat(GREY[:, :, None], 3, axis=2),
    "array of one channel": GREY[:, :, None],
    "tensor": torch.from_numpy(GREY.copy()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_depth_and_mode_shows_the_same(kind):
    found = np.asarray(as_rgb(KINDS[kind])).astype(int)
    assert found.shape == (4, 4, 3)
    assert np.abs(found - GREY[:, :, None]).max() <= 1


def test_one_bit_is_black_and_white():
    found = np.asarray(as_rgb(Image.fromarray(RAMP > 0.5)))
    assert set(found.ravel().tolist()) == {0, 255}


@pytest.mark.parametrize("value", [-3.0, 0.0, 7e8])
def test_an_image_of_one_value_stays_one_colour(value):
    found = np.asarray(as_rgb(Image.fromarray(np.full((4, 4), value, np.float32))))
    assert len(np.unique(found)) == 1


def test_what_was_not_measured_is_as_dark_as_the_darkest():
    values = RAMP.astype(np.float32)
    values[0, 0], values[1, 1] = np.nan, np.inf
    found = np.asarray(as_rgb(Image.fromarray(values)))
    assert found[0, 0, 0] == found[1, 1, 0] == round(255 * values[0, 1])
    assert image_problem(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def palette(transparency) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return encoded(image, transparency=transparency)


KEYED = encoded(Image.new("RGB", (2, 1), (255, 0, 0)), transparency=(255, 0, 0))


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (2, 1), (255, 0, 0, 0)),
        Image.new("LA", (2, 1), (0, 0)),
        encoded(Image.new("RGBA", (2, 1), (255, 0, 0, 0))),
        palette(0),
        palette(b"\x00\xff"),
        KEYED,
    ],
    ids=["RGBA", "LA", "PNG", "palette by index", "palette by bytes", "colour key"],
)
def test_transparent_pixels_show_the_background(image):
    assert as_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(image, "#204060").getpixel((0, 0)) == (0x20, 0x40, 0x60)


def test_half_transparent_pixels_are_mixed_with_the_background():
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert abs(as_rgb(half).getpixel((0, 0))[0] - 127) <= 1


def test_the_collator_has_the_background_as_a_setting_that_its_fingerprint_covers():
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    white, black = (PicoCollator(tiny_processor(), background=b) for b in ("white", "black"))
    pixels = [c([{"image": image}])["pixel_values"] for c in (white, black)]
    assert pixels[0].min() > pixels[1].max()
    assert white.fingerprint != black.fingerprint


def test_a_background_that_is_no_colour_is_refused():
    with pytest.raises(ValueError, match="`background` must name a colour, got 'whiet'"):
        as_rgb(Image.new("RGBA", (1, 1)), "whiet")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_once(orientation):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(pixels).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.open(io.BytesIO(encoded(image, exif=exif)))
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].T,
        8: np.rot90(pixels),
    }[orientation]
    once = as_rgb(stored)
    assert np.array_equal(np.asarray(once)[:, :, 0], turned)
    assert np.array_equal(np.asarray(as_rgb(once))[:, :, 0], turned)


def broken_exif() -> bytes:
    """A JPEG whose orientation is a text instead of a number."""
    entry = struct.pack("<HHI4s", 0x0112, 2, 4, b"abc\0")
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 0)
    return encoded(grey(), "JPEG", exif=b"Exif\0\0" + tiff)


def test_an_exif_field_that_cannot_be_read_is_left_out():
    assert image_problem(broken_exif()) is None
    assert as_rgb(broken_exif()).size == (4, 4)


def test_of_several_frames_the_first_is_taken():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert as_rgb(file).getpixel((0, 0)) == (255, 0, 0)


BAD = {
    "nothing": None,
    "cut short": encoded(Image.effect_noise((64, 64), 50))[:200],
    "cut short in its header": encoded(grey())[:20],
    "a text named .jpg": b"hello",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "EPS": encoded(grey().convert("RGB"), "EPS"),
    "no bytes": b"",
    "a folder": os.path.dirname(__file__),
    "a file that is not there": "nowhere.png",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_named_in_a_short_line_and_never_converted(kind):
    problem = image_problem(BAD[kind])
    assert problem
    assert len(problem) < 250
    assert "\n" not in problem
    with pytest.raises(ValueError, match="`image`"):
        as_rgb(BAD[kind])


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    assert "no ordinary file" in image_problem(str(tmp_path / "image.png"))


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    small = encoded(Image.new("L", (30, 20)))
    for limit in (500, 200):  # where Pillow warns, and where it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert "pixels" in image_problem(small)


@pytest.mark.parametrize("kind", [kind for kind, value in BAD.items() if isinstance(value, bytes)])
def test_a_row_that_cannot_be_read_is_named_and_may_be_left_out(kind, tmp_path):
    values = [{"bytes": encoded(grey()), "path": None}] * 3
    values[1] = {"bytes": BAD[kind], "path": None}
    rows = datasets.Dataset.from_dict({"image": values, "caption": ["a", "b", "c"]})
    file = tmp_path / "rows.parquet"
    rows.cast_column("image", datasets.Image(decode=False)).to_parquet(file)
    with pytest.raises(ValueError, match="Row 1 has an image that cannot be read"):
        load_image_text(files=file)
    kept = load_image_text(files=file, skip_bad_images=True)
    assert [caption for captions in kept["captions"] for caption in captions] == ["a", "c"]


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 5), (8,), (0, 8)])
def test_an_array_that_shows_no_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"`image` must be an array of shape \(height, width\)"):
        as_rgb(np.zeros(shape, np.uint8))


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16")


@given(st.sampled_from(MODES), st.integers(1, 5), st.integers(1, 5), st.binary(min_size=100))
@settings(deadline=None, max_examples=200)
def test_what_passes_the_check_is_converted(mode, width, height, content):
    image = Image.new(mode, (width, height))
    size = len(image.tobytes())
    image = Image.frombytes(mode, (width, height), (content * (size // len(content) + 1))[:size])
    if image_problem(image) is None:
        converted = as_rgb(image)
        assert (converted.mode, converted.size) == ("RGB", (width, height))
