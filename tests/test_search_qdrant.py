"""An index on Qdrant, in this process and by its client, answers as one in files does."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from pathlib import Path

import pytest
import torch

from pico_hf import PicoIndex, TokenFeatures
from pico_hf.core.similarity import similarity
from pico_hf.search.hits import Hit
from pico_hf.search.store import ImageStore
from test_search import TEXTS, add, picture, ranking, retriever, synthetic
from tiny import tiny_rows

edge = pytest.importorskip("qdrant_edge", reason="needs the extra qdrant")
qdrant_client = pytest.importorskip("qdrant_client", reason="needs the extra qdrant")


class Place:
    """Where indexes of a kind are made: each name is one."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.options = {}
        self.last: PicoIndex | None = None
        if kind == "client":
            self.options = {"client": qdrant_client.QdrantClient(":memory:")}
        self.unique = uuid.uuid4().hex

    def name(self, name: str):
        if self.kind == "edge":
            return self.folder / name
        if self.kind == "client":
            return name
        return f"{os.environ['PICO_QDRANT_URL'].rstrip('/')}/{name}-{self.unique}"

    def create(self, name: str, tool=None, **options) -> PicoIndex:
        if self.kind == "edge":
            options |= {"store": "qdrant"}
        return PicoIndex.create(self.name(name), tool, **options, **self.options)

    def open(self, name: str, tool=None) -> PicoIndex:
        return PicoIndex.open(self.name(name), tool, **self.options)


def server_missing() -> str | None:
    if os.environ.get("PICO_QDRANT_URL"):
        return None
    return "PICO_QDRANT_URL is not set"


@pytest.fixture(params=["edge", "client", "server"])
def place(request, tmp_path) -> Place:
    if request.param == "server" and server_missing():
        pytest.skip(f"no Qdrant server: {server_missing()}")
    return Place(request.param, tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        picture(number).save(folder / f"{number}.png")
    return folder


def by_id(index: PicoIndex) -> dict[str, dict]:
    return {key: index.payload(key) for key in index.ids()}


def close(a: list[Hit], b: list[Hit], atol: float = 2e-6) -> None:
    assert [hit.id for hit in a] == [hit.id for hit in b]
    assert [hit.score for hit in a] == pytest.approx([hit.score for hit in b], abs=atol)
    assert [hit.payload for hit in a] == [hit.payload for hit in b]


@pytest.mark.parametrize("share", [0.0, 1 / 3, 1.0])
def test_scores_are_those_of_the_model_and_of_files(share, place, photos, tmp_path):
    tool = retriever(pooled_share=share)
    files = PicoIndex.create(tmp_path / "files", tool, dtype="float32")
    index = place.create("index", tool, dtype="float32")
    report = add(index, photos, commit_images=4)
    add(files, photos)
    assert (report.added, len(index)) == (10, 10)
    assert by_id(index) == by_id(files)
    for text in TEXTS:
        close(index.search(text), files.search(text))
        near = index.search(text, top_k=3, depth=10, exact=False)
        close(near, files.search(text, top_k=3))
    paths = sorted(photos.iterdir())
    with torch.no_grad():
        expected = tool.model.score(tool.encode_images(paths), tool.encode_texts(TEXTS[:1]))
    found = {hit.path: hit.score for hit in index.search(TEXTS[0])}
    assert [found[str(path)] for path in paths] == pytest.approx(
        expected.flatten().tolist(), abs=2e-6
    )
    index.close()


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("float16", 5e-4), ("int8", 1e-2)])
def test_vectors_alone_are_ranked_in_two_stages_as_in_files(dtype, atol, place, tmp_path):
    images, words = synthetic(300)
    ragged = images.mask.clone()
    ragged[::3, 7:] = False
    images = TokenFeatures(images.features, ragged)
    index = place.create("index", dtype=dtype)
    files = PicoIndex.create(tmp_path / "files", dtype="float32")
    ids = [str(n) for n in range(300)]
    for one in (index, files):
        one.add_features(images, ids)
    expected = similarity(images, words)
    for hits, others in zip(
        index.search(words, exact=False, depth=40),
        files.search(words, exact=False, depth=40),
        strict=True,
    ):
        assert len(hits) == 10
        scores = [hit.score for hit in hits]
        assert scores == pytest.approx([hit.score for hit in others], abs=atol)
        if dtype == "float32":
            close(hits, others)
    for number, hits in enumerate(index.search(words[:3], 300, exact=True)):
        scores = torch.tensor([hit.score for hit in sorted(hits, key=lambda hit: int(hit.id))])
        torch.testing.assert_close(scores, expected[:, number], rtol=0, atol=atol)


def test_the_engine_ranks_tokens_by_maxsim(tmp_path):
    """Other users of the collection find both named vectors, and one direction of the score."""
    images, words = synthetic(60)
    client = qdrant_client.QdrantClient(":memory:")
    index = PicoIndex.create("photos", client=client, dtype="float32")
    index.add_features(images, [str(n) for n in range(60)])
    query = words[:1]
    real = query.features[0][query.mask[0]]
    expected = (images.features @ real.t()).amax(dim=1).sum(dim=1)
    found = client.query_points("photos", query=real.tolist(), using="tokens", limit=60).points
    assert [int(one.payload["id"]) for one in found] == expected.argsort(descending=True).tolist()
    assert [one.score for one in found] == pytest.approx(
        expected.sort(descending=True).values.tolist(), abs=1e-5
    )
    vectors = client.scroll("photos", with_vectors=True, limit=1)[0][0].vector
    assert vectors.keys() == {"pooled", "tokens"}


def test_adding_again_copies_and_changed_files(place, photos):
    index = place.create("index", retriever())
    assert add(index, photos).added == 10
    again = add(index, photos)
    assert (again.added, again.unchanged) == (0, 10)
    copied = photos / "copy.png"
    copied.write_bytes((photos / "4.png").read_bytes())
    assert add(index, photos).duplicates == 1
    assert len(index) == 10
    picture(77).save(photos / "5.png")
    report = add(index, photos)
    assert (report.added, report.updated, len(index)) == (0, 1, 10)
    first, second = (photos / "6.png").read_bytes(), (photos / "7.png").read_bytes()
    (photos / "6.png").write_bytes(second)
    (photos / "7.png").write_bytes(first)
    add(index, photos)
    owners = [path for own in by_id(index).values() for path in own.get("paths", [own["path"]])]
    assert sorted(owners) == sorted(str(path) for path in photos.iterdir())
    assert index.search(photos / "5.png", top_k=1)[0].path == str(photos / "5.png")
    assert index.search(photos / "7.png", top_k=1)[0].path == str(photos / "7.png")


def test_what_a_kill_between_adding_and_deleting_leaves_goes_with_the_next_run(
    place, photos, monkeypatch
):
    index = place.create("index", retriever())
    add(index, photos)
    before = by_id(index)
    picture(78).save(photos / "5.png")

    def killed(ids) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index._store._points, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        add(index, photos)
    assert len(index) == 11  # nothing is lost
    monkeypatch.undo()
    add(index, photos)
    after = by_id(index)
    assert len(after) == 10
    assert len(before.keys() & after.keys()) == 9
    assert add(index, photos).unchanged == 10


def test_named_images_filters_and_deletions(place):
    rows = tiny_rows(8).add_column("year", list(range(2000, 2008)))
    rows = rows.add_column("half", [n / 2 for n in range(8)])
    rows = rows.add_column("even", [n % 2 == 0 for n in range(8)])
    index = place.create("index", retriever())
    assert add(index, rows).added == 8

    def years(chosen) -> list[int]:
        return sorted(hit.payload["year"] for hit in index.search(TEXTS[0], 8, filter=chosen))

    assert years({"year": 2003}) == [2003]
    assert years({"year": 2003.0}) == [2003]
    assert years({"year": [2001, 2006, 1990]}) == [2001, 2006]
    assert years({"year": lambda year: year > 2005}) == [2006, 2007]
    assert years({"captions": "red disc"}) == [2000, 2004]
    assert years({"captions": "red disc", "year": [2004, 2005]}) == [2004]
    assert years(lambda payload: payload["year"] % 2 == 1) == [2001, 2003, 2005, 2007]
    assert years({"half": [0.5, 2]}) == [2001, 2004]
    assert years({"half": True}) == [2002]
    assert years({"even": False}) == [2001, 2003, 2005, 2007]
    assert years({"even": 1, "year": lambda year: year < 2003}) == [2000, 2002]
    assert years({"year": 1066}) == []
    for wrong in ({"yaer": 2003}, {"yaer": lambda year: True}):
        with pytest.raises(ValueError, match=r"'yaer', which no image has.*mean 'year'"):
            years(wrong)
    with pytest.raises(ValueError, match="`filter` must be a dict"):
        years(3)
    assert index.delete(filter={"year": 2003}) == 1
    assert years({"year": [2003, 2004]}) == [2004]
    gone = index.ids()[0]
    assert index.delete(gone) == 1
    assert gone not in index
    with pytest.raises(ValueError, match="which are not there"):
        index.delete([index.ids()[0], gone])
    assert len(index) == 6
    index.compact()
    index.verify()
    assert index.delete(filter=lambda payload: True) == 6
    assert index.search(TEXTS[0]) == []
    assert add(index, rows).added == 8


def test_an_index_is_opened_again_and_refuses_another_model(place, photos, tmp_path):
    tool = retriever()
    index = place.create("index", tool, dtype="float32")
    add(index, photos)
    expected = ranking(index.search(TEXTS[0]))
    index.save(tmp_path / "copy")
    assert ranking(PicoIndex.open(tmp_path / "copy", tool).search(TEXTS[0])) == expected
    if place.kind == "edge":
        index.close()
    for other, message in (
        (retriever(seed=1), "another model: the weights of its image tower"),
        (retriever("siglip"), "of type clip, this one siglip"),
    ):
        with pytest.raises(ValueError, match=message):
            place.open("index", other)
    opened = place.open("index", tool)
    assert ranking(opened.search(TEXTS[0])) == expected
    with pytest.raises(ValueError, match="already"):
        place.create("index", tool)
    with pytest.raises(ValueError, match=r"has no index\.json|which is not there"):
        place.open("nothing", tool)


def test_images_without_the_pooled_feature_are_counted_and_completed(place):
    tool = retriever(pooled_share=1 / 3)
    index = place.create("index", tool, dtype="float32")
    width = len(tool.model.column_weights)
    images, words = synthetic(12, width=width)
    pooled = torch.nn.functional.normalize(torch.randn(12, width), dim=1)
    whole = TokenFeatures(images.features, images.mask, pooled)
    words = TokenFeatures(words.features[:6], words.mask[:6], pooled[:6])
    ids = [str(n) for n in range(12)]
    index.add_features(whole[:9], ids[:9])
    index.add_features(images[9:], ids[9:], [{"kind": "alone"}] * 3)
    with pytest.raises(ValueError, match="the index holds 3 images without one"):
        index.search(words)
    assert len(index.search(words, filter=lambda payload: "kind" not in payload)[0]) == 9
    index.add_features(whole[9:], ids[9:])
    expected = tool.model.score(whole, words)
    for number, hits in enumerate(index.search(words, 12)):
        scores = torch.tensor([hit.score for hit in sorted(hits, key=lambda hit: int(hit.id))])
        torch.testing.assert_close(scores, expected[:, number], rtol=0, atol=2e-6)


def test_an_edge_index_is_open_in_one_process(photos, tmp_path):
    index = PicoIndex.create(tmp_path / "index", retriever(), store="qdrant")
    add(index, photos)
    with pytest.raises(TimeoutError, match=r"has the index .* open, and only one can"):
        PicoIndex.open(tmp_path / "index")
    index.close()
    assert len(PicoIndex.open(tmp_path / "index")) == 10
    with pytest.raises(ValueError, match="is an index on Qdrant"):
        ImageStore(tmp_path / "index")


def test_folders_and_collections_of_others_are_left_alone(photos, tmp_path):
    with pytest.raises(ValueError, match="must be new or empty"):
        PicoIndex.create(photos, store="qdrant")
    with pytest.raises(ValueError, match="`store` must be 'files' or 'qdrant', got 'lance'"):
        PicoIndex.create(tmp_path / "index", store="lance")
    with pytest.raises(ValueError, match="Add the name of a collection"):
        PicoIndex.create("http://localhost:6333")
    client = qdrant_client.QdrantClient(":memory:")
    one = qdrant_client.models.VectorParams(size=4, distance=qdrant_client.models.Distance.DOT)
    client.create_collection("theirs", vectors_config=one)
    for call in (PicoIndex.create, PicoIndex.open):
        with pytest.raises(ValueError, match="is no index of pico_hf"):
            call("theirs", client=client)


def test_a_server_that_does_not_answer_is_one_line(photos):
    for call in (PicoIndex.create, PicoIndex.open):
        with pytest.raises(ConnectionError, match="No Qdrant server answers") as caught:
            call("http://127.0.0.1:9/photos")
        assert "\n" not in str(caught.value)


def test_a_server_that_goes_away_stops_the_run_and_the_next_one_goes_on(photos, monkeypatch):
    """Its errors are not those of an image, which would be left out."""
    client = qdrant_client.QdrantClient(":memory:")
    tool = retriever()
    index = PicoIndex.create("photos", tool, client=client)
    calls, upsert = [0], client.upsert

    def gone(*args, **options):
        calls[0] += 1
        if calls[0] > 2:
            raise qdrant_client.http.exceptions.ResponseHandlingException(OSError("gone"))
        return upsert(*args, **options)

    monkeypatch.setattr(client, "upsert", gone)
    with pytest.raises(ConnectionError, match="what was stored is still there"):
        add(index, photos, commit_images=3)
    monkeypatch.undo()
    assert len(index) == 6
    monkeypatch.setattr(
        client, "retrieve", lambda *a, **o: (_ for _ in ()).throw(ConnectionResetError("gone"))
    )
    with pytest.raises(ConnectionError, match="No Qdrant server answers"):
        add(index, photos)
    monkeypatch.undo()
    report = add(index, photos)
    assert (report.added, report.unchanged, report.skipped) == (4, 6, [])


def search_shard(folder: Path, words: TokenFeatures, images: TokenFeatures, ids: list[str], out):
    torch.set_num_threads(1)
    index = PicoIndex.create(folder, store="qdrant", dtype="float32")
    index.add_features(images, ids)
    out.put([[(hit.score, hit.id) for hit in hits] for hits in index.search(words, 10, exact=True)])


def test_shards_in_several_processes_together_answer_as_one_collection(tmp_path):
    """What a cluster does: every node ranks its own images, and the best of all are merged."""
    images, words = synthetic(90)
    words = words[:12]
    ids = [str(n) for n in range(90)]
    whole = PicoIndex.create(tmp_path / "whole", store="qdrant", dtype="float32")
    whole.add_features(images, ids)
    expected = [[(hit.score, hit.id) for hit in hits] for hits in whole.search(words, exact=True)]
    whole.close()
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    processes = []
    for number in range(3):
        own = torch.arange(90) % 3 == number
        args = (tmp_path / f"{number}", words, images[own], ids[number::3], out)
        processes.append(context.Process(target=search_shard, args=args))
        processes[-1].start()
    parts = [out.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(60)
    for number, best in enumerate(expected):
        merged = sorted((one for part in parts for one in part[number]), reverse=True)[:10]
        assert [key for _, key in merged] == [key for _, key in best]
        assert [s for s, _ in merged] == pytest.approx([s for s, _ in best], abs=1e-6)


def test_what_a_killed_creation_left_is_made_anew(tmp_path):
    index = PicoIndex.create(tmp_path / "index", store="qdrant")
    (tmp_path / "index" / "shard").mkdir()
    (tmp_path / "index" / "shard" / "half").write_bytes(b"x")
    images, words = synthetic(20)
    index = PicoIndex.open(tmp_path / "index")
    assert index.search(words[:2]) == [[], []]
    index.add_features(images, [str(n) for n in range(20)])
    assert not (tmp_path / "index" / "shard" / "half").exists()
    index.close()
    assert len(PicoIndex.open(tmp_path / "index")) == 20
