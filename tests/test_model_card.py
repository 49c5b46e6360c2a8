"""Facts of a run become a page that holds them, and two plots."""

import re
from email.message import Message

import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from pico_hf.cards import model_card
from pico_hf.cards.model_card import METRICS, ModelFacts, write_model_card
from pico_hf.cards.plots import final_shares
from tiny import tiny_encoder, tiny_processor

RESULTS = {
    "seen": {
        "base": {name: 40.0 + i for i, name in enumerate(METRICS)},
        "PICO": {name: 50.0 + i for i, name in enumerate(METRICS)},
    }
}


def facts(**changes) -> ModelFacts:
    probability = torch.tensor([0.9, 0.3, 0.6])
    entry = {"pico_iteration": 1, "pico_feedback": -1.5, "pico_fused_weight": 1.0}
    values = {
        "name": "tiny",
        "results": RESULTS,
        "column_weights": probability / 0.6,
        "semantic_probability": probability,
        "iterations": [entry | {"pico_weight_std": 0.25}],
        "arguments": {"seed": 7},
        "command": "python examples/run_pico.py --seed 7",
    }
    return ModelFacts(**{**values, **changes})


def test_the_page_shows_base_beside_pico_with_the_command_that_made_them(tmp_path):
    text = write_model_card(tmp_path, facts()).read_text()
    assert "| seen | base | 40.0 |" in text
    assert "| seen | PICO | 50.0 |" in text
    assert "python examples/run_pico.py --seed 7" in text
    assert "| 1 | -1.50 | 1.000 | 0.250 |" in text
    assert "smallest 0.500, largest 1.500" in text


def test_the_page_names_the_commit_if_it_is_known(tmp_path):
    assert "at commit `abc123`" in write_model_card(tmp_path, facts(commit="abc123")).read_text()
    assert "commit" not in write_model_card(tmp_path, facts()).read_text()


def test_the_metadata_name_the_data_and_a_base_model_of_the_hub(tmp_path):
    known = facts(base_model="openai/clip", dataset="Emoji styles")
    data = ModelCard.load(write_model_card(tmp_path, known)).data
    assert (data.base_model, data.datasets) == ("openai/clip", ["emoji-styles"])
    assert (
        ModelCard.load(write_model_card(tmp_path, facts(base_model="clip"))).data.base_model is None
    )


def private() -> ModelFacts:
    """Facts with a path of the machine, or a secret, in every field that may hold one."""
    command = (
        "python examples/run_pico.py --train_file '/home/me/My Data (v1)/t.jsonl' "
        "--model_name_or_path=C:\\\\Users\\\\me\\\\clip --hub_token hf_abcdefgh1234 "
        "--data ~/me/x.csv --mirror https://me:secret@mirror.example/x"
    )
    return facts(
        name="/home/me/outputs/mine/",
        base_model="/home/me/models/clip",
        dataset="/home/me/My Data (v1)",
        command=command,
        arguments={"output_dir": "/home/me/out", "hub_token": "hf_abcdefgh1234", "seed": 7},
    )


def test_no_path_of_the_machine_and_no_secret_is_published(tmp_path):
    text = write_model_card(tmp_path, private()).read_text()
    for hidden in ("/home", "Users", "hf_abc", "secret", "~/", "me/"):
        assert hidden not in text, hidden
    for shown in ("# mine", "clip, trained on My Data (v1)", "t.jsonl", "x.csv", "`seed`: 7"):
        assert shown in text, shown


def test_a_data_set_whose_name_is_no_id_gets_one_that_the_hub_takes(tmp_path):
    data = ModelCard.load(write_model_card(tmp_path, private())).data
    assert data.datasets == ["my-data-v1"]
    validate_repo_id(data.datasets[0])
    assert data.base_model is None
    assert {result.dataset_name for result in data.eval_results} == {"My Data (v1) (seen)"}


def test_the_link_to_the_package_comes_from_its_metadata(tmp_path, monkeypatch):
    text = write_model_card(tmp_path, facts()).read_text()
    assert "with pico_hf: image-text retrieval" in text  # setup.cfg names no home page
    about = Message()
    about["Project-URL"] = "Homepage, https://example.org/pico"
    monkeypatch.setattr(model_card, "metadata", lambda name: about)
    text = write_model_card(tmp_path, facts()).read_text()
    assert "with [pico_hf](https://example.org/pico): image-text retrieval" in text


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


def test_both_plots_are_pictures(tmp_path):
    write_model_card(tmp_path, facts())
    for name in ("spectrum", "iterations"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as picture:
            assert picture.width > 400


def test_a_base_model_has_no_iterations_to_show(tmp_path):
    text = write_model_card(tmp_path, facts(iterations=[])).read_text()
    assert "iterations.png" not in text


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


def test_the_page_of_an_adapter_names_its_base_and_how_to_load_it(tmp_path):
    page = write_model_card(tmp_path, facts(adapter=True, base_model="org/clip"))
    data, text = ModelCard.load(page).data, page.read_text()
    assert (data.library_name, data.base_model) == ("peft", "org/clip")
    assert data.base_model_relation == "adapter"
    assert "lora" in data.tags
    assert "load_adapter_model(folder)" in text
    assert "model = PicoModel.from_pretrained(folder)\n" in text


def test_a_base_without_a_repository_is_asked_for(tmp_path):
    page = write_model_card(tmp_path, facts(adapter=True, base_model="Encoder of type clip"))
    assert ModelCard.load(page).data.base_model is None
    assert "PicoModel.from_pretrained(folder, base=base)" in page.read_text()
