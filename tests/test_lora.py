"""LoRA: every adapter weight is trained, and nothing is lost by saving, resuming or merging."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from pico_hf import PicoModel, load_adapter_model, pico_lora_config, save_adapter
from pico_hf.training.feedback import Feedback
from tiny import tiny_encoder, tiny_inputs
from tiny_encoders import BUILDERS

peft = pytest.importorskip("peft")
ALL = pytest.mark.parametrize("name", list(BUILDERS))


def adapted(name: str = "clip", **options):
    """A tiny adapter whose matrices are not zero, on uneven prototypes."""
    torch.manual_seed(0)
    model = PicoModel.from_encoder(
        tiny_encoder(name), num_prototypes=3, probe_size=3, pooled_share=0.0
    )
    model.prototypes.semantic_probability.copy_(
        torch.linspace(0.2, 1.0, model.column_weights.numel())
    )
    config = pico_lora_config(model, r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@ALL
def test_every_adapter_parameter_gets_a_gradient_in_one_step(name):
    model = adapted(name).train()
    loss = model(**tiny_inputs(encoder=name)).logits_per_image.square().mean()
    loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    assert trained
    assert not [n for n, gradient in trained.items() if gradient is None]
    assert not [n for n, gradient in trained.items() if not gradient.any()]


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def active_prototypes(model) -> dict[str, torch.Tensor]:
    return state_of(model.get_base_model().prototypes.modules_to_save["default"])


@torch.no_grad()
def logits(model, name: str = "clip") -> torch.Tensor:
    return model.eval()(**tiny_inputs(encoder=name)).logits_per_image


@pytest.fixture
def base(tmp_path):
    """A saved plain encoder, as a base on the Hub is."""

    def save(name: str = "clip") -> str:
        tiny_encoder(name).save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return save


@ALL
def test_a_saved_adapter_scores_as_before_and_merges(name, base, tmp_path):
    model = adapted(name)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter_model(tmp_path / "adapter", base=base(name))
    model.requires_grad_(False)  # torch multiplies some shapes otherwise where a weight needs grad
    assert torch.equal(logits(model, name), logits(again, name))
    assert_same_state(active_prototypes(model), active_prototypes(again))
    merged = PicoModel.from_pretrained(tmp_path / "adapter", base=base(name))
    assert not [n for n, _ in merged.named_parameters() if "lora" in n or "modules_to_save" in n]
    torch.testing.assert_close(logits(merged, name), logits(model, name), rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.column_weights, model.get_base_model().column_weights)
    merged.save_pretrained(tmp_path / "merged")
    saved = PicoModel.from_pretrained(tmp_path / "merged")
    assert_same_state(state_of(merged), state_of(saved))
    assert torch.equal(logits(merged, name), logits(saved, name))
    assert all(parameter.requires_grad for parameter in saved.parameters())


def make_lora_trainer(make_trainer, **knobs):
    """A trainer whose model is adapted just as `make_trainer` would have trained it whole."""
    from pico_hf import PicoTrainer

    plain = make_trainer(**knobs)
    torch.manual_seed(1)
    model = peft.get_peft_model(plain.model, pico_lora_config(plain.model, r=2))
    return PicoTrainer(
        model,
        plain.args,
        train_dataset=plain.train_dataset,
        eval_dataset=plain.eval_dataset,
        processing_class=plain.processing_class,
    )


@pytest.mark.parametrize("encoder", ["clip", "vit+bert", "align"])
def test_a_resumed_run_equals_the_unbroken_one(make_trainer, encoder):
    unbroken, resumed = (
        make_lora_trainer(make_trainer, encoder=encoder, load_best_model_at_end=False)
        for _ in range(2)
    )
    for trainer in (unbroken, resumed):  # whether or not so short a run gains by it
        trainer.feedback_class = partial(Feedback, guarded=False)
    unbroken.train()
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-8")
    assert_same_state(state_of(unbroken.model), state_of(resumed.model))
    trained = active_prototypes(unbroken.model)
    assert int(trained["iteration"]) == 2
    assert float(trained["semantic_probability"].std()) > 0
    frozen = unbroken.pico_model.prototypes.original_module  # feedback goes to the active copy
    assert int(frozen.iteration) == 0


def test_a_checkpoint_that_lacks_adapter_weights_is_not_resumed_from(make_trainer):
    trainer = make_lora_trainer(make_trainer, num_train_epochs=1)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-4"
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in tensors if ".lora_B." in name)  # peft would leave it as it is
    rest = {name: value for name, value in tensors.items() if name != lost}
    save_file(rest, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fresh = make_lora_trainer(make_trainer, num_train_epochs=2)
    before = state_of(fresh.model)
    with pytest.raises(ValueError, match="the file lacks"):
        fresh.train(resume_from_checkpoint=str(folder))
    assert_same_state(before, state_of(fresh.model))


def test_a_pulled_adapter_is_trained_further(make_trainer, base, tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    model = load_adapter_model(tmp_path / "adapter", base=base(), trainable=True)
    before = state_of(model)
    model.train()(**tiny_inputs()).loss.backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any(".lora_A." in name for name in moved)
    assert any("visual_projection.modules_to_save" in name for name in moved)
    assert_same_state(before, state_of(model))


def test_half_precision_never_rounds_the_prototypes_of_an_adapter(base, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    half = PicoModel.from_pretrained(tmp_path / "adapter", base=base(), dtype=torch.bfloat16)
    assert {p.dtype for p in half.encoder.parameters()} == {torch.bfloat16}
    assert_same_state(active_prototypes(model), state_of(half.prototypes))


def test_the_best_adapter_at_the_end_comes_with_its_own_prototypes(make_trainer, base):
    trainer = make_lora_trainer(make_trainer, learning_rate=5e-2)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert trainer.evaluate()["eval_rsum"] == trainer.state.best_metric
    stored = load_file(f"{best}/prototypes.safetensors")
    live = active_prototypes(trainer.model)
    assert_same_state(live, stored)
    again = load_adapter_model(best, base=base())
    assert_same_state(live, active_prototypes(again))
    assert torch.equal(logits(trainer.model), logits(again))


def test_adapters_and_heads_learn_at_the_full_rate_unless_told_otherwise(make_trainer):
    whole = make_lora_trainer(make_trainer, learning_rate=1e-2)
    assert {group["lr"] for group in whole.create_optimizer().param_groups} == {1e-2}
    towers = make_lora_trainer(make_trainer, learning_rate=1e-2, tower_learning_rate=1e-3)
    groups = towers.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in towers.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-3 if ".lora_" in name else 1e-2), name


def test_towers_that_an_adapter_trains_cannot_be_frozen(make_trainer):
    model = adapted()
    with pytest.raises(ValueError, match=r"Leave `freeze_encoder` out"):
        model.get_base_model().freeze_towers()


def test_frozen_towers_leave_adapted_projections_to_be_trained():
    torch.manual_seed(0)
    model = PicoModel.from_encoder(tiny_encoder(), num_prototypes=3, probe_size=3, pooled_share=0.0)
    heads = ["encoder.visual_projection", "encoder.text_projection"]
    config = pico_lora_config(model, target_modules=heads, modules_to_save=[])
    model = peft.get_peft_model(model, config)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    model.get_base_model().freeze_towers()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    assert any("visual_projection.lora_A" in name for name in before)


def test_an_adapter_that_would_lose_the_prototypes_is_refused(make_trainer):
    from pico_hf import PicoTrainer

    plain = make_trainer()
    config = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"does not carry `prototypes`.*pico_lora_config"):
        PicoTrainer(peft.get_peft_model(plain.model, config), plain.args, plain.train_dataset)


def test_learned_projections_of_an_unknown_architecture_travel_with_the_adapter(tmp_path):
    from pico_hf.encoders.table import ENCODERS

    row = ENCODERS.pop("clip")
    try:
        tiny_encoder().save_pretrained(tmp_path / "base")
        model = PicoModel.from_pretrained(
            tmp_path / "base", fallback_projection=True, num_prototypes=3, probe_size=3
        )
        model = peft.get_peft_model(model, pico_lora_config(model, init_lora_weights=False))
        save_adapter(model, tmp_path / "adapter")
        again = load_adapter_model(tmp_path / "adapter")  # the base is known by name
        assert torch.equal(logits(model), logits(again))
    finally:
        ENCODERS["clip"] = row


def test_an_adapter_on_an_adapter_is_refused():
    with pytest.raises(ValueError, match="Merge it first"):
        pico_lora_config(adapted().get_base_model())


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("dropout", 1.0)])
def test_values_out_of_range_are_refused(field, value):
    model = PicoModel.from_encoder(tiny_encoder(), probe_size=3, pooled_share=0.0)
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        pico_lora_config(model, **{field: value})


def test_prototypes_of_an_adapter_fit_the_merged_model_and_not_the_base(base, tmp_path):
    model = adapted()
    for parameter in model.get_base_model().encoder.visual_projection.parameters():
        parameter.data += 1.0 * parameter.requires_grad
    save_adapter(model, tmp_path / "adapter")
    merged = PicoModel.from_pretrained(tmp_path / "adapter", base=base())
    merged.encoder.save_pretrained(tmp_path / "plain")
    again = PicoModel.from_pretrained(tmp_path / "plain", prototypes=tmp_path / "adapter")
    assert torch.equal(again.column_weights, merged.column_weights)
    with pytest.raises(ValueError, match="fingerprint"):
        PicoModel.from_pretrained(base(), prototypes=tmp_path / "adapter")


# ---- files that cannot be right --------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, base):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    edit(config, base_model_name_or_path=base())
    return tmp_path / "adapter"


def edit(file: Path, **changes) -> None:
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("adapter_config.json", {"peft_type": "IA3"}, "`peft_type` 'LORA'"),
        ("adapter_config.json", {"megatron_core": "antigravity"}, "`megatron_core`"),
        ("adapter_config.json", {"init_lora_weights": "corda"}, "`init_lora_weights`"),
        ("adapter_config.json", {"r": 7}, "must have the rank 7"),
        ("config.json", {"model_type": "clip"}, "must have the model_type 'pico'"),
        ("config.json", {"num_prototypes": 4}, r"prototypes of the shape \(4, 3\)"),
        ("config.json", {"probe_size": "gone"}, "lacks probe_size"),
    ],
)
def test_a_wrong_value_is_refused_before_the_base_is_built(
    folder, monkeypatch, file, changes, message
):
    edit(folder / file, **changes)
    monkeypatch.setattr(PicoModel, "from_encoder", None)
    with pytest.raises(ValueError, match=message) as caught:
        PicoModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused_before_the_base_is_built(folder, monkeypatch):
    monkeypatch.setattr(PicoModel, "from_encoder", None)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter_model(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    lost = next(name for name in tensors if ".lora_B." in name)
    save_file({name: value for name, value in tensors.items() if name != lost}, weights)
    with pytest.raises(ValueError, match=r"lacks `.*lora_B"):
        load_adapter_model(folder)
    weights.unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(OSError, match="Pickle"):
        load_adapter_model(folder)


def test_an_adapter_that_does_not_fit_leaves_a_live_base_as_it_was(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    pair = [name for name in tensors if "layers.0.self_attn.q_proj" in name]
    rest = {name: value for name, value in tensors.items() if name not in pair}
    save_file(rest, folder / "adapter_model.safetensors")
    live = tiny_encoder()
    before = state_of(live)
    with pytest.raises(ValueError, match=r"the file lacks `.*q_proj\.lora_A"):
        load_adapter_model(folder, base=live)
    assert_same_state(before, state_of(live))
    with pytest.raises(ValueError, match="encoder of type 'clip', its base has one of type"):
        load_adapter_model(folder, base=tiny_encoder("siglip"))


def test_a_missing_base_and_a_base_without_an_adapter_are_said(folder, base):
    edit(folder / "adapter_config.json", base_model_name_or_path="")
    with pytest.raises(ValueError, match="does not name its base"):
        PicoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="`base` is for adapters"):
        PicoModel.from_pretrained(base(), base=base())
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"no config.json"):
        load_adapter_model(folder)


def test_a_merged_model_beside_its_adapter_is_not_merged_again(folder):
    merged = PicoModel.from_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config.json\)"):
        merged.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    merged.save_pretrained(folder.parent / "merged")
    (folder.parent / "merged" / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match="a whole model and an adapter as well"):
        PicoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"holds a whole model \(model.safetensors\)"):
        save_adapter(adapted(), folder)


def test_auto_model_merges_an_adapter_too(folder):
    again = AutoModel.from_pretrained(folder)
    assert type(again) is PicoModel
    assert_same_state(state_of(again), state_of(PicoModel.from_pretrained(folder)))


def test_the_libraries_own_loader_works_where_it_is_told_the_sizes(folder):
    auto = peft.AutoPeftModel.from_pretrained(
        folder, import_allowlist=["pico_hf"], num_prototypes=3, probe_size=3
    )
    assert torch.equal(logits(auto), logits(load_adapter_model(folder)))
