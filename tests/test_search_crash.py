"""An index that is killed, or whose disk is full or damaged, loses nothing that it had."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from pico_hf import PicoIndex, PicoRetriever
from pico_hf.search import files
from tiny import tiny_processor, tiny_refined

IMAGES, COMMIT = 30, 4


@pytest.fixture(scope="module")
def retriever() -> PicoRetriever:
    return PicoRetriever(tiny_refined(), tiny_processor(), batch_size=4, show_progress=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        noise = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02d}.png")
    return folder


def index_photos(folder: Path, photos: Path, retriever: PicoRetriever) -> None:
    index = PicoIndex.open(folder, retriever)
    index.add(photos, commit_images=COMMIT, show_progress=False)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an index but its lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, photos, retriever) -> tuple[dict[str, bytes], float]:
    folder = tmp_path_factory.mktemp("undisturbed") / "index"
    PicoIndex.create(folder, retriever)
    start = time.perf_counter()
    index_photos(folder, photos, retriever)
    return content(folder), time.perf_counter() - start


def alone(target: Callable[..., None], *args) -> None:
    """Runs a function in a fork, whose death leaves no lock of its parent's progress bars taken."""
    tqdm.set_lock(threading.RLock())
    target(*args)


def killed(target: Callable[..., None], *args, after: float | None = None) -> int:
    """Runs a function in a process that is killed after some seconds, or that kills itself."""
    process = multiprocessing.get_context("fork").Process(target=alone, args=(target, *args))
    process.start()
    if after is not None:
        time.sleep(after)
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    return process.exitcode


def check_after_kill(folder: Path, retriever: PicoRetriever) -> int:
    """Opens what a killed process left; whole groups of images are there, each once."""
    index = PicoIndex.open(folder, retriever)
    ids = index.ids()
    assert len(ids) == len(set(ids)) == len(index)
    assert len(index) % COMMIT == 0 or len(index) == IMAGES
    assert len(index.search("a red square", top_k=IMAGES)) == len(index)
    return len(index)


def disturb(number: int, folder: Path, photos: Path, retriever, seconds: float) -> list[int]:
    """Kills a run at one to three random moments; how many images each of them left."""
    moments = random.Random(number)
    PicoIndex.create(folder, retriever)
    left = []
    for _ in range(moments.randint(1, 3)):
        killed(index_photos, folder, photos, retriever, after=moments.uniform(0, seconds))
        left.append(check_after_kill(folder, retriever))
    assert left == sorted(left)
    index_photos(folder, photos, retriever)
    return left


@pytest.mark.parametrize("number", range(3))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    number, tmp_path, photos, retriever, undisturbed
):
    disturb(number, tmp_path / "index", photos, retriever, undisturbed[1])
    assert content(tmp_path / "index") == undisturbed[0]


@pytest.mark.slow
def test_twenty_killed_runs_go_on_as_if_nothing_had_happened(
    tmp_path, photos, retriever, undisturbed
):
    left = []
    for number in range(20):
        folder = tmp_path / f"index {number}"
        left += disturb(100 + number, folder, photos, retriever, undisturbed[1])
        assert content(folder) == undisturbed[0]
    assert len({count for count in left if 0 < count < IMAGES}) >= 3  # in the middle of the work


def kill_at(step: int, before: bool, call: Callable[..., None], *args) -> None:
    """Ends this process before or after a file of the index gets its name."""
    rename, count = Path.rename, [0]

    def counted(path: Path, target: Path) -> Path:
        count[0] += 1
        if count[0] == step and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = rename(path, target)
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.rename = counted
    call(*args)


# Before one file is after the last one.
@pytest.mark.parametrize(
    ("step", "before"), [(1, True), *((step, False) for step in (1, 2, 3, 5, 9, 23, 24))]
)
def test_a_run_that_dies_at_a_file_goes_on(step, before, tmp_path, photos, retriever, undisturbed):
    folder = tmp_path / "index"
    PicoIndex.create(folder, retriever)
    code = killed(kill_at, step, before, index_photos, folder, photos, retriever)
    assert code == -signal.SIGKILL
    stored = check_after_kill(folder, retriever)
    assert stored == min(IMAGES, COMMIT * ((step - before) // 3))  # two files, then the manifest
    index_photos(folder, photos, retriever)
    assert content(folder) == undisturbed[0]


def replace_and_compact(folder: Path, photos: Path, retriever: PicoRetriever) -> None:
    index = PicoIndex.open(folder, retriever)
    paths = sorted(photos.glob("*.png"))
    index.add(paths, payloads=[{"n": n} for n in range(IMAGES)], show_progress=False)
    index.compact()


def test_updates_and_compacting_that_die_lose_and_double_nothing(tmp_path, photos, retriever):
    for step, before in [(1, True), *((step, False) for step in range(1, 7))]:
        folder = tmp_path / f"{step} {before}"
        PicoIndex.create(folder, retriever)
        index_photos(folder, photos, retriever)
        code = killed(kill_at, step, before, replace_and_compact, folder, photos, retriever)
        assert code == -signal.SIGKILL
        index = PicoIndex.open(folder, retriever)
        payloads = [index.payload(key) for key in index.ids()]
        assert len({payload["path"] for payload in payloads}) == len(payloads) == IMAGES
        assert len({"n" in payload for payload in payloads}) == 1  # all or none
        replace_and_compact(folder, photos, retriever)
        opened = PicoIndex.open(folder, retriever)
        assert sorted(opened.payload(key)["n"] for key in opened.ids()) == list(range(IMAGES))
        assert len(list((folder / "shards").iterdir())) == 2


def test_two_processes_do_not_change_an_index_at_once(tmp_path, photos, retriever, monkeypatch):
    folder = tmp_path / "index"
    PicoIndex.create(folder, retriever)
    monkeypatch.setattr("pico_hf.search.files.LOCK_SECONDS", 0.2)
    other = PicoIndex.open(folder, retriever)
    with other._store.writing(), pytest.raises(TimeoutError, match="Another process"):
        index_photos(folder, photos, retriever)
    index_photos(folder, photos, retriever)
    other.refresh()
    assert len(other) == IMAGES


def limited(folder: Path, photos: Path, retriever: PicoRetriever, place: Path) -> None:
    """Indexes where no file may grow beyond 10 kB: a shard does not fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        PicoIndex.open(folder, retriever).add(photos, commit_images=20, show_progress=False)
    except OSError as error:
        place.write_text(str(error))


def test_a_file_that_cannot_be_written_leaves_the_index_as_it_was(tmp_path, photos, retriever):
    folder = tmp_path / "index"
    index = PicoIndex.create(folder, retriever)
    index.add(sorted(photos.iterdir())[:4], show_progress=False)
    before = content(folder)
    assert killed(limited, folder, photos, retriever, tmp_path / "message") == 0
    message = (tmp_path / "message").read_text()
    assert "could not be written to the index" in message
    assert "What it held before is still there" in message
    assert content(folder) == before
    assert check_after_kill(folder, retriever) == 4


def test_a_full_disk_is_named_and_the_run_goes_on_later(
    tmp_path, photos, retriever, undisturbed, monkeypatch
):
    folder = tmp_path / "index"
    PicoIndex.create(folder, retriever)
    calls, flush = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"No space left on device: .* could not be written"
    ) as caught:
        index_photos(folder, photos, retriever)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert not list(folder.rglob("*.partial"))
    assert 0 < check_after_kill(folder, retriever) < IMAGES
    index_photos(folder, photos, retriever)
    assert content(folder) == undisturbed[0]


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    middle = len(whole) * 2 // 3
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    changed = {"a bit": flipped, "its end": whole[:middle], "all": None, "content": b""}[how]
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)


@pytest.mark.parametrize("how", ["a bit", "its end", "all", "content"])
@pytest.mark.parametrize("suffix", ["safetensors", "jsonl"])
def test_a_damaged_shard_is_named_and_the_rest_can_be_used(
    how, suffix, tmp_path, photos, retriever, caplog
):
    folder = tmp_path / "index"
    PicoIndex.create(folder, retriever)
    index_photos(folder, photos, retriever)
    expected = [hit.path for hit in PicoIndex.open(folder, retriever).search("a red disc", 30)]
    damage(folder / "shards" / f"000002.{suffix}", how)
    before = content(folder)
    with pytest.raises(ValueError, match=r"damaged.*4 images|missing.*4 images") as caught:
        PicoIndex.open(folder, retriever)
    assert "\n" not in str(caught.value)
    assert content(folder) == before
    with caplog.at_level(logging.WARNING, "pico_hf"):
        index = PicoIndex.open(folder, retriever, damaged="leave_out")
    assert "4 images of 1 damaged shards" in caplog.text
    assert len(index) == IMAGES - 4
    assert index.add(photos, show_progress=False).added == 4
    found = [hit.path for hit in PicoIndex.open(folder, retriever).search("a red disc", 30)]
    assert found == expected


def test_compacting_does_not_take_over_damage(tmp_path, photos, retriever):
    folder = tmp_path / "index"
    PicoIndex.create(folder, retriever)
    index_photos(folder, photos, retriever)
    index = PicoIndex.open(folder, retriever)
    damage(folder / "shards" / "000003.safetensors", "a bit")
    before = content(folder)
    for call in (index.compact, index.verify):
        with pytest.raises(ValueError, match=r"000003\.safetensors' is damaged"):
            call()
    assert content(folder) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"format": "other"}', '{"format": "pico-index", "version": 2}']
)
def test_a_damaged_manifest_is_named(text, tmp_path):
    PicoIndex.create(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text(text)
    with pytest.raises(ValueError, match="no readable index file"):
        PicoIndex.open(tmp_path / "index")


def test_a_manifest_with_another_number_is_named(tmp_path):
    PicoIndex.create(tmp_path / "index")
    manifest = tmp_path / "index" / "index.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"next_shard": 1', '"next_shard": 2'))
    with pytest.raises(ValueError, match="it was changed"):
        PicoIndex.open(tmp_path / "index")
    manifest.write_text(whole.replace('"version": 2', '"version": 3'))
    with pytest.raises(ValueError, match="is of version 3"):
        PicoIndex.open(tmp_path / "index")
