"""Several processes embed a collection into one index as one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from pico_hf import PicoIndex
from pico_hf.search.bulk import embed
from pico_hf.search.records import merged_record
from pico_hf.search.sources import Share, images_of
from test_search import TEXTS, picture, retriever
from tiny import tiny_rows

IMAGES = 20


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(IMAGES):
        picture(number).save(folder / f"{number:02d}.png")
    (folder / "20.png").write_bytes((folder / "03.png").read_bytes())  # the other process's image
    (folder / "bad.png").write_text("no image")
    return folder


def start(processes: int, *args: Path | str) -> None:
    script = Path(__file__).parent / "embed_run.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, str(script), *map(str, args)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]


def vectors(folder: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    store = PicoIndex.open(folder)._store
    images = [image for group in store.groups() for image in group]
    assert len({image.record["id"] for image in images}) == len(images)
    return {
        image.record["id"]: (image.tokens, image.pooled, image.summary)  # type: ignore[dict-item]
        for image in images
    }


def paths(folder: Path) -> list[list[str]]:
    index = PicoIndex.open(folder)
    payloads = [index.payload(key) for key in index.ids()]
    return sorted(sorted(own.get("paths", [own["path"]])) for own in payloads)


def test_one_process_and_two_give_the_same_vectors(photos, tmp_path):
    alone = embed(photos, tmp_path / "one", retriever(), dtype="float32", show_progress=False)
    assert (alone.added, alone.duplicates, len(alone.skipped)) == (IMAGES, 1, 1)
    start(2, photos, tmp_path / "two", tmp_path / "report")
    for rank in range(2):
        assert (tmp_path / f"report-{rank}").read_text() == f"{IMAGES} 0 1 1"
    one, two = vectors(tmp_path / "one"), vectors(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, own in one.items():
        for expected, found in zip(own, two[key], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert paths(tmp_path / "one") == paths(tmp_path / "two")
    again = embed(photos, tmp_path / "two", retriever(), show_progress=False)  # and one goes on
    counts = (again.added, again.updated, again.unchanged, again.duplicates)
    assert counts == (0, 0, IMAGES, 1)


@pytest.mark.slow
def test_two_processes_go_on_where_one_ended_and_fail_together(photos, tmp_path):
    some = sorted(photos.glob("*.png"))[:7]
    embed(some, tmp_path / "index", retriever(), dtype="float32", show_progress=False)
    start(2, photos, tmp_path / "index", tmp_path / "report")
    assert (tmp_path / "report-1").read_text() == f"{IMAGES - 7} 7 1 1"
    other = tmp_path / "other"
    PicoIndex.create(other, retriever(seed=1))
    start(2, photos, other, tmp_path / "failed")
    assert "another model" in (tmp_path / "failed-0").read_text()
    assert "Process 0 of 2 has failed: ValueError: The" in (tmp_path / "failed-1").read_text()


def test_shares_are_all_images_once_and_rows_of_one_id_stay_together():
    rows = tiny_rows(12)
    for count in (1, 2, 5):
        parts = [Share(images_of(rows), rank, count, False) for rank in range(count)]
        names = [image.name for part in parts for image in part]
        assert sorted(names) == sorted(f"row {number}" for number in range(12))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    twice = datasets.concatenate_datasets([rows, rows]).add_column("n", [*range(12), *range(12)])
    parts = [Share(images_of(twice, id_column="n"), rank, 3, True) for rank in range(3)]
    keys = [{image.key for image in part} for part in parts]
    assert sum(map(len, keys)) == 12
    assert sum(map(len, parts)) == 24


def test_what_another_process_stores_or_deletes_meanwhile_is_kept(photos, tmp_path):
    """One process has read what is there; before it stores, another one changes it."""
    tool = retriever()
    index = PicoIndex.create(tmp_path / "index", tool, dtype="float32")
    other = PicoIndex.open(tmp_path / "index", tool)
    copied, real = photos / "20.png", photos / "03.png"
    index.add([real], show_progress=False)
    other.refresh()
    key = index.ids()[0]
    encode, calls = other._encoder.images, []

    def meanwhile(pictures):
        if not calls:
            index.delete(key)
        calls.append(len(pictures))
        return encode(pictures)

    other._encoder.images = meanwhile
    images = images_of([copied, photos / "05.png"])  # one is there, and goes
    report = other.add_share(images, True, 10, False)
    assert len(calls) == 2  # it is encoded after all
    assert sorted(own for one in paths(tmp_path / "index") for own in one) == sorted(
        [str(copied), str(photos / "05.png")]
    )
    assert report.added >= 1
    assert len(other.search(TEXTS[0])) == 2


def test_changes_of_two_processes_to_one_record_are_joined():
    base = {"id": "x", "digest": "x", "paths": ["a", "b"], "payload": {"n": 1}}
    ours = base | {"paths": ["a", "c"]}
    theirs = base | {"paths": ["a", "b", "d"], "payload": {"n": 2}}
    assert merged_record(base, ours, theirs) == theirs | {"paths": ["a", "d", "c"]}
    assert merged_record(base, None, theirs) == theirs | {"paths": ["d"]}
    assert merged_record(base, None, base) is None
    assert merged_record(base, ours, None) == ours
    assert merged_record(None, ours, base)["paths"] == ["a", "b", "c"]
    changed = ours | {"digest": "y"}
    assert merged_record(base, changed, theirs) == changed
    mine = ours | {"payload": {"n": 3}}
    assert merged_record(base, mine, theirs)["payload"] == {"n": 3}
