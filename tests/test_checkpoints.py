"""Checkpoints are whole or not there, and one run at a time writes them."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import TrainerCallback

from pico_hf.training import checkpoints
from pico_hf.training.checkpoints import damage, newest_whole, prune, run_lock, tidy
from tiny_trainer import BARE, tiny_model, tiny_trainer

STEPS = {**BARE, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


@pytest.fixture
def trained(tmp_path):
    """A run of three steps with a checkpoint after each."""
    trainer = tiny_trainer(tmp_path, **STEPS)
    trainer.train()
    return trainer


def run_of(trainer) -> Path:
    return Path(trainer.args.output_dir)


def assert_same_weights(one, other):
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_a_checkpoint_lists_its_files_and_is_whole(trained):
    folder = run_of(trained) / "checkpoint-2"
    files = json.loads((folder / "pico_checkpoint.json").read_text())["files"]
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= files.keys()
    assert damage(folder) is None
    assert not list(run_of(trained).glob("_saving*"))


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_what_it_passed_over(
    trained, tmp_path, caplog
):
    run = run_of(trained)
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    weights = run / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (run / "checkpoint-70").mkdir()
    (run / "checkpoint-x").mkdir()
    again = tiny_trainer(tmp_path, **STEPS)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    (said,) = [r.message for r in caplog.records if "passed over" in r.message]
    assert said.startswith("Resuming from checkpoint-1; passed over checkpoint-70, which has no")
    assert "checkpoint-3, which lacks optimizer.pt" in said
    assert "of model.safetensors" in said
    assert "\n" not in said
    assert_same_weights(trained, again)


@pytest.mark.parametrize("text", ["True", "true"])
def test_true_from_a_shell_means_true(trained, tmp_path, text):
    again = tiny_trainer(tmp_path, **STEPS)
    shutil.rmtree(run_of(trained) / "checkpoint-3")
    assert again.train(resume_from_checkpoint=text).global_step == 3
    assert_same_weights(trained, again)


def test_false_from_a_shell_means_false(tmp_path):
    trainer = tiny_trainer(tmp_path, **BARE)
    assert trainer.train(resume_from_checkpoint="False").global_step == 3


def test_nothing_to_resume_from_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"has no whole checkpoint to resume from\. Leave `resume"):
        tiny_trainer(tmp_path, **BARE).train(resume_from_checkpoint=True)


def test_a_run_that_was_done_trains_no_further_step(tmp_path):
    knobs = {**STEPS, "max_steps": 4}  # in the middle of the second epoch
    done = tiny_trainer(tmp_path, **knobs)
    done.train()
    again = tiny_trainer(tmp_path, **knobs)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert_same_weights(done, again)


class FullDisk(TrainerCallback):
    """From a step on no file may grow beyond 20 kB."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))


@pytest.fixture
def disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_to_go_on(trained, tmp_path, disk):
    full = tiny_trainer(tmp_path / "full", {"callbacks": [FullDisk()]}, **STEPS)
    with pytest.raises(OSError, match="checkpoint-2 could not be saved in") as caught:
        full.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "checkpoint-1 is whole: go on from it with `resume_from_checkpoint=True`" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert [path.name for path in run_of(full).iterdir() if path.is_dir()] == ["checkpoint-1"]
    again = tiny_trainer(tmp_path / "full", **STEPS)
    again.train(resume_from_checkpoint=True)
    assert_same_weights(trained, again)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(OSError, match=r"`output_dir` '.*' cannot be written to \(Not a directory"),
        run_lock(tmp_path / "file" / "run"),
    ):
        pass


def test_a_read_only_folder_leaves_the_last_checkpoint(trained, tmp_path, monkeypatch):
    """Permissions do not hold back the administrator, so the refusal is made here."""
    run = run_of(trained)

    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    again = tiny_trainer(tmp_path, **STEPS)
    shutil.rmtree(run / "checkpoint-3")
    mkdir = Path.mkdir
    monkeypatch.setattr(
        Path, "mkdir", lambda s, *a, **k: refused(s) if s.name == "_saving" else mkdir(s, *a, **k)
    )
    with pytest.raises(OSError, match=r"checkpoint-3 could not be saved.*Permission denied"):
        again.train(resume_from_checkpoint=True)
    assert newest_whole(run).name == "checkpoint-2"


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_WAIT", 0.1)
    seen = []

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="Another run is writing to `output_dir`") as error:
                tiny_trainer(tmp_path, **BARE).train()
            seen.append(str(error.value))

    tiny_trainer(tmp_path, {"callbacks": [Second()]}, **BARE, max_steps=1).train()
    assert len(seen) == 1
    assert tiny_trainer(tmp_path, **BARE).train().global_step == 3  # the lock is free again


def test_the_lock_of_a_run_that_was_killed_does_not_hold(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; "
        "from pico_hf.training.checkpoints import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    started = time.monotonic()
    with run_lock(tmp_path):
        assert FileLock(tmp_path / "_run.lock").lock_file
    assert time.monotonic() - started < 2


def test_a_checkpoint_that_had_only_to_be_renamed_gets_its_name(trained, tmp_path):
    run = run_of(trained)
    (run / "_saving").mkdir()
    (run / "checkpoint-3").rename(run / "_saving" / "checkpoint-3")
    shutil.copytree(run / "checkpoint-1", run / "_removing-checkpoint-1")
    tidy(run)
    assert damage(run / "checkpoint-3") is None
    assert not list(run.glob("_saving*")) + list(run.glob("_removing*"))


def test_half_a_checkpoint_never_gets_a_name(trained):
    run = run_of(trained)
    (run / "_saving").mkdir()
    (run / "checkpoint-3").rename(run / "_saving" / "checkpoint-3")
    (run / "_saving" / "checkpoint-3" / "scheduler.pt").unlink()
    tidy(run)
    assert not (run / "checkpoint-3").exists()
    assert not (run / "_saving").exists()


def test_a_checkpoint_is_removed_by_its_name_first(trained, monkeypatch):
    run, seen = run_of(trained), []
    real = shutil.rmtree

    def watched(path, *args, **kwargs):
        seen.append(sorted(p.name for p in run.glob("checkpoint-*")))
        real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    prune(run, 1, run / "checkpoint-3")
    assert all("checkpoint-1" not in names for names in seen if "checkpoint-2" not in names)
    assert seen[-1] == ["checkpoint-3"]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3"]


def test_the_best_and_the_newest_checkpoint_stay(tmp_path):
    trainer = tiny_trainer(tmp_path, num_train_epochs=4, save_total_limit=1)
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(run_of(trainer) / best)
    assert [path.name for path in run_of(trainer).glob("checkpoint-*")] == [best]


def test_a_copied_run_goes_on_with_its_own_best_checkpoint(tmp_path):
    knobs = {"num_train_epochs": 3, "save_total_limit": None}
    trainer = tiny_trainer(tmp_path, **knobs)
    trainer.train()
    shutil.copytree(tmp_path, tmp_path / "copy")
    again = tiny_trainer(tmp_path / "copy", **knobs)
    again.train(resume_from_checkpoint=str(tmp_path / "copy" / "run" / "checkpoint-6"))
    assert str(again.state.best_model_checkpoint).startswith(str(tmp_path / "copy" / "run"))
    assert_same_weights(trainer, again)


# ---- SIGTERM and ^C ------------------------------------------------------------------------------


class Sigterm(TrainerCallback):
    """Sends SIGTERM to this process in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("step", [1, 2, 4])  # 2 is the last step of an epoch
@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_a_run_stopped_by_sigterm_goes_on_exactly(tmp_path, step, strategy, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(number, frame):
        raise Stopped

    def trainer(folder: str, *callbacks: TrainerCallback):
        options = {"model": tiny_model(estimators=["style"]), "callbacks": list(callbacks)}
        knobs = {"num_train_epochs": 3, "enable_jit_checkpoint": True, "save_total_limit": None}
        return tiny_trainer(tmp_path / folder, options, save_strategy=strategy, **knobs)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        unbroken = trainer("unbroken")
        unbroken.train()
        broken = trainer("broken", Sigterm(step))
        with pytest.raises(Stopped):
            broken.train()
        assert signal.getsignal(signal.SIGTERM) is stop
        resumed = trainer("broken")
        resumed.train(resume_from_checkpoint=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert_same_weights(unbroken, resumed)
    assert unbroken.state.best_metric == resumed.state.best_metric
