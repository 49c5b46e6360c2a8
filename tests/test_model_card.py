"""A model card shows the facts of a run, two plots and nothing private."""

import re
from email.message import Message
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from pico_hf.cards import model_card, plots, publishing
from pico_hf.cards.model_card import METRICS, ModelFacts, write_model_card
from pico_hf.cards.plots import final_shares
from pico_hf.cards.redaction import dataset_id, is_hub_id, public_command, public_name, public_value
from tiny import tiny_encoder, tiny_processor

RESULTS = {
    "seen": {
        "base": {name: 40.0 + i for i, name in enumerate(METRICS)},
        "PICO": {name: 50.0 + i for i, name in enumerate(METRICS)},
    }
}


def facts(**changes) -> ModelFacts:
    probability = torch.tensor([0.9, 0.3, 0.6])
    entry = {"source": "style", "iteration": 1, "feedback": -1.5, "fused_weight": 1.0}
    values = {
        "name": "tiny",
        "results": RESULTS,
        "column_weights": probability / 0.6,
        "semantic_probability": probability,
        "refinements": [entry | {"weight_std": 0.25, "pooled_share": 0.0}],
        "arguments": {"seed": 7},
        "command": "python examples/run_pico.py --seed 7",
    }
    return ModelFacts(**{**values, **changes})


def test_the_model_card_shows_base_beside_pico_with_the_command_that_made_them(tmp_path):
    text = write_model_card(tmp_path, facts()).read_text()
    assert "| seen | base | 40.0 |" in text
    assert "| seen | PICO | 50.0 |" in text
    assert "python examples/run_pico.py --seed 7" in text
    assert "| style | 1 | -1.50 | 1.000 | 0.250 | 0.00 |" in text
    assert "smallest 0.500, largest 1.500" in text


def test_the_model_card_names_the_commit_if_it_is_known(tmp_path):
    assert "at commit `abc123`" in write_model_card(tmp_path, facts(commit="abc123")).read_text()
    assert "commit" not in write_model_card(tmp_path, facts()).read_text()


def test_the_metadata_name_the_data_and_a_base_model_of_the_hub(tmp_path):
    known = facts(base_model="openai/clip", dataset="Emoji styles")
    data = ModelCard.load(write_model_card(tmp_path, known)).data
    assert (data.base_model, data.datasets) == ("openai/clip", ["emoji-styles"])
    assert (
        ModelCard.load(write_model_card(tmp_path, facts(base_model="clip"))).data.base_model is None
    )


def test_the_metadata_carry_the_metrics_of_the_published_model(tmp_path):
    data = ModelCard.load(write_model_card(tmp_path, facts())).data
    assert data.pipeline_tag == "zero-shot-image-classification"
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"i2t_r1": 50.0, "t2i_r1": 53.0, "rsum": 56.0}


def test_the_metadata_tell_splits_apart(tmp_path):
    both = {**RESULTS, "unseen": RESULTS["seen"]}
    data = ModelCard.load(write_model_card(tmp_path, facts(results=both))).data
    assert {result.dataset_split for result in data.eval_results} == {"seen", "unseen"}
    assert len(data.eval_results) == 6


def test_both_plots_are_images(tmp_path):
    write_model_card(tmp_path, facts())
    for name in ("spectrum", "feedback"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as image:
            assert image.width > 400


def test_a_base_model_has_no_proposals_to_show(tmp_path):
    text = write_model_card(tmp_path, facts(refinements=[])).read_text()
    assert "feedback.png" not in text


def test_the_usage_snippet_runs_as_written(tmp_path, monkeypatch, capsys):
    from pico_hf import PicoModel

    PicoModel.from_encoder(tiny_encoder("clip"), probe_size=4).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    text = write_model_card(tmp_path, facts()).read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_shares_add_up_to_one_and_follow_the_recursion():
    assert final_shares([1.0, 0.25, 0.5]) == [0.375, 0.125, 0.5]


def test_the_model_card_of_an_adapter_names_its_base_and_how_to_load_it(tmp_path):
    path = write_model_card(tmp_path, facts(adapter=True, base_model="org/clip"))
    data, text = ModelCard.load(path).data, path.read_text()
    assert (data.library_name, data.base_model) == ("peft", "org/clip")
    assert data.base_model_relation == "adapter"
    assert "lora" in data.tags
    assert "load_adapter_model(folder)" in text
    assert "model = PicoModel.from_pretrained(folder)\n" in text


def test_a_base_without_a_repository_is_asked_for(tmp_path):
    path = write_model_card(tmp_path, facts(adapter=True, base_model="Encoder of type clip"))
    assert ModelCard.load(path).data.base_model is None
    assert "PicoModel.from_pretrained(folder, base=base)" in path.read_text()


# ---- nothing private ----------------------------------------------------------------------

PRIVATE_PATHS = {
    "/home/jane/My models/clip": "clip",
    "/home/jane": None,
    "~/clip": "clip",
    "~": None,
    "../secret/clip": "clip",
    "./clip": "clip",
    "..": None,
    "secret/jane/clip": "clip",
    "jane/weights.safetensors": "weights.safetensors",
    "C:\\Users\\jane\\My models\\clip": "clip",
    "C:/Users/jane/clip": "clip",
    "C:\\Users\\jane": None,
    "\\\\server\\jane\\clip": "clip",
    "file:///home/jane/My models/clip": "clip",
    "https://jane:secret@host.org/clip?token=jane": "https://host.org/clip",
    "s3://jane-bucket/secret/clip": "clip",
}


@pytest.mark.parametrize("path", PRIVATE_PATHS)
def test_of_a_path_only_the_last_part_is_public(path):
    assert public_name(path) == PRIVATE_PATHS[path]
    assert not is_hub_id(path)


@pytest.mark.parametrize("name", ["org/clip", "clip", "Emoji styles", "text / image pairs"])
def test_names_that_are_no_paths_stay(name):
    assert public_name(name) == name


def test_an_existing_folder_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jane" / "clip").mkdir(parents=True)
    assert public_name("jane/clip") == "clip"
    assert not is_hub_id("jane/clip")


def private_facts(path: str) -> ModelFacts:
    """A path and secrets in every field that a model card shows."""
    split = {f"{path}/dev": RESULTS["seen"], "other/jane/dev": RESULTS["seen"]}
    return facts(
        name=path,
        results=split,
        base_model=path,
        dataset=f"{path} (v1)",
        commit=path,
        command=f"python '{path}/run.py' --train_file '{path}' --hub_token swordfish",
        arguments={
            "output_dir": path,
            "files": [path, {"cache": path}],
            "hub_token": "swordfish",
            "note": "password=swordfish",
            "seed": 7,
        },
    )


@pytest.mark.parametrize("path", PRIVATE_PATHS)
def test_no_field_brings_a_path_or_a_secret_into_a_model_card(tmp_path, path):
    text = write_model_card(tmp_path, private_facts(path)).read_text()
    for private in ("jane", "secret", "swordfish", "My models", "server"):
        assert private not in text, [line for line in text.splitlines() if private in line]
    assert "- `seed`: 7" in text
    assert "hub_token`" not in text


def test_splits_that_are_files_of_one_name_stay_apart(tmp_path):
    text = write_model_card(tmp_path, private_facts("/home/jane/clip")).read_text()
    assert "| dev | PICO |" in text
    assert "| dev (2) | PICO |" in text


def test_a_command_shows_the_names_of_files_and_keeps_the_rest():
    command = (
        "python examples/run_pico.py --model_name_or_path openai/clip --train_file "
        "'/home/jane/My Data (v1)/t.jsonl' other/jane/u.jsonl --output_dir=out/jane/run "
        "--learning_rate 2e-3 --do_train --hub_token abc --seed 7"
    )
    assert public_command(command) == (
        "python examples/run_pico.py --model_name_or_path openai/clip --train_file "
        "t.jsonl u.jsonl --output_dir=run "
        "--learning_rate 2e-3 --do_train --hub_token '[hidden]' --seed 7"
    )


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("python C:\\Users\\jane\\run.py", "python run.py"),
        ("/home/jane/bin/python /home/jane/run.py", "python run.py"),
        ("python run.py /home/jane/My\\ Data/config.yaml", "python run.py config.yaml"),
        ("python run.py -o/home/jane/out", "python run.py -oout"),
        ("python run.py --password=abc", "python run.py --password='[hidden]'"),
        ("python run.py \\\n  --seed 7", "python run.py --seed 7"),
        ("python run.py --output_dir jane/run", "python run.py --output_dir run"),
        ("python run.py --max_tokens 5", "python run.py --max_tokens 5"),
        ("python run.py --train_file '/home/jane/t.jsonl", ""),  # the quote has no end
    ],
)
def test_commands_of_every_form_show_no_folder_and_no_secret(command, shown):
    assert public_command(command) == shown


def test_secrets_are_hidden_by_the_name_of_the_argument_and_by_their_form():
    assert public_value("hub_token", "abc") == "[hidden]"
    assert public_value("hub_token", None) is None
    assert public_value("options", {"api_key": "abc", "seed": 1}) == {
        "api_key": "[hidden]",
        "seed": 1,
    }
    assert public_value("note", "with hf_abcdefghijklmnopqrst") == "with [hidden]"
    assert public_value("note", '{"hub_token": "abc"}') == '{"hub_token": "[hidden]"}'
    assert public_value("tokenizer_name", "org/bert") == "org/bert"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("My Data (v1)", "my-data-v1"),
        ("org/Pairs", "org/Pairs"),
        ("a--b..c", "a-b.c"),
        ("x" * 200, "x" * 96),
        ("data.git", "data"),
        ("图像", None),
    ],
)
def test_a_data_set_is_named_in_the_metadata_only_by_an_id_that_the_hub_takes(
    tmp_path, name, known
):
    assert dataset_id(name) == known
    validate_repo_id(known)
    path = write_model_card(tmp_path, facts(dataset=name))
    data = ModelCard.load(path).data
    assert data.datasets == ([known] if known else None)
    assert {result.dataset_type for result in data.eval_results} == {known or "custom"}
    assert f"trained on {name} with" in path.read_text()


def test_what_a_user_adds_to_the_metadata_shows_no_path(tmp_path, make_trainer):
    trainer = make_trainer()
    trainer.create_model_card(
        model_name="/home/jane/best", tags=["/home/jane/cats"], license="mit", language=["en", "~"]
    )
    text = (tmp_path / "run" / "README.md").read_text()
    data = ModelCard(text).data
    assert "jane" not in text
    assert "cats" in data.tags
    assert (data.license, data.language, data.model_name) == ("mit", ["en"], "best")


def test_an_encoder_from_a_folder_of_windows_is_described_by_its_type():
    config = SimpleNamespace(_name_or_path="C:\\Users\\jane\\clip", model_type="clip")
    model = SimpleNamespace(encoder=SimpleNamespace(config=config))
    assert publishing._origin(model) == "Encoder of type clip"
    config._name_or_path = "openai/clip"
    assert publishing._origin(model) == "openai/clip"


# ---- the link to the package --------------------------------------------------------------


def package(**headers):
    """Metadata of a package with these headers."""
    message = Message()
    for name, values in headers.items():
        for value in values:
            message[name.replace("_", "-")] = value
    return lambda name: message


@pytest.mark.parametrize(
    ("headers", "shown"),
    [
        ({}, "with pico_hf:"),
        ({"Home_page": ["UNKNOWN"]}, "with pico_hf:"),
        ({"Home_page": ["https://pico.org"]}, "with [pico_hf](https://pico.org):"),
        (
            {"Project_URL": ["Changelog, https://pico.org/log", "Homepage, https://pico.org"]},
            "with [pico_hf](https://pico.org):",
        ),
        ({"Project_URL": ["Changelog, https://pico.org/log"]}, "with pico_hf:"),
    ],
)
def test_the_package_is_linked_only_as_its_metadata_say(tmp_path, monkeypatch, headers, shown):
    monkeypatch.setattr(model_card, "metadata", package(**headers))
    text = write_model_card(tmp_path, facts()).read_text()
    assert shown in text
    assert "://" not in text.replace("https://pico.org", "")


def test_a_package_that_is_not_installed_has_no_link(tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(model_card, "metadata", missing)
    assert "with pico_hf:" in write_model_card(tmp_path, facts()).read_text()


# ---- what each source brought ---------------------------------------------------------------


def test_every_source_of_proposals_has_a_panel_and_its_rows(tmp_path, monkeypatch):
    drawn = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda f, path: drawn.append(f) or save(f, path))
    rest = {"fused_weight": 0.5, "weight_std": 0.1, "pooled_share": 0.2}
    found = [
        {"source": source, "iteration": number, "feedback": 1.0, **rest}
        for source in ("style", "canonical")
        for number in (1, 2)
    ]
    text = write_model_card(tmp_path, facts(refinements=found)).read_text()
    assert "| canonical | 2 | +1.00 | 0.500 | 0.100 | 0.20 |" in text
    assert "![Final weight and gain of every proposal, by source](plots/feedback.png)" in text
    labels = {axes.get_xlabel() for axes in drawn[-1].axes if axes.get_xlabel()}
    assert labels == {"style proposal", "canonical proposal"}
