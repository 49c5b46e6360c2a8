"""DeepSpeed's ZeRO stages 1 and 2 in fp32 train as one process does; all else of it is refused."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

import process_runs
from pico_hf.training.resumable import ResumableTrainer
from pico_hf.training.zero import check_deepspeed
from test_processes import TESTS, TOLERANCE, differences, start
from tiny_trainer import tiny_args, tiny_model, tiny_trainer

RUNS = ["zero1", "zero2", "zero_accumulated"]
FITTING = {"load_best_model_at_end": False, "save_only_model": True}
EXAMPLE = json.loads(process_runs.ZERO.read_text(encoding="utf-8"))
STAGE = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
# What `accelerate launch` writes by itself.
LAUNCHED = {
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "nvme_path": None},
        "offload_param": {"device": "none", "nvme_path": None},
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "gradient_clipping": 2.0,
    "steps_per_print": float("inf"),
    "fp16": {"enabled": False},
    "bf16": {"enabled": "auto"},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes ends with, by run."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp("zero")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        # DeepSpeed compiles what processes of one machine share, with the ninja beside python.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        ended = start(2, TESTS / "process_runs.py", str(folder), *RUNS)
    if "deepspeed cannot send parameters without dimensions" in ended.stderr:
        pytest.skip("this deepspeed cannot send parameters without dimensions")
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_parts_of_the_optimizer_end_with_the_weights_of_one(
    both, tmp_path, name
):
    every, one = both[name], process_runs.RUNS[name](tmp_path, 1)
    assert float(one["moved"]) > 100 * TOLERANCE
    assert float((every[0]["weights"] - one["weights"]).abs().max()) <= TOLERANCE
    assert len(one["metrics"]) > 10
    assert torch.equal(every[0]["metrics"], one["metrics"])
    torch.testing.assert_close(every[0]["losses"], one["losses"], rtol=0, atol=1e-4)
    shared = {key: every[0][key] for key in every[1] if key != "wrote"}
    assert any(key.startswith("buffer prototypes") for key in shared)
    assert differences(every[1], shared) == []
    assert int(every[0]["stage"]) == (1 if name == "zero1" else 2)
    assert float(every[0]["share"]) < 0.51


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_first_process_alone_writes_models_that_load_and_nothing_pickled(both, name):
    first, second = both[name]
    assert torch.equal(first["saved"], first["weights"])
    assert torch.equal(first["last"], first["weights"])
    assert int(first["wrote"]) > 10
    assert int(second["wrote"]) == int(first["pickled"]) == 0


def asked(folder, config, **knobs):
    """Arguments as `deepspeed=` leaves them, which without deepspeed cannot be made."""
    args = tiny_args(folder, **{**FITTING, **knobs})
    args.deepspeed = config
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    return args


@pytest.mark.parametrize("config", [EXAMPLE, STAGE, LAUNCHED], ids=["example", "stage", "launched"])
def test_what_was_run_is_refused_to_a_single_process_only(tmp_path, config):
    alone = "^A single process does not go with `deepspeed`. Start several ones"
    args = asked(tmp_path, config, max_grad_norm=2.0)
    with pytest.raises(ValueError, match=alone):
        check_deepspeed(args, tiny_model(), (None, None))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "`zero_optimization.stage` of `deepspeed` cannot be 3",
        ),
        ({"zero_optimization": {}}, "`zero_optimization.stage` of `deepspeed` cannot be 0"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "`zero_optimization.offload_optimizer` of `deepspeed` cannot be {'device': 'cpu'}",
        ),
        ({"bf16": {"enabled": True}}, "`bf16` of `deepspeed` cannot be {'enabled': True}"),
        ({"fp16": {"enabled": True}}, "`fp16` of `deepspeed` cannot be"),
        ({"optimizer": {"type": "AdamW"}}, "`optimizer` of `deepspeed` cannot be"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler` of `deepspeed` cannot be"),
        ({"gradient_clipping": 0.5}, "`gradient_clipping` of `deepspeed` is 0.5 and"),
        ({"gradient_clipping": 0.0}, "`gradient_clipping` of `deepspeed` is 0.0 and"),
    ],
)
def test_a_configuration_that_was_not_run_is_refused_by_its_key(tmp_path, change, named):
    args = asked(tmp_path, {**STAGE, **change}, max_grad_norm=2.0)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        tiny_trainer(tmp_path, {"args": args})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"save_only_model": False}, "`save_only_model=False`"),
        ({"load_best_model_at_end": True}, "`load_best_model_at_end=True`"),
        ({"bf16": True}, "`bf16` or `fp16`"),
        ({"projection_start": "closed_form"}, '`projection_start="closed_form"`'),
        ({"mini_batch_size": 2}, "`mini_batch_size`"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size`"),
        ({"lr_scheduler_type": "greedy"}, "An `lr_scheduler_type` that follows a metric"),
    ],
)
def test_an_argument_that_does_not_go_with_it_is_named(tmp_path, knobs, named):
    args = asked(tmp_path, STAGE, **knobs)
    with pytest.raises(
        ValueError, match=re.escape(f"{named} does not go with `deepspeed`")
    ) as error:
        tiny_trainer(tmp_path, {"args": args})
    assert "\n" not in str(error.value)


def test_an_optimizer_of_the_users_is_named(tmp_path):
    optimizers = torch.optim.SGD(tiny_model().parameters()), None
    with pytest.raises(ValueError, match="`optimizers` does not go with `deepspeed`"):
        tiny_trainer(tmp_path, {"args": asked(tmp_path, STAGE), "optimizers": optimizers})


def test_a_launcher_that_asks_for_it_is_heard(tmp_path, monkeypatch):
    args = tiny_args(tmp_path, **FITTING)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"set after the arguments were made \(`ACCELERATE_USE_"):
        check_deepspeed(args, None, (None, None))
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match=r"`zero_optimization\.stage` of `deepspeed` cannot be 3"):
        check_deepspeed(args, None, (None, None))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    check_deepspeed(args, None, (None, None))


def test_stage_3_is_refused_before_a_model_would_be_loaded_in_parts(tmp_path, monkeypatch):
    def stock(self):
        self.deepspeed_plugin = SimpleNamespace(zero_stage=3)

    monkeypatch.setattr(TrainingArguments, "__post_init__", stock)
    with pytest.raises(ValueError, match=r"`zero_optimization\.stage` of `deepspeed` cannot be 3"):
        tiny_args(tmp_path)


@pytest.fixture
def trainer(tmp_path):
    made = tiny_trainer(tmp_path)
    made.is_deepspeed_enabled = True
    return made


@pytest.mark.parametrize(
    ("given", "named"), [({"resume_from_checkpoint": True}, "resume"), ({"trial": {"a": 1}}, "tri")]
)
def test_neither_resuming_nor_a_trial_goes_with_it(trainer, given, named):
    with pytest.raises(ValueError, match=rf"`{named}\w+` does not go with `deepspeed`"):
        trainer.train(**given)


def test_a_trainer_trains_once_with_it(trainer):
    trainer.deepspeed = object()
    with pytest.raises(ValueError, match="With `deepspeed` a trainer trains once"):
        trainer.train()


def test_a_deepspeed_that_cannot_send_a_scalar_is_named(trainer, monkeypatch):
    def fails(*_):
        raise RuntimeError("self.dim() cannot be 0 to view Float as Byte")

    monkeypatch.setattr(ResumableTrainer, "_prepare_for_training", fails)
    with pytest.raises(ValueError, match=r"Install deepspeed==0\.19\.7"):
        trainer._prepare_for_training()
    trainer.is_deepspeed_enabled = False
    with pytest.raises(RuntimeError, match="Float as Byte"):
        trainer._prepare_for_training()


def test_an_untrained_model_is_saved_as_without_it(trainer, tmp_path):
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert trainer.is_deepspeed_enabled
