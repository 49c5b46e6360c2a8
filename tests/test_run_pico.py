"""The example script: options, errors before anything is written, and the whole job in small."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_pico
from pico_hf import recipe

SCRIPT = Path(run_pico.__file__)


def test_without_arguments_the_embedded_job_is_run():
    model, data, args = run_pico.parse_arguments([])
    assert (args.do_train, args.do_eval, args.freeze_encoder) == (True, True, True)
    assert data.train_file is None
    heads = recipe("new_heads")
    assert (model.loss, model.pooled_share) == (heads.model["loss"], heads.model["pooled_share"])
    assert args.projection_start == "closed_form"


def test_an_option_overrides_the_embedded_one():
    _, _, args = run_pico.parse_arguments(["--num_train_epochs", "1", "--seed=5"])
    assert (args.num_train_epochs, args.seed, args.do_train) == (1, 5, True)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_options_may_stand_in_a_file(kind, tmp_path):
    options = {"output_dir": str(tmp_path / "out"), "train_file": ["a.parquet"], "do_train": True}
    path = tmp_path / f"options.{kind}"
    path.write_text(json.dumps(options))  # JSON is YAML
    _, data, args = run_pico.parse_arguments([str(path)])
    assert data.train_file == ["a.parquet"]
    assert args.do_train
    assert not args.freeze_encoder


def test_an_adapter_is_not_trained_on_frozen_towers():
    model, _, args = run_pico.parse_arguments(["--use_lora", "--lora_r=4", "--lora_alpha=8"])
    assert not args.freeze_encoder
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (4, 8, 0.05)


def run(*options: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_missing_column_stops_the_script_in_one_line_and_writes_nothing(tmp_path):
    train = SCRIPT.parent / "data" / "emoji-styles" / "train.parquet"
    options = ["--train_file", str(train), "--validation_file", str(train), "--do_train"]
    result = run(*options, "--caption_column", "captoin", "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "Did you mean `caption`?" in last
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_job_in_small_leaves_a_model_a_page_and_plots(tmp_path):
    options = ["--max_train_samples=256", "--max_eval_samples=120", "--num_train_epochs=3"]
    result = run(*options, "--image_size=64", "--probe_size=64", "--output_dir=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "| unseen | PICO |" in result.stdout
    for name in (
        "config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "plots/spectrum.png",
        "plots/feedback.png",
    ):
        assert (tmp_path / "out" / name).exists(), name
    again = run(
        *options,
        "--image_size=64",
        "--probe_size=64",
        "--output_dir=out",
        "--resume_from_checkpoint=True",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr[-2000:]


@pytest.mark.slow
def test_the_job_with_lora_leaves_an_adapter_and_its_page(tmp_path):
    options = ["--max_train_samples=64", "--max_eval_samples=24", "--num_train_epochs=2"]
    options += ["--image_size=64", "--probe_size=16", "--per_device_train_batch_size=32"]
    result = run(*options, "--use_lora", "--compare_base=False", "--output_dir=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json"} <= names
    assert {"prototypes.safetensors", "README.md", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    assert "load_adapter_model" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    options = ["--max_train_samples=128", "--max_eval_samples=60", "--num_train_epochs=40"]
    options += ["--image_size=64", "--probe_size=64", "--output_dir=out", "--disable_tqdm=True"]
    options += ["--per_device_train_batch_size=32"]
    command = [sys.executable, str(SCRIPT), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        while process.poll() is None and not list(tmp_path.glob("out/checkpoint-*")):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].startswith("run_pico: stopped. Go on from the newest")
    assert "Traceback" not in said
    options[2] = "--num_train_epochs=3"
    again = run(*options, "--resume_from_checkpoint=True", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
