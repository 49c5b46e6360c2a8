"""Commands with an index on Qdrant: an address where they take a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from command_line import done, read, refused
from pico_hf import PicoIndex, PicoRetriever
from test_command_line import saved
from test_search import add
from tiny import tiny_encoder, tiny_refined, tiny_rows

pytest.importorskip("qdrant_edge", reason="needs the extra qdrant")
qdrant_client = pytest.importorskip("qdrant_client", reason="needs the extra qdrant")
NOWHERE = "http://127.0.0.1:9/photos"


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    saved(folder / "clip")
    saved(folder / "other", tiny_encoder(seed=1))
    saved(folder / "aligned", tiny_refined())
    (folder / "photos").mkdir()
    for number, row in enumerate(tiny_rows(8)):
        row["image"].save(folder / "photos" / f"{number}.png")
    return folder


@pytest.fixture(params=["local", "server"])
def collection(request, monkeypatch) -> str:
    """An address; without a server the client's local mode answers for it, in this process."""
    name = f"photos-{uuid.uuid4().hex}"
    if request.param == "server":
        if not os.environ.get("PICO_QDRANT_URL"):
            pytest.skip("no Qdrant server: PICO_QDRANT_URL is not set")
        return f"{os.environ['PICO_QDRANT_URL'].rstrip('/')}/{name}"
    local = qdrant_client.QdrantClient(":memory:")
    local.close = lambda: None  # what a server holds stays when a client goes
    asked: list[str] = []

    def connect(url: str, **options):
        asked.append(url)
        assert url == "http://qdrant.example:6333"
        return local

    monkeypatch.setattr(qdrant_client, "QdrantClient", connect)
    return f"http://qdrant.example:6333/{name}"


def hits(*words) -> list[tuple[str, float]]:
    (result,) = read("search", *words)["results"]
    return [(hit["path"], hit["score"]) for hit in result["hits"]]


def test_a_collection_answers_as_a_folder_does(shop, collection, tmp_path):
    files = tmp_path / "photos.index"
    done("index", shop / "photos", files, "--model", shop / "clip", "--storage", "float32")
    assert "is a new index" in refused("index", shop / "photos", collection)
    words = ("index", shop / "photos", collection, "--storage", "float32")
    found = read(*words, "--model", shop / "clip")
    assert (found["added"], found["images"], found["model"]) == (8, 8, str(shop / "clip"))
    for query in ("a big red square", shop / "photos" / "3.png"):
        mine, theirs = hits(collection, query), hits(files, query)
        assert [path for path, _ in mine] == [path for path, _ in theirs]
        assert [one for _, one in mine] == pytest.approx([one for _, one in theirs], abs=2e-6)
    again = read(*words)  # the model is in the collection's metadata
    assert (again["added"], again["unchanged"]) == (0, 8)
    facts, others = read("info", collection), read("info", files)
    same = ("kind", "images", "storage", "columns", "model", "encoder", "fingerprint", "fields")
    assert {name: facts[name] for name in same} == {name: others[name] for name in same}
    assert "bytes" not in done("info", collection)
    done("index", shop / "photos", collection, "--model", shop / "aligned")
    assert read("info", collection)["model"] == str(shop / "aligned")


def test_bulk_embedding_goes_on_in_a_collection(shop, collection):
    words = ("embed", shop / "photos", collection)
    assert read(*words, "--model", shop / "clip")["added"] == 8
    assert read(*words)["unchanged"] == 8
    said = refused(*words, "--storage", "int8")
    assert "is 'float16', got 'int8'" in said


def test_a_stopped_run_goes_on(shop, collection, monkeypatch):
    from pico_hf.search.qdrant_client_points import ClientPoints

    put, calls = ClientPoints.put, []

    def once(self, points) -> None:
        calls.append(len(points))
        if len(calls) == 2:
            raise ConnectionError("No Qdrant server answers: gone")
        put(self, points)

    from pico_hf.search.upsert import Upsert

    small = Upsert.__init__
    monkeypatch.setattr(
        Upsert, "__init__", lambda self, store, e, d, size, _: small(self, store, e, d, size, 3)
    )
    monkeypatch.setattr(ClientPoints, "put", once)
    words = ("index", shop / "photos", collection, "--model", shop / "clip")
    assert "gone" in refused(*words)
    assert read("info", collection)["images"] == 3
    found = read(*words[:3])
    assert (found["added"], found["unchanged"], found["images"]) == (5, 3, 8)


def test_a_collection_of_another_model_is_refused_and_stays(shop, collection):
    done("index", shop / "photos", collection, "--model", shop / "clip")
    before = read("info", collection)
    for words in (
        ("index", shop / "photos", collection, "--model", shop / "other"),
        ("embed", shop / "photos", collection, "--model", shop / "other"),
        ("search", collection, "a red disc", "--model", shop / "other"),
    ):
        assert "made with another model" in refused(*words)
    assert read("info", collection) == before


def test_what_is_no_collection_is_one_line(shop, collection):
    assert "holds no index" in refused("search", collection, "a dog")
    assert "holds no index" in refused("search", collection, "a dog", "--model", shop / "clip")
    assert "which is not there" in refused("info", collection)
    address = collection.rpartition("/")[0]
    assert "Add the name of a collection" in refused("info", address)


def test_a_page_of_what_is_no_collection_is_one_line(shop, collection):
    pytest.importorskip("gradio")
    assert "holds no index" in refused("demo", "--images", collection)


@pytest.mark.parametrize("place", ["localhost:6333/photos", "qdrant://host/photos", "host:6333"])
def test_an_address_without_its_beginning_makes_no_folder(shop, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("index", shop / "photos", place, "--model", shop / "clip")
    assert "begins with http:// or https://" in refused(*words)
    assert list(tmp_path.iterdir()) == []


COMMANDS = [
    ["search", NOWHERE, "a dog"],
    ["search", NOWHERE, "a dog", "--model", "clip"],
    ["index", "photos", NOWHERE],
    ["index", "photos", NOWHERE, "--model", "clip"],
    ["embed", "photos", NOWHERE, "--model", "clip"],
    ["info", NOWHERE],
    ["demo", "--images", NOWHERE],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_server_that_does_not_answer_is_one_line(shop, words, monkeypatch):
    if words[0] == "demo":
        pytest.importorskip("gradio")
    monkeypatch.chdir(shop)
    assert "No Qdrant server answers at 'http://127.0.0.1:9/photos'" in refused(*words)


def test_an_unreachable_server_in_a_real_process(shop):
    command = [sys.executable, "-m", "pico_hf_command", "search", NOWHERE, "a dog"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith("pico-hf: No Qdrant server answers")


@pytest.fixture
def gate(request) -> Iterator[str]:
    """A server on this machine that answers every request with one status and one text."""
    status, text = request.param

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/photos"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ((401, b"Must provide an API key"), "QDRANT_API_KEY"),
        ((503, b"<html>busy\nback soon</html>"), "Qdrant server refused"),
        ((200, b"<html>no Qdrant</html>"), "is no Qdrant server"),
        ((200, b"\xff\xfe"), "is no Qdrant server"),
        ((200, b'{"result": 3}'), "No Qdrant server answers"),
    ],
    indirect=["gate"],
)
def test_what_answers_and_is_no_open_qdrant_is_one_line(shop, gate, said):
    line = refused("index", shop / "photos", gate, "--model", shop / "clip")
    assert said in line
    assert said in refused("search", gate, "a dog")


def test_commands_take_an_index_of_the_engine_in_this_process(shop, tmp_path):
    folder = tmp_path / "photos.qdrant"
    index = PicoIndex.create(folder, PicoRetriever.from_pretrained(shop / "clip"), store="qdrant")
    add(index, [shop / "photos" / f"{n}.png" for n in range(5)])
    expected = [hit.path for hit in index.search("a red disc")]
    index.close()
    model = ("--model", shop / "clip")
    assert [path for path, _ in hits(folder, "a red disc", *model)] == expected
    facts = read("info", folder)
    assert (facts["images"], facts["model"]) == (5, None)
    assert facts["bytes"] > 0
    assert read("index", shop / "photos", folder, *model)["images"] == 8
    assert len(hits(folder, "a red disc")) == 8
