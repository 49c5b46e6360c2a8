"""Every command as users run it: what it answers, its exit codes, and one line for bad input."""

import base64
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from command_line import done, read, refused, run
from pico_hf import PicoIndex, PicoModel, PicoRetriever
from pico_hf.cli.answers import Answer, Table, show
from pico_hf.cli.commands import evaluate, search
from pico_hf.training.job_sources import hold_out
from tiny import tiny_encoder, tiny_processor, tiny_refined, tiny_rows

COMMANDS = (
    *("align", "cache", "demo", "embed", "evaluate", "explain", "export"),
    *("index", "info", "push", "search", "train"),
)


def saved(folder: Path, model=None) -> str:
    """A folder of a model, by default a plain encoder, with its processor."""
    for part in (model or tiny_encoder(), tiny_processor()):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A folder with an encoder, a model, photos, and an index of them."""
    folder = tmp_path_factory.mktemp("shop")
    saved(folder / "clip")
    saved(folder / "model", tiny_refined())
    (folder / "photos" / "[old]").mkdir(parents=True)
    for number, row in enumerate(tiny_rows(8)):
        place = "[old]" if number % 2 else "."
        row["image"].save(folder / "photos" / place / f"{number}.png")
    tiny_rows(24).to_parquet(folder / "pairs.parquet")
    done("index", folder / "photos", folder / "photos.index", "--model", folder / "clip")
    return folder


# ---- the program -------------------------------------------------------------------------------


def program(*arguments, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    words = [sys.executable, "-m", "pico_hf_command", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False, **options}
    return subprocess.run(words, **options)


def test_help_costs_no_torch_and_names_every_command():
    script = (
        "import sys, pico_hf_command\n"
        "try:\n    pico_hf_command.main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()\n"
        "print('loaded:', sorted(heavy))"
    )
    for words in (["--help"], ["train", "--help"]):
        shown = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
        ).stdout
        assert shown.splitlines()[-1] == "loaded: []"
    top = done("--help")
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", top), name
        assert "--json" in done(name, "--help")


def test_the_command_registers_the_model_that_its_help_leaves_out(shop):
    result = program("info", shop / "model", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["kind"], facts["encoder"], facts["columns"]) == ("model", "clip", 16)
    assert facts["rotated"]
    assert facts["column_weights"]["std"] > 0


def test_a_mistake_in_a_real_process_is_one_line_and_an_exit_code(shop):
    result = program("search", shop / "nowhere", "a dog")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("pico-hf: ")
    assert "holds no index" in line


def test_ctrl_c_is_one_line_and_the_index_goes_on(shop, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import pathlib, time\nfrom pico_hf.search.upsert import Upsert\n"
        f"def put(*_):\n    pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n    time.sleep(60)\n"
        "Upsert._put = put\n"
    )
    words = ["index", shop / "photos", tmp_path / "index", "--model", shop / "clip"]
    command = [sys.executable, "-m", "pico_hf_command", "--import", slow, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background ignores ^C, and so would what it starts.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(list(map(str, command)), **pipes) as process:
        while process.poll() is None and not (tmp_path / "ready").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, told = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, ""), told
    assert told.strip().splitlines()[-1].startswith("pico-hf: stopped. What was stored stays")
    assert "Traceback" not in told
    assert read(*words)["added"] == 8


def test_usage_errors_have_exit_code_2_and_name_what_is_near():
    assert "No such command 'serch'" in refused("serch", code=2)
    assert "--top-k" in refused("search", "a", "b", "--top-k", "0", code=2)
    assert "Missing argument" in refused("explain", code=2)


def test_a_traceback_is_shown_with_debug_only():
    assert "Traceback" not in run("info", "nowhere").stderr
    assert "Traceback" in run("info", "nowhere", "--debug").stderr


def test_an_error_that_nobody_thought_of_is_one_line_too(monkeypatch, shop):
    def fail(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(PicoModel, "from_pretrained", fail)
    assert "unexpected ZeroDivisionError: oops (--debug" in refused("info", shop / "model")


def test_a_module_that_is_not_there_is_refused(shop):
    assert "not there" in refused("--import", "nowhere.py", "info", shop / "model")
    assert "no_such_module" in refused("--import", "no_such_module", "info", shop / "model")


def test_nothing_in_a_table_is_cut_or_read_as_markup(capsys):
    name = "[red]" + "long/" * 60 + "\x1b[2Jend"
    show(Answer({"x": float("nan")}, [Table(("image", "#score"), [(name, 1)])]), False)
    shown = capsys.readouterr().out
    assert "[red]" + "long/" * 60 in shown
    assert "\x1b" not in shown
    show(Answer({"x": float("nan")}), True)
    assert json.loads(capsys.readouterr().out) == {"x": None}


# ---- index and search --------------------------------------------------------------------------


def test_an_index_is_made_once_and_goes_on(shop, tmp_path):
    words = ("index", shop / "photos", tmp_path / "index")
    assert "--model" in refused(*words)
    assert not (tmp_path / "index").exists()
    first = read(*words, "--model", shop / "clip", "--storage", "int8")
    assert (first["added"], first["images"], first["skipped"]) == (8, 8, [])
    assert read(*words)["unchanged"] == 8
    assert "is there already" in refused(*words, "--storage", "float32")
    facts = read("info", tmp_path / "index", "--verify")
    assert (facts["images"], facts["storage"], facts["verified"]) == (8, "int8", True)
    assert facts["model"] == str(shop / "clip")


def test_a_search_finds_what_the_index_finds(shop):
    found = read("search", shop / "photos.index", "a big red square", "--top-k", "3")
    retriever = PicoRetriever.from_pretrained(shop / "clip")
    index = PicoIndex.open(shop / "photos.index", retriever)
    hits = index.search("a big red square", 3)
    (result,) = found["results"]
    assert [hit["path"] for hit in result["hits"]] == [hit.path for hit in hits]
    assert [hit["score"] for hit in result["hits"]] == pytest.approx([hit.score for hit in hits])
    assert result["search_seconds"] > 0
    shown = done("search", shop / "photos.index", "a big red square", "--top-k", "8")
    assert str(shop / "photos" / "[old]" / "1.png") in shown  # whole, brackets and all


def test_an_image_finds_itself_and_queries_may_stand_in_a_file(shop, tmp_path):
    image = shop / "photos" / "0.png"
    (result,) = read("search", shop / "photos.index", image, "--top-k", 1)["results"]
    assert result["hits"][0]["path"] == str(image)
    (tmp_path / "queries.txt").write_text("red disc\n\na big blue square\n")
    found = read("search", shop / "photos.index", "--queries", tmp_path / "queries.txt")
    assert [one["query"] for one in found["results"]] == ["red disc", "a big blue square"]


@pytest.mark.parametrize("scan", ["exact", "stages"])
def test_both_scans_give_the_same_images_where_the_depth_is_all(shop, scan):
    words = ("search", shop / "photos.index", "white disc", "--depth", "8")
    one, other = (read(*words, "--scan", kind)["results"][0]["hits"] for kind in (scan, "auto"))
    assert [hit["id"] for hit in one] == [hit["id"] for hit in other]


def test_columns_of_a_table_are_fields_of_the_filter(shop, tmp_path):
    rows = tiny_rows(8).add_column("year", [2020 + n % 2 for n in range(8)])
    rows.to_parquet(tmp_path / "rows.parquet")
    done("index", tmp_path / "rows.parquet", tmp_path / "index", "--model", shop / "clip")
    words = ("search", tmp_path / "index", "red disc", "--filter")
    hits = read(*words, "year=2021")["results"][0]["hits"]
    assert {hit["payload"]["year"] for hit in hits} == {2021}
    assert "Did you mean 'year'?" in refused(*words, "yaer=2021")
    assert "FIELD=VALUE" in refused(*words, "year")
    assert "no image passes the filter" in done(*words, "year=1999")


def test_the_page_needs_nothing_beside_itself(shop, tmp_path):
    page = tmp_path / "found" / "out.html"
    query = "<script>alert(1)</script> a red disc"
    done("search", shop / "photos.index", query, "--html", page, "--top-k", "2")
    text = page.read_text()
    assert "<script>" not in text
    assert not re.search(r"https?:|//", re.sub(r"base64,[\w+/=]+", "", text))
    pictures = re.findall(r"data:image/jpeg;base64,([\w+/=]+)", text)
    assert len(pictures) == 2
    assert base64.b64decode(pictures[0]).startswith(b"\xff\xd8")
    assert [path.name for path in page.parent.iterdir()] == ["out.html"]
    assert "must be a file" in refused("search", shop / "photos.index", "a", "--html", tmp_path)


def test_bad_queries_are_one_line(shop):
    words = ("search", shop / "photos.index")
    assert "Give a query" in refused(*words)
    assert "at least one word" in refused(*words, "  ")
    assert "there is none" in refused(*words, "nowhere.jpg")
    assert "UTF-8" in refused(*words, "--queries", shop / "photos" / "0.png")
    assert "nowhere.txt" in refused(*words, "--queries", "nowhere.txt")


def test_ten_thousand_words_are_searched_with_one_warning(shop):
    result = run("search", shop / "photos.index", "red " * 10_000, "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["results"][0]["hits"]) == 8
    (line,) = [line for line in result.stderr.splitlines() if "words" in line]
    assert re.search(r"10000 words: what is beyond \d+ tokens is not read", line)


def test_a_text_file_named_jpg_is_left_out_and_said(shop, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "notes.jpg").write_text("no image")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "mixed" / "red.png")
    words = ("index", tmp_path / "mixed", tmp_path / "index", "--model", shop / "clip")
    assert "notes.jpg" in refused(*words, "--strict")
    found = read(*words)
    assert found["images"] == 1
    assert [Path(one["image"]).name for one in found["skipped"]] == ["notes.jpg"]
    query = tmp_path / "mixed" / "notes.jpg"
    assert "pico-hf: " in refused("search", tmp_path / "index", query)


def test_a_folder_without_images_leaves_no_index(shop, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ("index", tmp_path / "empty", tmp_path / "index", "--model", shop / "clip")
    assert "with nothing and no image" in refused(*words)
    assert not (tmp_path / "index").exists()
    assert "neither a file or folder" in refused("index", tmp_path / "none", *words[2:])


def test_an_index_of_another_model_is_refused_and_stays(shop, tmp_path):
    other = saved(tmp_path / "other", tiny_encoder(seed=1))
    before = (shop / "photos.index" / "index.json").read_bytes()
    words = ("search", shop / "photos.index", "a red disc", "--model", other)
    assert "made with another model" in refused(*words)
    said = refused("index", shop / "photos", shop / "photos.index", "--model", other)
    assert "made with another model" in said
    assert (shop / "photos.index" / "index.json").read_bytes() == before
    assert read("info", shop / "photos.index")["model"] == str(shop / "clip")


def test_a_folder_with_other_files_is_no_index(shop):
    words = ("index", shop / "photos", shop / "photos", "--model", shop / "clip")
    assert "must be new or empty" in refused(*words)
    assert "holds neither a model" in refused("info", shop / "photos")


def test_a_query_that_looks_like_an_option_can_be_searched(shop):
    result = run("search", "--json", shop / "photos.index", "--", "--debug")
    assert json.loads(result.stdout)["results"][0]["query"] == "--debug"


# ---- models ------------------------------------------------------------------------------------


def test_an_evaluation_has_the_encoders_cosine_the_base_and_the_model(shop):
    found = read("evaluate", shop / "model", shop / "pairs.parquet")
    assert list(found["results"]) == ["pooled cosine", "base, w = 1", "PICO"]
    assert (found["images"], found["captions"]) == (24, 48)
    plain = read("evaluate", shop / "clip", shop / "pairs.parquet")["results"]
    assert found["results"]["base, w = 1"] == pytest.approx(plain["base, w = 1"])
    shown = done("evaluate", shop / "clip", shop / "pairs.parquet", "--limit", "12")
    assert "12 images, 24 captions" in shown


def test_the_rows_of_an_evaluation_are_what_the_model_itself_gives(shop):
    from pico_hf import ImageTextDataset, SplitEncoder, evaluate_retrieval, load_image_text

    rows = ImageTextDataset(load_image_text(files=shop / "pairs.parquet"))
    retriever = PicoRetriever.from_pretrained(shop / "model")
    found = evaluate.compare(retriever, rows)
    split = SplitEncoder(retriever.model, retriever.collate).split(rows)
    assert found["PICO"] == pytest.approx(evaluate_retrieval(retriever.model, split))
    cosine = PicoModel.from_pretrained(shop / "clip", pooled_share=1.0)
    split = SplitEncoder(cosine, retriever.collate).split(rows)
    assert found["pooled cosine"] == pytest.approx(evaluate_retrieval(cosine, split))


def test_an_evaluation_by_mteb_gives_its_main_score(shop, monkeypatch):
    mteb = pytest.importorskip("mteb", minversion="2.26")
    from mteb.mocks.mock_tasks.retrieval import MockAny2AnyRetrievalT2ITask

    assert "knows no such task" in refused("evaluate", shop / "clip", "--mteb", "NoSuchTask")
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [MockAny2AnyRetrievalT2ITask()])
    (task,) = read("evaluate", shop / "clip", "--mteb", "any")["tasks"].values()
    assert 0 <= task["score"] <= 1
    assert task["metric"]


def test_bad_pairs_are_one_line(shop, tmp_path):
    words = ("evaluate", shop / "clip")
    assert "either pairs" in refused(*words)
    assert "nowhere.csv" in refused(*words, "nowhere.csv")
    said = refused(*words, shop / "pairs.parquet", "--caption-column", "captoins")
    assert "Did you mean `captions`?" in said


def test_bulk_embedding_makes_the_index_that_one_process_makes(shop, tmp_path):
    whole, bulk = tmp_path / "whole.index", tmp_path / "bulk.index"
    done("index", shop / "photos", whole, "--model", shop / "model")
    found = read("embed", shop / "photos", bulk, "--model", shop / "model")
    assert found["added"] == read("info", whole)["images"] == read("info", bulk)["images"]
    (one,), (other,) = (read("search", i, "a red square")["results"] for i in (whole, bulk))
    assert [hit["id"] for hit in one["hits"]] == [hit["id"] for hit in other["hits"]]
    scores = [hit["score"] for hit in other["hits"]]
    assert [hit["score"] for hit in one["hits"]] == pytest.approx(scores, abs=1e-5)
    assert read("embed", shop / "photos", bulk, "--model", shop / "model")["added"] == 0
    assert "must hold images" in refused("embed", tmp_path, bulk, "--model", shop / "model")


def test_an_alignment_needs_no_training(shop, tmp_path):
    tiny_rows(80).to_parquet(tmp_path / "many.parquet")
    output = tmp_path / "aligned"
    words = ("align", shop / "clip", tmp_path / "many.parquet", "--output", output)
    found = read(*words, "--test", shop / "pairs.parquet")
    assert (found["images"], found["dev_images"]) == (60, 20)
    assert found["rsum_before"] is not None
    model = PicoModel.from_pretrained(output)
    assert float(model.column_weights.std(correction=0)) == pytest.approx(found["weight_std"])
    for name, value in tiny_encoder().state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name]), name
    assert "must be a new or an empty folder" in refused(*words)
    assert read("info", output)["proposals"] == int(model.prototypes.iteration)


def test_few_pairs_align_without_feedback_and_a_failure_leaves_nothing(shop, tmp_path):
    output = tmp_path / "aligned"
    words = ("align", shop / "clip", shop / "pairs.parquet", "--output", output)
    assert "captoins" in refused(*words, "--caption-column", "captoins")
    assert not output.exists()
    assert read(*words)["dev_images"] == 0


def train_words(shop: Path, output: Path) -> tuple:
    return ("train", shop / "many.parquet", "--encoder", shop / "clip", "--output", output)


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    """A model that the command has trained, and what it answered."""
    tiny_rows(160).to_parquet(shop / "many.parquet")
    output = tmp_path_factory.mktemp("trained") / "out"
    short = ("--epochs", "1", "--batch-size", "16", "--probe_size", "16", "--use_cpu")
    return output, read(*train_words(shop, output), *short, "--num-prototypes=3")


def test_training_takes_files_a_held_out_tenth_and_any_option(trained):
    output, found = trained
    assert list(found["results"]["dev"]) == [
        "encoder, before training",
        "encoder",
        "base",
        "PICO",
    ]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= {
        path.name for path in output.iterdir()
    }
    facts = read("info", output)
    assert facts["proposals"] >= 1
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 9  # 144 of 160 images, 16 at a time


def test_a_run_shows_short_lines_and_keeps_its_whole_log(shop, trained, tmp_path):
    output, _ = trained
    short = ("--epochs", "1", "--batch-size", "16", "--probe_size", "16", "--use_cpu")
    shown = run(*train_words(shop, tmp_path / "out"), *short, "--num-prototypes=3").stderr
    lines = re.findall(r"epoch 1: .*", shown)
    assert re.search(r"rSum on the dev split \d+\.\d, encoder alone \d+\.\d", "\n".join(lines))
    assert "pico_weight_p10" not in shown
    assert "{'" not in shown
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert any(key.endswith("_iteration") for entry in history for key in entry)


def test_options_may_stand_in_a_file_and_the_command_line_comes_first(tmp_path):
    from pico_hf.cli.job_arguments import job_arguments

    options = {"output_dir": "there", "train_file": ["a.parquet"], "seed": 7, "warmup_steps": 9}
    (tmp_path / "job.yaml").write_text(json.dumps(options))
    words = [str(tmp_path / "job.yaml"), "--seed", "5", "--no_compare_base"]
    _, data, args = job_arguments(words, {"output_dir": str(tmp_path / "out")})
    assert (data.train_file, data.compare_base) == (["a.parquet"], False)
    assert (args.output_dir, args.seed, args.warmup_steps) == (str(tmp_path / "out"), 5, 9)


def test_what_training_cannot_use_is_said_before_anything_is_written(shop, trained, tmp_path):
    output = tmp_path / "out"
    words = train_words(shop, output)
    assert "no such option: --num_train_epoch" in refused(*words, "--num_train_epoch", 3, code=2)
    assert "Name what is to be trained" in refused("train", words[1], "--output", output)
    assert "by --output" in refused(*words[:4])
    assert "Did you mean `captions`?" in refused(*words, "--caption_column", "captoins")
    (tmp_path / "bad.yaml").write_text("- a\n- list\n")
    assert "must hold options" in refused("train", tmp_path / "bad.yaml", "--output", output)
    (tmp_path / "odd.yaml").write_text("sede: 3\noutput_dir: out\n")
    assert "sede" in refused("train", tmp_path / "odd.yaml", *words[2:])
    assert not output.exists()


def test_held_out_images_of_one_identity_stay_together():
    rows = tiny_rows(40).add_column("image_id", [str(n // 4) for n in range(40)])
    rest, apart = hold_out(rows, 0.2)
    assert (len(rest), len(apart)) == (32, 8)
    assert not set(rest["image_id"]) & set(apart["image_id"])
    assert hold_out(rows, 0.2)[1]["image_id"] == apart["image_id"]
    rest, apart = hold_out(rows, 0.1, at_least=10)
    assert (len(rest), len(apart)) == (28, 12)  # whole identities


def test_of_few_pairs_enough_are_held_out_to_measure_something(shop, tmp_path):
    from pico_hf.training.job_options import DataArguments
    from pico_hf.training.job_sources import load_job_splits

    for count in (19, 24):
        tiny_rows(count).to_parquet(tmp_path / f"{count}.parquet")
    train, dev = load_job_splits(DataArguments(train_file=[str(tmp_path / "24.parquet")]), 0)
    assert (len(train), len(dev["dev"])) == (14, 10)
    words = ("train", tmp_path / "19.parquet", "--encoder", shop / "clip", "--output", tmp_path)
    assert "at least 20 images" in refused(*words)


def test_a_name_that_is_no_folder_is_said_to_be_none(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for words in (("info", "mine"), ("search", "mine", "a dog"), ("explain", "mine", "a", "b")):
        line = refused(*words)
        assert "'mine'" in line
        assert "is no folder that is there" in line or "holds no index" in line


def test_facts_are_readable_and_each_stands_in_a_line_of_its_own(shop):
    shown = done("info", shop / "photos.index")
    assert re.search(r"bytes +[\d,]+\.\d MB", shown)
    assert max(map(len, shown.splitlines())) <= 120 + len(str(shop))


def test_a_push_takes_the_model_and_leaves_the_run(trained, tmp_path):
    from hub_client import run_client
    from hub_server import Hub

    output, _ = trained
    (output / "training_args.bin").write_bytes(b"with a token")
    hub = Hub()
    hub.tokens["writer"][1].add("me")
    script = (
        "import json, sys; import pico_hf_command\n"
        "try:\n    pico_hf_command.main(['push', sys.argv[1], 'me/shop', '--private'])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "from huggingface_hub import HfApi\n"
        "print(json.dumps(HfApi().list_repo_files('me/shop')))"
    )
    try:
        files = json.loads(run_client(hub, script, tmp_path, str(output)).splitlines()[-1])
    finally:
        hub.close()
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt"))]
    assert "trainer_state.json" not in files


def test_what_is_no_model_or_no_repository_is_not_pushed(shop):
    assert "holds no model" in refused("push", shop / "photos", "me/shop")
    assert "owner/name" in refused("push", shop / "model", "shop")
    assert "is no folder" in refused("push", shop / "nowhere", "me/shop")


def test_the_parts_of_an_explanation_are_a_table(shop, tmp_path):
    image = shop / "photos" / "0.png"
    words = ("explain", shop / "model", image, "a red disc", "--output", tmp_path / "why.png")
    shown = done(*words, "--columns", "3")
    assert "all patches" in shown
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
    assert "must end in one of" in refused(*words[:-1], tmp_path / "why.exe")


def test_filters_read_numbers_and_texts():
    assert search.parse_filters(["a=1", "a=x", "b=true"]) == {
        "a": ["1", 1, "x"],
        "b": ["true", True],
    }
