"""An index on Qdrant in this process that is killed loses nothing and doubles nothing."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pico_hf import PicoIndex, PicoRetriever
from test_search_crash import COMMIT, IMAGES, index_photos, killed
from test_search_crash import photos as photos
from test_search_crash import retriever as retriever

pytest.importorskip("qdrant_edge", reason="needs the extra qdrant")

Content = dict[str, tuple[dict[str, Any], torch.Tensor]]


def content_of(folder: Path, out: Any) -> None:
    """Records and tokens of every image; no image may be there twice."""
    index = PicoIndex.open(folder)
    found = {}
    for images in index._store.groups():
        for image in images:
            assert image.record["id"] not in found
            found[image.record["id"]] = (image.record, image.tokens.numpy())
    assert len(found) == len(index) == len(index.ids())
    out.put(found)


def content(folder: Path) -> Content:
    """Read in a process of its own: threads of the engine must not be there when others start."""
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    process = context.Process(target=content_of, args=(folder, out))
    process.start()
    found = out.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
    return found


def make(folder: Path, retriever: PicoRetriever) -> None:
    PicoIndex.create(folder, retriever, store="qdrant").close()


def check_same(one: Content, other: Content) -> None:
    assert one.keys() == other.keys()
    for key, (record, tokens) in one.items():
        assert record == other[key][0]
        assert (tokens == other[key][1]).all()


def run(folder: Path, photos: Path, retriever: PicoRetriever) -> None:
    assert killed(index_photos, folder, photos, retriever) == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, photos, retriever) -> tuple[Content, float]:
    folder = tmp_path_factory.mktemp("undisturbed") / "index"
    killed(make, folder, retriever)
    start = time.perf_counter()
    run(folder, photos, retriever)
    seconds = time.perf_counter() - start
    found = content(folder)
    assert len(found) == IMAGES
    return found, seconds


def disturb(number: int, folder: Path, photos: Path, retriever, seconds: float) -> list[int]:
    """Kills a run at one to three random moments; how many images each of them left."""
    moments = random.Random(number)
    assert killed(make, folder, retriever) == 0
    left = []
    for _ in range(moments.randint(1, 3)):
        killed(index_photos, folder, photos, retriever, after=moments.uniform(0, seconds))
        left.append(len(content(folder)))
    assert left == sorted(left)
    run(folder, photos, retriever)
    return left


@pytest.mark.parametrize("number", range(2))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    number, tmp_path, photos, retriever, undisturbed
):
    disturb(number, tmp_path / "index", photos, retriever, undisturbed[1])
    check_same(content(tmp_path / "index"), undisturbed[0])


@pytest.mark.slow
def test_twenty_killed_runs_go_on_as_if_nothing_had_happened(
    tmp_path, photos, retriever, undisturbed
):
    left = []
    for number in range(20):
        folder = tmp_path / f"index {number}"
        left += disturb(100 + number, folder, photos, retriever, undisturbed[1])
        check_same(content(folder), undisturbed[0])
    assert len({count for count in left if 0 < count < IMAGES}) >= 3  # in the middle of the work


def die_at(step: int, before: bool, call: Callable[..., None], *args) -> None:
    """Ends this process before or after a change of the collection."""
    from pico_hf.search.qdrant_edge_points import EdgePoints

    put, count = EdgePoints.put, [0]

    def counted(points: EdgePoints, new) -> None:
        count[0] += 1
        if count[0] == step and before:
            os.kill(os.getpid(), signal.SIGKILL)
        put(points, new)
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    EdgePoints.put = counted
    call(*args)


@pytest.mark.parametrize(("step", "before"), [(1, True), (1, False), (3, False), (8, False)])
def test_a_run_that_dies_at_a_group_has_all_groups_before(
    step, before, tmp_path, photos, retriever, undisturbed
):
    folder = tmp_path / "index"
    killed(make, folder, retriever)
    assert killed(die_at, step, before, index_photos, folder, photos, retriever) == -signal.SIGKILL
    assert len(content(folder)) == min(IMAGES, COMMIT * (step - before))
    run(folder, photos, retriever)
    check_same(content(folder), undisturbed[0])
