"""Two processes on one machine train one model, whatever parameters the loss does not reach."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from pathlib import Path
from tiny import tiny_rows
from tiny_trainer import BARE, tiny_model, tiny_trainer
knobs = json.loads({knobs!r})
options = {{"model": tiny_model(loss=knobs.pop("loss"))}}
if knobs.pop("stream", False):
    options["train_dataset"] = tiny_rows(24).to_iterable_dataset(num_shards=2)
trainer = tiny_trainer(
    Path({folder!r}), options, ddp_backend="gloo",
    per_device_train_batch_size=4, prototype_warmup_epochs=0.0, **knobs, **BARE,
)
before = trainer.model.encoder.text_projection.weight.detach().clone()
trainer.train()
weights = torch.cat([p.detach().flatten() for p in trainer.pico_model.parameters()])
both = weights.clone()
dist.all_reduce(both)
assert dist.get_world_size() == 2
assert trainer.state.global_step == 3
assert not torch.equal(before, trainer.model.encoder.text_projection.weight)
assert torch.equal(both / 2, weights)
print("trained alike")
dist.destroy_process_group()
"""


def two_processes(folder: Path, **knobs) -> subprocess.CompletedProcess:
    import json

    path = folder / "run.py"
    values = {"tests": str(TESTS), "folder": str(folder), "knobs": json.dumps(knobs)}
    path.write_text(SCRIPT.format(**values))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["hinge", "infonce"])
def test_two_processes_train_with_gradient_checkpointing(tmp_path, loss):
    result = two_processes(tmp_path, loss=loss, gradient_checkpointing=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("trained alike") == 2


@pytest.mark.slow
def test_two_processes_train_on_a_stream(tmp_path):
    result = two_processes(tmp_path, loss="hinge", stream=True, max_steps=3)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("trained alike") == 2


@pytest.mark.slow
def test_reentrant_checkpointing_in_two_processes_is_refused(tmp_path):
    knobs = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    result = two_processes(tmp_path, loss="hinge", gradient_checkpointing=True, **knobs)
    assert result.returncode != 0
    assert "`use_reentrant=True` does not go with several processes. Pass" in result.stderr
