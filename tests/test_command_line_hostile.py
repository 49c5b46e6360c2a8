"""A bad day of a shop at the command line: one line, an exit code, and nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from command_line import done, read, refused, run
from test_command_line import saved
from tiny import tiny_encoder, tiny_rows


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A folder with two encoders, eight photos, and an index of four of them."""
    folder = tmp_path_factory.mktemp("shop")
    saved(folder / "clip")
    saved(folder / "other", tiny_encoder(seed=1))
    for name in ("photos", "four"):
        (folder / name).mkdir()
    for number, row in enumerate(tiny_rows(8)):
        row["image"].save(folder / "photos" / f"{number}.png")
        if number < 4:
            row["image"].save(folder / "four" / f"{number}.png")
    return folder


@pytest.fixture
def index(shop, tmp_path) -> Path:
    done("index", shop / "four", tmp_path / "index", "--model", shop / "clip")
    return tmp_path / "index"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- 60 megapixels -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A folder with two images of 60 megapixels and one small one."""
    folder = tmp_path_factory.mktemp("large")
    Image.new("L", (10_000, 6_000), 90).save(folder / "large.png", compress_level=1)
    Image.new("L", (10_000, 6_000), 200).save(folder / "large.jpg")
    Image.new("RGB", (32, 32), "red").save(folder / "small.png")
    return folder


def test_of_sixty_megapixels_a_jpeg_is_indexed_and_a_png_named(shop, large, tmp_path, monkeypatch):
    words = ("index", large, tmp_path / "index", "--model", shop / "clip")
    found = read(*words)
    (skipped,) = found["skipped"]
    assert found["added"] == found["images"] == 2
    assert Path(skipped["image"]).name == "large.png"
    assert "10000 × 6000 pixels, the budget is 33554432" in skipped["reason"]
    assert skipped["reason"].endswith("set PICO_HF_MAX_PIXELS=60000000")
    shown = done(*words)
    assert "1 left out, first:" in shown
    (result,) = read("search", tmp_path / "index", large / "large.jpg")["results"]
    assert result["hits"][0]["path"] == str(large / "large.jpg")
    line = refused("search", tmp_path / "index", large / "large.png")
    assert "set PICO_HF_MAX_PIXELS=60000000" in line
    monkeypatch.setenv("PICO_HF_MAX_PIXELS", "60000000")  # as the line says
    assert read(*words)["added"] == 1
    assert read("search", tmp_path / "index", large / "large.png")["images"] == 3


def test_a_strict_run_stops_at_the_large_png_and_keeps_the_rest(shop, large, tmp_path):
    words = ("index", large, tmp_path / "index", "--model", shop / "clip")
    line = refused(*words, "--strict")
    assert "large.png" in line
    assert "PICO_HF_MAX_PIXELS" in line
    assert read("info", tmp_path / "index")["images"] == 1  # the JPEG, read before it


def test_heat_maps_of_sixty_megapixels(shop, large, tmp_path):
    words = ("a red disc", "--output", tmp_path / "why.png")
    line = refused("explain", shop / "clip", large / "large.png", *words)
    assert "set PICO_HF_MAX_PIXELS=60000000" in line
    assert not (tmp_path / "why.png").exists()
    done("explain", shop / "clip", large / "large.jpg", *words)
    assert (tmp_path / "why.png").is_file()


# ---- files that are no images ------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder with a text file, an empty one and half a PNG among two images."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "notes.jpg").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    (folder / "half.png").write_bytes((folder / "red.png").read_bytes()[:90])
    (folder / "prices.csv").write_text("a,b\n")
    return folder


def test_what_is_no_image_is_left_out_by_every_command_that_adds(shop, mixed, tmp_path):
    for command in ("index", "embed"):
        target = tmp_path / f"{command}.index"
        found = read(command, mixed, target, "--model", shop / "clip")
        names = sorted(Path(one["image"]).name for one in found["skipped"])
        assert (found["added"], names) == (2, ["empty.png", "half.png", "notes.jpg"])
        again = read(command, mixed, target)
        assert (again["unchanged"], len(again["skipped"])) == (2, 3)
    query = mixed / "notes.jpg"
    assert "notes.jpg" in refused("search", tmp_path / "index.index", query)
    assert "format is unknown" in refused("explain", shop / "clip", query, "a", "--output", "x.png")


def test_nothing_but_broken_images_is_refused_and_what_was_there_stays(shop, index, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "notes.jpg").write_text("no image")
    before = content(index)
    assert "got 1 that cannot" in refused("index", tmp_path / "broken", index)
    assert content(index) == before


@pytest.mark.parametrize("command", ["index", "embed"])
def test_a_folder_without_images_makes_no_index(shop, tmp_path, command):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "prices.csv").write_text("a,b\n")
    words = (command, tmp_path / "none", tmp_path / "index", "--model", shop / "clip")
    assert "and no image" in refused(*words)
    assert not (tmp_path / "index").exists()


# ---- queries -----------------------------------------------------------------------------------


def test_an_empty_query_is_one_line(shop, index, tmp_path):
    for empty in ("", "  ", "\t\n"):
        assert "at least one word" in refused("search", index, empty)
    (tmp_path / "blank.txt").write_text("\n  \n")
    assert "Give a query" in refused("search", index, "--queries", tmp_path / "blank.txt")
    output = ("--output", tmp_path / "why.png")
    assert "caption" in refused("explain", shop / "clip", shop / "four" / "0.png", " ", *output)


def test_a_query_of_ten_thousand_words_is_searched_and_its_table_is_short(shop, index, tmp_path):
    words = "red " * 10_000
    shown = done("search", index, words, "a disc", "--html", tmp_path / "found.html")
    assert max(map(len, shown.splitlines())) < 1000
    result = run("search", index, words, "--json")
    (line,) = [one for one in result.stderr.splitlines() if one.startswith("pico-hf: ")]
    assert "10000 words" in line
    assert len(json.loads(result.stdout)["results"][0]["hits"]) == 4


def test_a_page_never_takes_the_place_of_a_device(shop, index, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "must be a file" in refused("search", index, "a disc", "--html", tmp_path / "pipe")


# ---- another model, a full disk ----------------------------------------------------------------


@pytest.mark.parametrize("command", ["index", "embed"])
def test_an_index_of_another_model_is_refused_and_stays(shop, index, command):
    before = content(index)
    line = refused(command, shop / "photos", index, "--model", shop / "other")
    assert "made with another model" in line
    assert content(index) == before


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file may grow beyond so many bytes meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["index", "embed"])
def test_an_index_that_cannot_be_written_stays_and_goes_on(shop, index, command):
    before = content(index)
    with small_files(5_000):
        line = refused(command, shop / "photos", index)
    assert "What it held before is still there" in line
    assert content(index) == before
    assert len(read("search", index, "a red disc")["results"][0]["hits"]) == 4
    assert read(command, shop / "photos", index)["added"] == 4
    assert read("info", index, "--verify")["images"] == 8


def test_a_new_index_that_cannot_be_written_is_made_by_the_same_words_later(shop, tmp_path):
    words = ("index", shop / "photos", tmp_path / "index", "--model", shop / "clip")
    for most in (0, 100, 5_000):
        with small_files(most):
            line = refused(*words)
        assert "File too large" in line
        assert str(tmp_path / "index") in line
    assert read(*words)["images"] == 8


def test_outputs_that_cannot_be_written_leave_what_was_there(shop, index, tmp_path):
    page, figure = tmp_path / "found.html", tmp_path / "why.png"
    for file in (page, figure):
        file.write_text("before")
    explain = ("explain", shop / "clip", shop / "four" / "0.png", "a disc", "--output", figure)
    with small_files(1_000):
        assert "File too large" in refused("search", index, "a disc", "--html", page)
        assert "File too large" in refused(*explain)
        assert "File too large" in refused("export", shop / "clip", tmp_path / "plain")
    assert (page.read_text(), figure.read_text()) == ("before", "before")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"found.html", "why.png", "index"}


FULL = """
import sys
from pathlib import Path
from command_line import read, refused
shop, disk = Path(sys.argv[1]), Path(sys.argv[2])
index = disk / "index"
assert read("index", shop / "four", index, "--model", shop / "clip")["added"] == 4
with open(disk / "filler", "wb", buffering=0) as filler:
    for size in (4096, 1):
        try:
            while True:
                filler.write(bytes(size))
        except OSError:
            pass
line = refused("index", shop / "photos", index)
assert "No space left on device" in line and "is still there" in line, line
assert "No space left" in refused("search", index, "a disc", "--html", disk / "found.html")
assert {path.name for path in disk.iterdir()} == {"index", "filler"}
assert len(read("search", index, "a red disc")["results"][0]["hits"]) == 4
(disk / "filler").unlink()
assert read("index", shop / "photos", index)["added"] == 4
assert read("info", index, "--verify")["images"] == 8
print("done")
"""


def test_a_disk_that_is_full_leaves_an_index_that_is_searched_and_goes_on(shop, tmp_path):
    mount = f"mount -t tmpfs -o size=512k none {tmp_path}"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("no disk of our own can be mounted here (unshare --map-root-user --mount)")
    script = f'{mount}; exec "$@"'
    words = [*unshare, script, "sh", sys.executable, "-c", FULL, str(shop), str(tmp_path)]
    places = os.pathsep.join(place for place in sys.path if place)
    ran = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": places},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "done"
