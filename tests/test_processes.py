"""Several processes on one machine train one model as one process with the whole batch would."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from process_runs import RUNS
from tiny_encoders import BUILDERS

TESTS = Path(__file__).parent
TOLERANCE = 1e-5  # largest difference of a weight after 20 steps
# What is trained by how many processes; each starts once and goes through all of its runs.
TRAINED_BY = {
    2: ["infonce", "hinge", "sigmoid", "lora", "frozen", "checkpointed", "mini_batches", "resumed"],
    3: ["infonce", "hinge", "sigmoid", "identities", "refined", "aligned", "batch_norm"],
}
EXACT = [
    (n, name)
    for n, names in TRAINED_BY.items()
    for name in names
    if name not in ("batch_norm", "resumed")
]
SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
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
import torch, torch.distributed as dist
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


def start(
    processes: int, script: Path, *args: str, minutes: float = 5
) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [sys.executable, *launcher, str(script), *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 * minutes,
    )


def two_processes(folder: Path, **knobs) -> subprocess.CompletedProcess:
    path = folder / "run.py"
    values = {"tests": str(TESTS), "folder": str(folder), "knobs": json.dumps(knobs)}
    path.write_text(SCRIPT.format(**values))
    return start(2, path)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of a run: those of every process, and that of one process alone."""
    together, alone = {}, {}

    def of(processes: int, name: str):
        if processes not in together:
            folder = tmp_path_factory.mktemp(f"{processes}-processes")
            runs = TRAINED_BY[processes]
            ended = start(processes, TESTS / "process_runs.py", str(folder), *runs)
            assert ended.returncode == 0, ended.stderr[-3000:]
            together[processes] = {
                run: [torch.load(folder / f"{run}-{rank}.pt") for rank in range(processes)]
                for run in runs
            }
        if name not in alone:
            alone[name] = RUNS[name](tmp_path_factory.mktemp(name), 1)
        return together[processes][name], alone[name]

    return of


def differences(ours, theirs) -> list[str]:
    keys = theirs.keys() - {"wrote"}
    return [key for key in keys if not torch.equal(ours[key], theirs[key])]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), EXACT)
def test_several_processes_end_with_the_weights_of_one(results, processes, name):
    every, one = results(processes, name)
    assert float(one["moved"]) > 100 * TOLERANCE
    assert float((every[0]["weights"] - one["weights"]).abs().max()) <= TOLERANCE
    torch.testing.assert_close(every[0]["losses"], one["losses"], rtol=3e-4, atol=1e-4)
    torch.testing.assert_close(every[0]["parts"], one["parts"], rtol=3e-4, atol=1e-4)


@pytest.mark.slow
def test_processes_go_on_exactly_from_the_middle_of_an_epoch_with_a_ragged_end(results):
    every, one = results(2, "resumed")
    assert torch.equal(one["resumed"], one["weights"])
    assert torch.equal(every[0]["resumed"], every[0]["weights"])
    assert float(every[0]["moved"]) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_BY[3])
def test_processes_are_equal_to_the_bit(results, name):
    first, *others = results(3, name)[0]
    assert [differences(other, first) for other in others] == [[], []]
    assert any(key.startswith("buffer") for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["refined", "aligned"])
def test_an_evaluation_by_several_processes_is_exact(results, name):
    every, one = results(3, name)
    assert len(one["metrics"]) > 10
    assert torch.equal(every[0]["metrics"], one["metrics"])
    weights = "buffer prototypes.semantic_probability"
    assert float(one[weights].std()) > 0
    torch.testing.assert_close(every[0][weights], one[weights], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_processes_move_their_batch_statistics_together(results):
    every, _ = results(3, "batch_norm")
    moving = [key for key in every[0] if key.endswith(("running_mean", "running_var"))]
    assert moving
    assert float(every[0][moving[0]].std()) > 0
    assert len(every[0]["metrics"]) > 0


@pytest.mark.slow
def test_only_the_first_process_writes(results):
    """But for the state of their random generators, which a resumed run needs."""
    every, _ = results(3, "batch_norm")
    assert [bool(result["wrote"]) for result in every] == [True, False, False]


@pytest.mark.slow
def test_two_processes_train_with_gradient_checkpointing(tmp_path):
    result = two_processes(tmp_path, loss="hinge", gradient_checkpointing=True)
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


# ---- every architecture ------------------------------------------------------------------------


def unlike(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """What differs between two processes that train an architecture, by its name."""
    runs = [f"encoder:{name}" for name in names]
    ended = start(2, TESTS / "process_runs.py", str(folder), *runs, minutes=20)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = {}
    for name, run in zip(names, runs, strict=True):
        first, second = (torch.load(folder / f"{run}-{rank}.pt") for rank in range(2))
        assert float(first["moved"]) > 0, name
        found[name] = [*differences(second, first), *({*second} ^ {*first})]
    return found


@pytest.mark.slow
def test_prototypes_and_columns_of_some_architectures_are_equal_to_the_bit(tmp_path):
    assert unlike(tmp_path, ["siglip2", "align", "vit+bert"]) == {
        "siglip2": [],
        "align": [],
        "vit+bert": [],
    }


@pytest.mark.exhaustive
def test_prototypes_and_columns_of_all_architectures_are_equal_to_the_bit(tmp_path):
    found = unlike(tmp_path, list(BUILDERS))
    assert {name: keys for name, keys in found.items() if keys} == {}


if __name__ == "__main__":  # the table of all architectures
    with TemporaryDirectory() as folder:
        for name, keys in unlike(Path(folder), list(BUILDERS)).items():
            print(f"{name:28} {'equal to the bit' if not keys else ', '.join(sorted(keys))}")
