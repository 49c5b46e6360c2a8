"""What is written of an adapter is read back to equal scores, or it is not written."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import saved_files
from pico_hf import PicoModel, load_adapter_model, pico_lora_config, save_adapter
from saved_files import edit_json, edit_tensors, outcome
from tiny import refine_on_tiny_inputs, tiny_encoder, tiny_inputs

peft = pytest.importorskip("peft")

QV = ["q_proj", "v_proj"]
HEADS = ["encoder.visual_projection"]
CARRIED = ["prototypes", "pair_logits"]
OURS = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no init": {"init_lora_weights": False},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "mica": {"init_lora_weights": "mica"},
    "ranks by name": {"rank_pattern": {"q_proj": 4}},
    "ranks by pattern": {"rank_pattern": {r"layers\.0\..*": 3, "q_proj": 4}},
    "scales": {"alpha_pattern": {"q_proj": 32, "layers.1.mlp.fc1": 3}},
    # JSON sorts them: the first that matches would be another one.
    "order of scales": {"alpha_pattern": {"q_proj": 32, "layers.0.self_attn.q_proj": 64}},
    "order of ranks": {"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 3}},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 4}},
    "DoRA": {"use_dora": True},
    "biases of layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "biases of its own": {"lora_bias": True},
    "one layer": {"target_modules": QV, "layers_to_transform": 1},
    "layers": {"target_modules": QV, "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "a pattern": {"target_modules": r".*text_model.*\.(q|v)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "left out": {"target_modules": QV, "exclude_modules": r".*vision_model.*"},
    "embeddings": {"target_modules": ["token_embedding", "q_proj"]},
    "convolutions": {"target_modules": ["patch_embedding", "q_proj"]},
    "heads": {"modules_to_save": HEADS},
    "no heads": {"modules_to_save": []},
    "layer norms": {"modules_to_save": [*HEADS, "post_layernorm"]},
}
OWN = {
    "without prototypes": {},
    "with prototypes": {"modules_to_save": CARRIED},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pattern": {"target_modules": r".*\.q_proj"},
}


def base_encoder(folder) -> str:
    tiny_encoder().save_pretrained(folder / "base")
    return str(folder / "base")


def pico(path: str, refined: bool = True):
    model = PicoModel.from_pretrained(path, num_prototypes=3, probe_size=3)
    if refined:
        refine_on_tiny_inputs(model)
    return model


def trained(model):
    """Moves every weight that training would move."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**tiny_inputs()).logits_per_image


def check_round_trip(model, folder) -> None:
    save_adapter(model, folder)
    again = load_adapter_model(folder)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert torch.equal(again.get_base_model().column_weights, model.get_base_model().column_weights)
    merged = PicoModel.from_pretrained(folder)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    save_adapter(again, folder.parent / "again")  # what was read may be written
    torch.testing.assert_close(
        logits(load_adapter_model(folder.parent / "again")), logits(model), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", OURS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_our_adapters_are_read_back_to_equal_scores(name, tmp_path):
    model = pico(base_encoder(tmp_path))
    before = logits(model)
    model = peft.get_peft_model(model, pico_lora_config(model, r=2, **OURS[name]))
    trained(model)
    assert not torch.equal(logits(model), before)
    check_round_trip(model, tmp_path / "adapter")


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_adapters_of_ones_own_are_read_back_to_equal_scores(name, refined, tmp_path):
    config = peft.LoraConfig(**{"r": 2, "target_modules": QV, **OWN[name]})
    model = trained(peft.get_peft_model(pico(base_encoder(tmp_path), refined), config))
    check_round_trip(model, tmp_path / "adapter")


@pytest.mark.parametrize("encoder", ["siglip", "vit+bert", "blip", "align"])
def test_adapters_of_all_linear_layers_of_other_encoders_are_read_back(encoder, tmp_path):
    tiny_encoder(encoder).save_pretrained(tmp_path / "base")
    model = PicoModel.from_pretrained(tmp_path / "base", num_prototypes=3, probe_size=3)
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=CARRIED)
    model = trained(peft.get_peft_model(model, config))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter_model(tmp_path / "adapter")
    inputs = tiny_inputs(encoder=encoder)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("options", [{"init_lora_weights": "olora"}, {"rank_pattern": {"fc1": 3}}])
def test_what_a_run_saves_is_read_back(make_trainer, tmp_path, options, refine):
    model = pico(base_encoder(tmp_path), refined=False)
    model = peft.get_peft_model(model, pico_lora_config(model, r=2, **options))
    run = make_trainer(model=model, num_train_epochs=1, refine_prototypes=refine)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    torch.testing.assert_close(
        logits(load_adapter_model(tmp_path / "saved")), logits(run.model), rtol=0, atol=1e-6
    )


REFUSED = {
    "corda": ({"init_lora_weights": "corda"}, "`init_lora_weights`"),
    "pissa by chance": ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights`"),
    "new tokens": ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices`"),
    "one layer twice": ({"layer_replication": [[0, 2]]}, "`layer_replication`"),
    "parameters": ({"target_parameters": ["q_proj.weight"]}, "`target_parameters`"),
    "a task": ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`"),
    "another loader": ({"megatron_core": "antigravity"}, "`megatron_core`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_read_is_neither_trained_nor_written(name, make_trainer, tmp_path):
    options, message = REFUSED[name]
    model = pico(base_encoder(tmp_path))
    model = peft.get_peft_model(model, pico_lora_config(model, r=2))
    for field, value in options.items():  # most need data or layers that are not here
        setattr(model.peft_config["default"], field, value)
    with pytest.raises(ValueError, match=message):
        make_trainer(model=model)
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_other_kinds_and_several_adapters_are_neither_trained_nor_written(make_trainer, tmp_path):
    model = pico(base_encoder(tmp_path))
    other = peft.get_peft_model(
        model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="`peft_type` 'LORA'"):
        make_trainer(model=other, refine_prototypes=False)
    model = pico(base_encoder(tmp_path))
    named = peft.get_peft_model(model, pico_lora_config(model), adapter_name="mine")
    with pytest.raises(ValueError, match="the name 'default', got mine"):
        make_trainer(model=named)
    with pytest.raises(ValueError, match="the name 'default', got mine"):
        save_adapter(named, tmp_path / "adapter")


def test_a_run_is_refused_where_its_model_could_not_be_saved(make_trainer, tmp_path):
    plain = make_trainer(num_train_epochs=1)
    plain.save_model()
    model = pico(base_encoder(tmp_path))
    model = peft.get_peft_model(model, pico_lora_config(model, r=2))
    run = make_trainer(model=model)
    with pytest.raises(ValueError, match=r"holds a whole model \(model.safetensors\)"):
        run.train()


# ---- files of a stranger ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    model = pico(base_encoder(tmp_path))
    model = peft.get_peft_model(model, pico_lora_config(model, r=2))
    save_adapter(trained(model), tmp_path / "adapter")
    return tmp_path / "adapter"


def refusal(action) -> str:
    """As that of other files; it must come soon."""
    start = time.monotonic()
    message = saved_files.refusal(action)
    assert time.monotonic() - start < 20
    return message


EVIL = "(.*a|.*_|.*e)*!"
WRONG_TYPES = [None, 3, -1, 0.5, "x", [], {}, [1], {"a": [1]}, True, [[]], "é" * 5000]
FIELDS = [
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "use_dora",
    "use_rslora",
    "lora_bias",
    "fan_in_fan_out",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "trainable_token_indices",
    "target_parameters",
    "loftq_config",
    "use_qalora",
    "runtime_config",
    "megatron_config",
]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_any_type_is_read_or_refused_in_one_line(field, folder):
    file = folder / "adapter_config.json"
    whole = file.read_text()
    for value in WRONG_TYPES:
        edit_json(file, **{field: value})
        message = outcome(lambda: load_adapter_model(folder))
        assert "\n" not in message
        assert len(message) < 700
        file.write_text(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": EVIL},
        {"target_modules": [EVIL]},
        {"exclude_modules": EVIL},
        {"modules_to_save": [EVIL]},
        {"rank_pattern": {EVIL: 2}},
        {"alpha_pattern": {EVIL: 2}},
        {"layers_pattern": [EVIL], "layers_to_transform": [0]},
    ],
)
def test_patterns_of_a_stranger_are_not_matched(folder, changes):
    edit_json(folder / "adapter_config.json", **changes)
    assert "module names" in refusal(lambda: PicoModel.from_pretrained(folder))


def test_a_rank_that_no_matrix_has_is_never_allocated(folder):
    file = folder / "adapter_config.json"
    edit_json(file, r=10**9)
    assert "must have the rank 1000000000" in refusal(lambda: load_adapter_model(folder))
    names = json.loads(file.read_text())["target_modules"]
    edit_json(
        file, rank_pattern=dict.fromkeys(names, 2), target_modules=[*names, "token_embedding"]
    )
    assert "the file lacks" in refusal(lambda: load_adapter_model(folder))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_none_are_refused_by_name(folder, value):
    file = folder / "adapter_model.safetensors"
    name = next(name for name in load_file(file) if ".lora_B." in name)
    edit_tensors(file, **{name: load_file(file)[name].fill_(value)})
    assert f"`{name}` in adapter_model.safetensors" in refusal(lambda: load_adapter_model(folder))


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_probabilities_out_of_range_are_refused(folder, value):
    name = "base_model.model.prototypes.semantic_probability"
    edit_tensors(folder / "adapter_model.safetensors", **{name: torch.full((16,), value)})
    assert "must be in [0, 1]" in refusal(lambda: load_adapter_model(folder))


def test_prototypes_of_an_earlier_save_are_refused_naming_both_files(folder):
    edit_tensors(folder / "prototypes.safetensors", vision=torch.ones(3, 3))
    message = refusal(lambda: load_adapter_model(folder))
    assert "prototypes.safetensors" in message
    assert "adapter_model.safetensors" in message


def test_an_adapter_that_is_its_own_base_is_refused(folder):
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    assert "names itself as its base" in refusal(lambda: PicoModel.from_pretrained(folder))
    other = folder.parent / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(other))
    assert "names itself as its base" in refusal(lambda: PicoModel.from_pretrained(folder))


def test_a_live_model_stays_as_it_was_if_an_adapter_does_not_fit(folder):
    file = folder / "adapter_model.safetensors"
    lost = [name for name in load_file(file) if "layers.0.self_attn.q_proj" in name]
    rest = {name: value for name, value in load_file(file).items() if name not in lost}
    save_file(rest, file)
    edit_json(folder / "adapter_config.json", init_lora_weights="pissa")
    live = PicoModel.from_encoder(tiny_encoder(), num_prototypes=2, probe_size=4)
    before = {name: value.clone() for name, value in live.state_dict().items()}
    knobs = live.config.to_dict()
    assert "the file lacks" in refusal(lambda: load_adapter_model(folder, base=live))
    assert live.config.to_dict() == knobs
    assert live.state_dict().keys() == before.keys()
    for name, value in live.state_dict().items():
        assert torch.equal(value, before[name]), name
