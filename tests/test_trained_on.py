"""A model that is trained on keeps what it was saved with, unless another choice is made."""

import json
import sys

import pytest
import torch

import run_pico
from pico_hf import PicoModel, PicoTrainer
from pico_hf.training.job_options import KNOBS
from tiny import tiny_encoder, tiny_processor, tiny_refined, tiny_rows
from tiny_trainer import tiny_args, tiny_trainer


@pytest.mark.parametrize("estimators", [["canonical"], ["style"]])
def test_columns_are_kept_when_a_model_is_trained_on_without_a_dev_split(
    tmp_path, caplog, estimators
):
    model = tiny_refined(estimators=estimators)
    before = {name: value.clone() for name, value in model.prototypes.state_dict().items()}
    options = {"model": model, "eval_dataset": None, "train_dataset": tiny_rows(24)}
    trainer = tiny_trainer(tmp_path, options)
    trainer.train()
    assert float(model.column_weights.std()) > 0
    for name, value in before.items():
        assert torch.equal(model.prototypes.state_dict()[name], value), name
    if "canonical" in estimators:
        assert "the columns and weights that the model came with stay as they are" in caplog.text


@pytest.mark.parametrize("estimators", [["canonical"], ["style"]])
def test_building_and_evaluating_a_trainer_leaves_columns_as_they_are(tmp_path, estimators):
    model = tiny_refined(estimators=estimators, probe_size=3)
    before = model.column_weights.clone()
    options = {"model": model, "train_dataset": tiny_rows(2)}
    tiny_trainer(tmp_path, options, per_device_train_batch_size=2).evaluate()
    assert torch.equal(model.column_weights, before)


def test_with_a_dev_split_columns_are_built_anew(tmp_path):
    model = tiny_refined()
    before = model.column_weights.clone()
    trainer = tiny_trainer(tmp_path, {"model": model})
    trainer.train()
    assert int(model.prototypes.iteration) >= 18
    assert not torch.equal(model.column_weights, before)


def test_a_run_that_resumes_without_a_dev_split_keeps_its_columns(tmp_path):
    def build(folder):
        options = {"model": tiny_refined(estimators=["style"]), "eval_dataset": None}
        return tiny_trainer(tmp_path / folder, options, save_strategy="steps", save_steps=2)

    unbroken, resumed = build("one"), build("two")
    unbroken.train()
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-2")
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


# ---- the example script -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a tiny encoder, and image files named by two tables."""
    monkeypatch.chdir(tmp_path)
    tiny_encoder().save_pretrained("clip")
    tiny_processor().save_pretrained("clip")
    for name, count in (("train", 24), ("dev", 12)):
        lines = []
        for number, row in enumerate(tiny_rows(count)):
            row["image"].save(f"{name}{number}.png")
            lines.append(json.dumps({"image": f"{name}{number}.png", "captions": row["captions"]}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(monkeypatch, **options) -> None:
    """Runs the script with options in a file, as a command line would give them."""
    common = {
        "train_file": ["train.jsonl"],
        "validation_file": ["dev.jsonl"],
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "compare_base": False,
    }
    with open("options.json", "w") as file:
        json.dump({**common, **options}, file)
    monkeypatch.setattr(sys, "argv", ["run_pico.py", "options.json"])
    run_pico.main()


def test_a_saved_model_is_trained_on_with_what_it_was_saved_with(folder, monkeypatch):
    chosen = {
        "loss": "infonce",
        "column_dropout": 0.3,
        "num_prototypes": 4,
        "probe_size": 20,
        "margin": 0.1,
        "estimators": ["style"],
        "feedback_temperature": 3.0,
    }
    run(monkeypatch, model_name_or_path="clip", do_train=True, output_dir="first", **chosen)
    run(monkeypatch, model_name_or_path="first", do_train=True, output_dir="second")
    run(monkeypatch, model_name_or_path="second", do_train=True, output_dir="third", margin=0.2)
    for name, expected in (
        ("first", chosen),
        ("second", chosen),
        ("third", {**chosen, "margin": 0.2}),
    ):
        config = json.loads((folder / name / "config.json").read_text())
        assert {key: config[key] for key in expected} == expected


def test_a_saved_model_is_evaluated_as_it_is(folder, monkeypatch):
    run(monkeypatch, model_name_or_path="clip", do_train=True, output_dir="first")
    run(monkeypatch, model_name_or_path="first", do_eval=True, output_dir="second")
    model = PicoModel.from_pretrained("first")
    args = tiny_args(folder)
    trainer = PicoTrainer(
        model, args, eval_dataset=tiny_rows(12), processing_class=tiny_processor()
    )
    metrics = json.loads((folder / "second" / "eval_results.json").read_text())
    assert metrics["eval_dev_rsum"] == trainer.evaluate()["eval_rsum"]


@pytest.mark.parametrize("source", ["file", "line"])
def test_options_that_are_not_given_are_none(tmp_path, source):
    given = {"output_dir": "out", "train_file": ["a.parquet"], "column_dropout": 0.1}
    if source == "file":
        (tmp_path / "o.yaml").write_text(json.dumps(given))
        argv = [str(tmp_path / "o.yaml")]
    else:
        argv = ["--output_dir=out", "--train_file", "a.parquet", "--column_dropout=0.1"]
    model, _, _ = run_pico.parse_arguments(argv)
    values = {name: getattr(model, name) for name in KNOBS}
    assert values.pop("column_dropout") == 0.1
    assert set(values.values()) == {None}


def test_a_named_model_on_the_embedded_data_keeps_its_own_knobs():
    model, _, args = run_pico.parse_arguments(["--model_name_or_path=mine", "--do_eval"])
    assert {getattr(model, name) for name in KNOBS} == {None}
    assert (args.do_train, args.do_eval) == (False, True)


def test_every_knob_of_the_configuration_is_an_option():
    from pico_hf.configuration_pico import own_fields

    assert set(KNOBS) - {"pooled_share"} == set(own_fields()) - {
        "encoder_config",
        "fallback_widths",
    }
