"""Two processes with a part of the parameters each (FSDP 2) train as one process does."""

import re

import pytest
import torch
from accelerate.state import AcceleratorState

import process_runs
from pico_hf.training.sharding import layer_classes, with_names
from test_processes import TESTS, TOLERANCE, differences, start
from tiny_encoders import BUILDERS
from tiny_trainer import tiny_model, tiny_trainer


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes ends with, by run."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = ["sharded", "sharded_and_resumed"]
    ended = start(2, TESTS / "process_runs.py", str(folder), *runs)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in runs}


@pytest.mark.slow
def test_processes_with_parts_of_the_parameters_end_with_the_weights_of_one(both, tmp_path):
    every, one = both["sharded"], process_runs.sharded(tmp_path, 1)
    assert float(one["moved"]) > 100 * TOLERANCE
    assert float((every[0]["weights"] - one["weights"]).abs().max()) <= TOLERANCE
    assert len(one["metrics"]) > 10
    assert torch.equal(every[0]["metrics"], one["metrics"])
    assert differences(every[1], every[0]) == []


@pytest.mark.slow
def test_a_checkpoint_of_parts_is_resumed_exactly_and_loads_as_a_whole_model(both):
    result = both["sharded_and_resumed"][0]
    assert float(result["moved"]) > 100 * TOLERANCE
    assert torch.equal(result["resumed"], result["weights"])
    assert torch.equal(result["saved"], result["weights"])


def test_fsdp_is_refused_where_accelerate_would_ignore_it(tmp_path):
    message = "`fsdp` has no effect with 1 process(es) on cpu: accelerate spreads parameters over"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tiny_trainer(tmp_path, fsdp=True)
    assert "\n" not in str(error.value)
    tiny_trainer(tmp_path)  # later runs of this process go on as they are


def test_fsdp_of_a_launcher_is_refused_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="`fsdp` has no effect with 1 process"):
        tiny_trainer(tmp_path)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, "`state_dict_type` other"),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}}, "`cpu_ram_efficient_loading`"),
        ({"fsdp_config": {"activation_checkpointing": True}}, "`activation_checkpointing` of"),
        ({"mini_batch_size": 2}, "`mini_batch_size`"),
    ],
)
def test_what_does_not_go_with_fsdp_is_named(tmp_path, monkeypatch, knobs, named):
    monkeypatch.setattr(AcceleratorState, "__init__", AcceleratorState.__init__)  # put back
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    process_runs.shard_on_a_cpu()
    with pytest.raises(ValueError, match=re.escape(named) + ".* does not go with `fsdp`"):
        tiny_trainer(tmp_path, fsdp=True, **knobs)


@pytest.mark.parametrize("name", ["clip", "siglip", "vit+bert", "clip-vision+bert", "swin+bert"])
def test_parts_are_layers_of_the_towers_and_hold_no_projection(name):
    from pico_hf import PicoModel

    model = PicoModel.from_encoder(BUILDERS[name](), num_prototypes=3, probe_size=8)
    chosen = layer_classes(model)
    found = [module for module in model.modules() if type(module).__name__ in chosen]
    assert len(found) >= 2
    words = model.get_input_embeddings()
    assert all(words not in module.modules() for module in found)
    assert "SiglipMultiheadAttentionPoolingHead" not in chosen


def test_the_state_of_an_optimizer_goes_by_names():
    model = tiny_model()
    weights = [p for p in model.parameters() if p.requires_grad][:3]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    named = with_names(optimizer.state_dict(), model, optimizer)
    first = dict(model.named_parameters())[named["param_groups"][0]["params"][0]]
    assert first is weights[0]
    assert with_names(named, model, optimizer) == named
    optimizer.load_state_dict(named)  # a run without FSDP goes on from it
    assert torch.equal(
        optimizer.state[weights[0]]["exp_avg"],
        named["state"][named["param_groups"][0]["params"][0]]["exp_avg"],
    )
