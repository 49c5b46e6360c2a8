"""Any image → RGB that shows the same; what cannot be read is named, before training."""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pico_hf.data.collator import PicoCollator
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.images import as_rgb, image_problem
from pico_hf.data.loading import load_image_text
from tiny import tiny_processor

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3
HALF_RED = (255, 127, 127)  # red over white, at 128 of 255


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(colours: list[tuple[int, ...]], mode: str = "RGB") -> Image.Image:
    """One row of pixels, one for each colour of its palette."""
    image = Image.new("P", (len(colours), 1))
    image.putpalette([value for colour in colours for value in colour], mode)
    image.putdata(range(len(colours)))
    return image


def pixels(image) -> list[tuple[int, int, int]]:
    return [tuple(value) for value in np.asarray(as_rgb(image)).reshape(-1, 3).tolist()]


def close(got, expected, within: int = 1) -> bool:
    return np.abs(np.array(got, int) - np.array(expected, int)).max() <= within


def one(mode: str, value) -> Image.Image:
    return Image.new(mode, (1, 1), value)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (one("1", 1), WHITE),
        (one("L", 77), (77,) * 3),
        (one("LA", (0, 0)), WHITE),
        (one("LA", (0, 128)), (127,) * 3),
        (one("LA", (0, 128)).convert("La"), (127,) * 3),
        (one("RGB", RED), RED),
        (one("RGBA", (*BLUE, 0)), WHITE),
        (one("RGBA", (*RED, 128)), HALF_RED),
        (one("RGBA", (*RED, 128)).convert("RGBa"), HALF_RED),
        (one("RGBX", (*RED, 0)), RED),
        (one("CMYK", (0, 255, 255, 0)), RED),
        (one("YCbCr", (76, 85, 255)), RED),
        (one("HSV", (85, 255, 255)), GREEN),
        (one("I;16", 65535 // 2), (127,) * 3),
        (one("I;16B", 65535 // 2), (127,) * 3),
        (one("I;16L", 65535 // 2), (127,) * 3),
        (one("I;16N", 65535 // 2), (127,) * 3),
        (one("I", 40000), (156,) * 3),
        (one("I", 100), (100,) * 3),
        (one("I", -5), (128,) * 3),
        (one("F", 0.5), (128,) * 3),
        (one("F", 1.0), WHITE),
        (one("F", 7.0), (128,) * 3),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_a_pixel_of_any_mode_keeps_its_colour(image, expected):
    assert close(pixels(image), [expected])


def test_lab_keeps_lightness_and_hue():
    [(red, green, blue)] = pixels(one("LAB", (136, 208, 195)))  # red of sRGB: L 53, a 80, b 67
    assert red > 240
    assert max(green, blue) < 30


def test_palettes_keep_transparency_as_an_index_as_bytes_and_as_a_fourth_channel():
    image = palette([RED, GREEN, BLUE])
    assert pixels(image) == [RED, GREEN, BLUE]
    assert pixels(encoded(image, transparency=1)) == [RED, WHITE, BLUE]
    assert close(pixels(encoded(image, transparency=b"\x80\xff\x00")), [HALF_RED, GREEN, WHITE])
    assert close(
        pixels(palette([(*RED, 128), (*GREEN, 255), (*BLUE, 0)], "RGBA")), [HALF_RED, GREEN, WHITE]
    )
    with_alpha = Image.new("PA", (1, 1), (1, 128))
    with_alpha.putpalette([0, 0, 0, *RED])
    assert close(pixels(with_alpha), [HALF_RED])


@pytest.mark.parametrize(
    ("mode", "key", "other", "shown"),
    [
        ("1", 0, 1, WHITE),
        ("L", 10, 20, (20,) * 3),
        ("RGB", (10, 20, 30), RED, RED),
        ("I;16", 300, 65535, WHITE),
        ("I;16", 65535, 300, (1,) * 3),
    ],
)
def test_a_transparent_colour_shows_the_background(mode, key, other, shown):
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), other)
    got = np.asarray(as_rgb(encoded(image, transparency=key), "#00ff00"))[0].tolist()
    assert got == [list(GREEN), list(shown)]


def test_a_jpeg_in_cmyk_keeps_its_colours():
    assert close(pixels(encoded(one("CMYK", (0, 255, 255, 0)), "JPEG", quality=100)), [RED], 3)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(0, 255, 64).astype(np.uint8), "PNG"),
        (np.linspace(0, 65535, 64).astype(np.uint16), "PNG"),
        (np.linspace(0, 65535, 64).astype(np.uint16), "TIFF"),
        (np.linspace(0, 65535, 64).astype(np.int32), "TIFF"),
        (np.linspace(0, 4095, 64).astype(np.int32), "TIFF"),
        (np.linspace(-9e5, 2e9, 64).astype(np.int32), "TIFF"),
        (np.linspace(0, 1, 64, dtype=np.float32), "TIFF"),
        (np.linspace(-3, 9000, 64, dtype=np.float32), "TIFF"),
        (np.linspace(-3e38, 3e38, 64).astype(np.float32), "TIFF"),
    ],
    ids=lambda value: getattr(value, "dtype", value),
)
def test_a_grey_ramp_stays_a_grey_ramp_in_data_set_and_collator(values, kind):
    data = encoded(Image.fromarray(np.tile(values, (8, 1))), kind)
    image = ImageTextDataset(raw_rows([data])).images()[0]["image"]
    ramp = np.tile(np.linspace(0, 255, 64)[None, :, None], (8, 1, 3))
    assert close(np.asarray(as_rgb(image)), ramp, within=1)


def test_an_opaque_image_is_that_image_without_its_alpha():
    image = Image.effect_noise((9, 7), 60)
    for mode in ("RGBA", "LA", "PA", "RGBa"):
        source = image.convert("RGBA" if mode == "RGBa" else mode).convert(mode)
        assert pixels(source) == pixels(image)


def test_the_background_is_a_plain_colour_of_function_and_collator():
    clear = one("RGBA", (*RED, 0))
    assert as_rgb(clear, "black").getpixel((0, 0)) == BLACK
    assert as_rgb(clear, BLUE).getpixel((0, 0)) == BLUE
    for wrong in ("no colour", (1, 2), (0, 0, 256), "#11223344", 3, (0.5, 0, 0)):
        with pytest.raises(ValueError, match="`background` must be a plain colour"):
            as_rgb(clear, wrong)
    with pytest.raises(ValueError, match="`background` must be a plain colour"):
        PicoCollator(tiny_processor(), background="no colour")
    collators = [PicoCollator(tiny_processor(), background=name) for name in ("white", "blue")]
    for collate, colour in zip(collators, ("white", "blue"), strict=True):
        got = collate([{"image": clear}])["pixel_values"]
        torch.testing.assert_close(got, collate([{"image": one("RGB", colour)}])["pixel_values"])
    assert collators[0].fingerprint != collators[1].fingerprint


GREY = np.arange(35).reshape(5, 7)


@pytest.mark.parametrize("tensor", [False, True], ids=["array", "tensor"])
@pytest.mark.parametrize(
    ("array", "pixel"),
    [
        (GREY.astype(np.uint8), (34,) * 3),
        (GREY.astype(np.uint8)[:, :, None], (34,) * 3),
        ((GREY * 1000).astype(np.uint16), (132,) * 3),
        (GREY > 3, WHITE),
        (GREY / 68, (128,) * 3),
        (GREY * 10.0, WHITE),
        (np.tile(np.uint8(RED), (5, 7, 1)), RED),
        (np.tile(np.uint8(RED), (5, 7, 1)).transpose(2, 0, 1), RED),
        (np.tile(np.float32((1, 0.5, 0)), (5, 7, 1)), (255, 128, 0)),
        (np.tile(np.uint8((*RED, 128)), (5, 7, 1)), HALF_RED),
        (np.tile(np.uint8((0, 0)), (5, 7, 1)), WHITE),
    ],
    ids=lambda value: f"{value.shape}-{value.dtype}" if hasattr(value, "shape") else "",
)
def test_arrays_and_tensors_of_pixels_are_images(array, pixel, tensor):
    image = as_rgb(torch.from_numpy(array.copy()) if tensor else array)
    assert image.size == (7, 5)
    assert close(image.getpixel((6, 4)), pixel)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 9, 3), np.uint8), r"shape \(3, 9, 3\) may have its channels first or last"),
        (np.zeros((9, 9, 5), np.uint8), r"shape \(9, 9, 5\) is no image"),
        (np.zeros((1, 9, 9, 3), np.uint8), r"shape \(1, 9, 9, 3\) is no image"),
        (np.zeros(9, np.uint8), r"shape \(9,\) is no image"),
        (np.zeros((0, 9), np.uint8), "it has no pixels"),
        (np.zeros((9, 9), complex), "an array of complex128 is no image"),
        (np.full((9, 9), np.nan), "NaN or infinite"),
        (np.array([[0, np.inf]]), "NaN or infinite"),
    ],
)
def test_arrays_that_are_no_images_are_refused_by_name(array, message):
    with pytest.raises(ValueError, match=f"`image` cannot be read .*{message}"):
        as_rgb(array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_orientation_is_applied_once(orientation, kind):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {  # what a camera stores for the upright image
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    once = as_rgb(data)
    assert np.asarray(once)[:, :, 0].tolist() == upright.tolist()
    assert as_rgb(once).tobytes() == once.tobytes()
    rows = raw_rows([data])
    for image in (ImageTextDataset(rows).images()[0]["image"], rows[0]["image"]):
        assert as_rgb(image).tobytes() == once.tobytes()


def exif_with_a_float_width(orientation: bytes) -> bytes:
    entries = struct.pack("<HHIf", 0x0100, 11, 1, 1.5) + orientation
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (exif_with_a_float_width(struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)), (8, 16)),
        (exif_with_a_float_width(struct.pack("<HHI4s", 0x0112, 2, 3, b"six")), (16, 8)),
        (exif_with_a_float_width(b"\0")[:20], (16, 8)),
        (b"Exif\0\0no exif at all", (16, 8)),
    ],
    ids=["width of a wrong type", "orientation of a wrong type", "cut", "text"],
)
def test_a_broken_exif_field_is_left_out_by_check_and_training_alike(exif, size):
    data = encoded(Image.new("RGB", (16, 8), "red"), "JPEG", exif=exif)
    images = ImageTextDataset(raw_rows([data])).images()
    assert as_rgb(data).size == images[0]["image"].size == size
    PicoCollator(tiny_processor())([images[0]])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_of_several_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixels(data)[0] == RED


def raw_rows(images: list) -> datasets.Dataset:
    captions = [f"caption {row}" for row in range(len(images))]
    rows = datasets.Dataset.from_dict({"image": images, "caption": captions})
    return rows.cast_column("image", datasets.Image())


def noisy_png() -> bytes:
    return encoded(Image.effect_noise((64, 64), 50))


def nan_tiff() -> bytes:
    return encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")


def huge_png(side: int) -> bytes:
    """A small file whose header promises side × side pixels."""
    data = bytearray(noisy_png())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
UNREADABLE = {
    "truncated": (noisy_png()[:-500], "truncated|broken|incomplete"),
    "cut in its header": (noisy_png()[:20], r"cannot|Truncated|format|PNG|struct"),
    "a bomb": (huge_png(60_000), "MAX_IMAGE_PIXELS"),
    "above the budget": (huge_png(10_000), "10000 × 10000 pixels, the budget is 33554432"),
    "text": (b"no image", "its format is unknown"),
    "SVG": (SVG, "its format is unknown"),
    "PostScript": (EPS, "EPS"),
    "empty": (b"", "no bytes"),
    "NaN": (nan_tiff(), "NaN or infinite"),
    "null": (None, "there is none"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_bytes_name_their_row_and_can_be_skipped(name, tmp_path, caplog):
    data, message = UNREADABLE[name]
    raw_rows([noisy_png(), data, noisy_png()]).to_parquet(tmp_path / "rows.parquet")
    expect_bad_row_1(tmp_path / "rows.parquet", message, caplog)


def expect_bad_row_1(file, message: str, caplog) -> None:
    with pytest.raises(ValueError, match=rf"Row 1 has an image .*({message})") as error:
        load_image_text(files=file)
    assert len(str(error.value)) < 600
    with caplog.at_level(logging.WARNING):
        rows = load_image_text(files=file, skip_bad_images=True)
    captions = [caption for captions in rows["captions"] for caption in captions]
    assert captions == ["caption 0", "caption 2"]
    assert "rows [1]" in caplog.text
    images = ImageTextDataset(rows).images()
    PicoCollator(tiny_processor())([images[row] for row in range(len(images))])


@pytest.mark.parametrize("name", ["missing", "folder", "pipe", "device", "svg.jpg", "base64"])
def test_unreadable_paths_name_their_row_and_can_be_skipped(name, tmp_path, caplog):
    (tmp_path / "good.png").write_bytes(noisy_png())
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "svg.jpg").write_bytes(SVG)
    path, message = {
        "device": ("/dev/zero", "no plain file"),
        "base64": ("data:image/png;base64," + "iVBO" * 20_000, "decode base64"),
        "missing": (str(tmp_path / "missing"), "there is no file"),
        "svg.jpg": (str(tmp_path / "svg.jpg"), "its format is unknown"),
    }.get(name, (str(tmp_path / name), "no plain file"))
    good = str(tmp_path / "good.png")
    rows = datasets.Dataset.from_dict(
        {"image": [good, path, good], "caption": [f"caption {row}" for row in range(3)]}
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    expect_bad_row_1(tmp_path / "rows.parquet", message, caplog)


def test_postscript_is_refused_before_a_program_starts():
    with pytest.raises(ValueError, match="files in EPS are not read"):
        as_rgb(Image.open(io.BytesIO(EPS)))


@pytest.mark.parametrize("error", [MemoryError(), struct.error("bad"), OverflowError("x" * 10**5)])
def test_whatever_a_reader_raises_becomes_a_short_message(error, monkeypatch):
    data = noisy_png()

    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=f"`image` cannot be read .{type(error).__name__}") as info:
        as_rgb(data)
    assert len(str(info.value)) < 300
    assert image_problem(data).startswith(type(error).__name__)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"]
KINDS = ["PNG", "TIFF", "GIF", "JPEG", "BMP", "WEBP"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_passes_the_check_can_be_converted_for_training(data):
    mode, kind = data.draw(st.sampled_from(MODES)), data.draw(st.sampled_from(KINDS))
    size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    width = {"I": 4, "F": 4, "I;16": 2}.get(mode, len(Image.new(mode, (1, 1)).getbands()))
    length = (size[0] + 7) // 8 * size[1] if mode == "1" else size[0] * size[1] * width
    image = Image.frombytes(mode, size, data.draw(st.binary(min_size=length, max_size=length)))
    values = [image]
    try:
        file = encoded(image, kind)
    except (OSError, ValueError, KeyError):  # not every format holds every mode
        pass
    else:
        values += [file, file[: data.draw(st.integers(0, len(file)))]]
    for value in values:
        if image_problem(value) is None:
            rgb = as_rgb(value)
            assert (rgb.mode, rgb.size) == ("RGB", size)
            PicoCollator(tiny_processor())([{"image": value}])
        else:
            with pytest.raises(ValueError, match="`image` cannot be read"):
                as_rgb(value)
