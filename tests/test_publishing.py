"""What a run publishes holds no secret, and is readable for whoever may read the folder."""

import json
import logging
import os
from pathlib import Path

import pytest

from hub_client import run_client
from hub_server import Hub
from pico_hf import PicoModel
from pico_hf.export import export_encoder
from tiny_trainer import BARE, tiny_args, tiny_model, tiny_trainer

SECRET = "hf_writerwriterwriter"
PUSHING = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
from pathlib import Path
from transformers import TrainerCallback
from tiny_trainer import tiny_trainer
import transformers
transformers.logging.set_verbosity_debug()
token = sys.argv[2]
trainer = tiny_trainer(
    Path("."), num_train_epochs=2, push_to_hub=True, hub_token=token, hub_model_id="org/secret",
    hub_strategy=sys.argv[1], hub_always_push=True, run_name=f"with {token}",
    save_total_limit=None,
)
class Wait(TrainerCallback):
    def on_epoch_begin(self, *args, **kwargs):
        trainer._finish_current_push()
trainer.add_callback(Wait())
trainer.train()
trainer.push_to_hub()
print(trainer.args, repr(trainer.args))
"""


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_no_uploaded_file_holds_the_token(tmp_path, strategy):
    hub = Hub()
    hub.tokens[SECRET] = ("alice", {"org", "alice"}, True)
    try:
        printed = run_client(hub, PUSHING, tmp_path, strategy, SECRET)
    finally:
        hub.close()
    repository = hub.repositories["org/secret"]
    assert len(repository.log) > 3
    everything: set[str] = set().union(*repository.commits.values())
    for files in repository.commits.values():
        for name, entry in files.items():
            assert SECRET.encode() not in entry.content, name
            assert not name.endswith("training_args.bin")
            assert not name.split("/")[-1].startswith("_")
    folders = {"every_save": set(), "checkpoint": {"last-checkpoint"}}
    expected = folders.get(strategy, {"checkpoint-3", "checkpoint-6"})
    assert {name.split("/")[0] for name in everything if "/" in name} - {"plots"} == expected
    for folder in expected:
        assert {f"{folder}/optimizer.pt", f"{folder}/pico_checkpoint.json"} <= everything
    arguments = json.loads(hub.files("org/secret")["training_args.json"])
    assert arguments["learning_rate"] == 1e-2
    assert arguments["output_dir"] == "run"
    assert arguments["run_name"] == "with [hidden]"
    assert not [name for name in arguments if "token" in name.split("_")]
    assert SECRET not in printed
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_arguments_are_shown_without_the_token(tmp_path, caplog):
    args = tiny_args(tmp_path, hub_token="abcdef-plain")
    with caplog.at_level(logging.INFO):
        logging.getLogger().info("%s %r", args, args)
    assert "learning_rate" in caplog.text
    assert "abcdef-plain" not in caplog.text


def test_a_token_that_looks_like_none_is_hidden_wherever_it_stands(tmp_path):
    knobs = {"hub_token": "plain-word", "run_name": "a plain-word b"}
    trainer = tiny_trainer(tmp_path, **knobs, **BARE)
    trainer.save_model()
    text = (tmp_path / "run" / "training_args.json").read_text()
    assert "plain-word" not in text
    assert json.loads(text)["run_name"] == "a [hidden] b"


def test_an_older_pickle_of_arguments_goes_when_a_model_is_saved(tmp_path):
    trainer = tiny_trainer(tmp_path, **BARE)
    old = Path(trainer.args.output_dir) / "training_args.bin"
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"token")
    trainer.save_model()
    assert not old.exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_saved_files_have_the_permissions_that_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        trainer = tiny_trainer(tmp_path, **{**BARE, "save_strategy": "epoch"})
        trainer.train()
        trainer.save_model()
        model = tiny_model()
        model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        model.prototypes.save_pretrained(tmp_path / "prototypes")
        export_encoder(model, tmp_path / "encoder")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "_run.lock"]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 6
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        path.name: mode for path in files
    }


def test_an_adapter_has_ordinary_permissions_too(tmp_path):
    peft = pytest.importorskip("peft")
    from pico_hf import pico_lora_config
    from pico_hf.lora import save_adapter

    model = tiny_model()
    save_adapter(peft.get_peft_model(model, pico_lora_config(model, r=2)), tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.safetensors")}
    assert modes == {(tmp_path / "config.json").stat().st_mode & 0o777}


def test_saving_prototypes_leaves_other_files_as_they_are(tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"")
    (tmp_path / "mine.safetensors").chmod(0o600)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "mine.safetensors").stat().st_mode & 0o777 == 0o600
    assert PicoModel.from_pretrained(tmp_path) is not None
