"""Images are opened in one place: formats of a list, plain files, within a budget of pixels."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from pico_hf.data import image_files
from pico_hf.data.image_files import READ_FORMATS, file_bytes, pixel_budget
from pico_hf.data.images import as_rgb, image_problem
from pico_hf.search.sources import images_of


def gradient(width: int, height: int) -> Image.Image:
    rows = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
    return Image.fromarray(np.stack([rows, rows[:, ::-1], rows], axis=2))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def small_budget(monkeypatch):
    monkeypatch.setenv("PICO_HF_MAX_PIXELS", "10000")


def test_a_jpeg_above_the_budget_is_read_at_the_largest_size_within_it(small_budget):
    image = gradient(300, 200)  # 60,000 pixels: a half has 15,000, a quarter 3,750
    got = as_rgb(encoded(image, "JPEG", quality=95))
    assert got.size == (75, 50)
    expected = np.asarray(image.resize((75, 50), Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(got) - expected).max() < 12


def test_an_image_at_the_budget_is_decoded_as_it_always_was(small_budget):
    data = encoded(gradient(100, 100), "JPEG")
    assert as_rgb(data).tobytes() == Image.open(io.BytesIO(data)).tobytes()
    assert as_rgb(encoded(gradient(101, 100), "JPEG")).size == (51, 50)


def test_a_jpeg_above_the_budget_stays_upright(small_budget):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert as_rgb(encoded(gradient(300, 200), "JPEG", exif=exif)).size == (50, 75)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000"])
def test_other_formats_above_the_budget_name_file_size_and_remedy(kind, small_budget, tmp_path):
    path = tmp_path / "large.bin"
    path.write_bytes(encoded(gradient(300, 200), kind))
    with pytest.raises(ValueError, match="`image` cannot be read") as error:
        as_rgb(path)
    for part in (str(path), "300 × 200", "10000", "PICO_HF_MAX_PIXELS=60000"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_remedy_of_the_message_works(small_budget, monkeypatch):
    data = encoded(gradient(300, 200), "PNG")
    remedy = image_problem(data).split("PICO_HF_MAX_PIXELS=")[1]
    monkeypatch.setenv("PICO_HF_MAX_PIXELS", remedy)
    assert as_rgb(data).size == (300, 200)


def test_a_progressive_jpeg_is_refused_where_its_coefficients_exceed_the_budget(small_budget):
    assert as_rgb(encoded(gradient(140, 140), "JPEG", progressive=True)).size == (70, 70)
    problem = image_problem(encoded(gradient(300, 200), "JPEG", progressive=True))
    assert "progressive" in problem
    assert "PICO_HF_MAX_PIXELS=30000" in problem


def test_a_jpeg_beyond_an_eighth_is_refused(small_budget):
    problem = image_problem(encoded(gradient(1200, 900), "JPEG"))
    assert "1200 × 900" in problem
    assert f"PICO_HF_MAX_PIXELS={150 * 113}" in problem


@pytest.mark.parametrize("value", ["0", "-1", "many", "1e6", "9" * 30, "²"])
def test_a_budget_that_is_no_number_is_named(value, monkeypatch):
    monkeypatch.setenv("PICO_HF_MAX_PIXELS", value)
    with pytest.raises(ValueError, match="PICO_HF_MAX_PIXELS must be an integer >= 1, got"):
        as_rgb(encoded(gradient(4, 4), "PNG"))


def test_a_lower_limit_of_pillow_is_the_budget(monkeypatch):
    assert pixel_budget() == image_files.MAX_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert pixel_budget() == 1000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert pixel_budget() == image_files.MAX_PIXELS


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_that_is_open_but_not_loaded_is_held_to_the_budget(kind, small_budget, tmp_path):
    gradient(300, 200).save(tmp_path / "open.bin", kind)
    with Image.open(tmp_path / "open.bin") as image:
        if kind == "JPEG":
            assert as_rgb(image).size == (75, 50)
        else:
            assert "300 × 200" in image_problem(image)
        assert image.size == (300, 200)  # the user's own is as it was
        image.load()
        assert as_rgb(image).tobytes() == image.tobytes()


def test_no_format_is_read_that_starts_a_program_or_a_registered_handler(tmp_path, monkeypatch):
    assert {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "PSD"}.isdisjoint(READ_FORMATS)
    monkeypatch.setattr(subprocess, "Popen", None)
    Image.init()
    for name in ("a.eps", "b.wmf", "c.psd", "d.png"):
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        assert "format is unknown" in image_problem(tmp_path / name)
    assert [image.path for image in images_of(tmp_path)] == [str(tmp_path / "d.png")]


def test_text_named_jpg_and_a_cut_file_are_one_line_each(tmp_path):
    (tmp_path / "text.jpg").write_text("no image\n" * 100)
    assert "format is unknown" in image_problem(tmp_path / "text.jpg")
    data = encoded(gradient(300, 200), "JPEG")
    assert "truncated" in image_problem(data[: len(data) // 2])


def test_a_file_larger_than_any_image_within_the_budget_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 100)
    (tmp_path / "large.jpg").write_bytes(b"x" * 801)
    (tmp_path / "sparse.jpg").touch()
    os.truncate(tmp_path / "sparse.jpg", 2**40)
    for name in ("large.jpg", "sparse.jpg"):
        with pytest.raises(ValueError, match=rf"{name}' is larger than 800 bytes.*PICO_HF_MAX"):
            file_bytes(tmp_path / name)
    (tmp_path / "large.jpg").write_bytes(b"x" * 800)
    assert len(file_bytes(tmp_path / "large.jpg")) == 800


def test_sixty_megapixels_are_read_in_bounded_memory(tmp_path):
    Image.new("RGB", (10000, 6000), "red").save(tmp_path / "large.jpg")
    code = (
        "import resource, sys; from pico_hf.data.images import as_rgb; from PIL import Image\n"
        "as_rgb(Image.new('RGB', (9, 9))); peak = lambda: resource.getrusage(0).ru_maxrss\n"
        "before = peak(); size = as_rgb(sys.argv[1]).size; print(*size, peak() - before)"
    )
    done = [sys.executable, "-c", code, str(tmp_path / "large.jpg")]
    width, height, grown = map(int, subprocess.check_output(done).split())
    assert (width, height) == (5000, 3000)
    assert grown < 150_000  # KB; the whole would be 180 MB


def test_an_address_is_fetched_up_to_the_size_of_a_file(monkeypatch):
    from pico_hf import pipelines

    data = encoded(gradient(9, 9), "PNG")

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = type(pipelines.get_session())  # the Hub's own is offline in tests
    monkeypatch.setattr(pipelines, "get_session", lambda: client(trust_env=False))
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        assert pipelines.fetched_image(address, 5) == data
        monkeypatch.setattr(pipelines, "largest_file", lambda: 10)
        with pytest.raises(ValueError, match="an address that sends more than 10 bytes"):
            pipelines.fetched_image(address, 5)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match="a text that is no base64"):
        pipelines.fetched_image("data:image/png;base64,abc", None)
