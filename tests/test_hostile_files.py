"""Damaged or hostile folders: one clear error each, and nothing is changed before it."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pico_hf import PicoModel, PicoPrototypes
from saved_files import edit_json, edit_tensors, refusal
from tiny import tiny_encoder, tiny_inputs, tiny_refined


@pytest.fixture
def folder(tmp_path):
    """A whole model, prototypes included."""
    tiny_refined().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class MustNotRun:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle file was opened",)


@pytest.mark.parametrize("kept", [4, 100, -10])
def test_weights_cut_short_are_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(lambda: PicoModel.from_pretrained(folder), ValueError)
    assert "model.safetensors is not a whole safetensors file" in message
    assert "again" in message


@pytest.mark.parametrize("plain", [False, True])
def test_nan_in_the_weights_is_refused_by_name(folder, plain):
    path, name = folder / "model.safetensors", "encoder.visual_projection.weight"
    if plain:
        tiny_encoder().save_pretrained(folder)
        name = name.removeprefix("encoder.")
    edit_tensors(path, **{name: torch.full((16, 32), torch.nan)})
    message = refusal(lambda: PicoModel.from_pretrained(folder), ValueError)
    assert f"`{name}` in model.safetensors contains NaN" in message


@pytest.mark.parametrize("shape", [(5, 3), (3, 4)])
def test_prototypes_of_another_shape_inside_a_model_are_refused(folder, shape):
    edit_tensors(folder / "model.safetensors", **{"prototypes.vision": torch.zeros(shape)})
    message = refusal(lambda: PicoModel.from_pretrained(folder), ValueError)
    assert "`prototypes.vision`" in message
    assert str(shape) in message


def test_canonical_columns_are_not_read_as_the_encoders_own(folder):
    message = refusal(lambda: PicoModel.from_pretrained(folder, estimators=["style"]), ValueError)
    assert (
        "`estimators` are style, but the weights were saved with 'canonical' among them" in message
    )


def test_a_model_without_a_basis_starts_from_the_encoders_own_columns(tmp_path):
    tiny_refined(estimators=["style"]).save_pretrained(tmp_path)
    prototypes = PicoModel.from_pretrained(tmp_path, estimators=["canonical", "pooled"]).prototypes
    for basis in (prototypes.image_basis, prototypes.text_basis):
        assert torch.equal(basis, torch.eye(16))


def test_a_folder_with_pickled_weights_only_is_refused_unopened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(MustNotRun()))
    message = refusal(lambda: PicoModel.from_pretrained(folder), OSError)
    assert "no model.safetensors" in message
    assert "pytorch_model.bin" in message
    for path in (folder, tiny_encoder().save_pretrained(folder) or folder):
        asked = refusal(
            lambda path=path: PicoModel.from_pretrained(path, use_safetensors=False), ValueError
        )
        assert "`use_safetensors` must not be False" in asked


@pytest.mark.parametrize("side", ["vision", "text"])
def test_a_damaged_tower_is_refused(tmp_path, side):
    pair, folders = tiny_encoder("vit+bert"), {s: tmp_path / s for s in ("vision", "text")}
    pair.vision_model.save_pretrained(folders["vision"])
    pair.text_model.save_pretrained(folders["text"])
    (folders[side] / "model.safetensors").rename(folders[side] / "pytorch_model.bin")
    message = refusal(lambda: PicoModel.from_vision_text_pretrained(**folders), OSError)
    assert f"{side}' has no model.safetensors" in message


def test_pickled_prototypes_are_refused_unopened(folder):
    (folder / "prototypes.safetensors").unlink()
    (folder / "prototypes.pt").write_bytes(pickle.dumps(MustNotRun()))
    message = refusal(lambda: PicoPrototypes.from_pretrained(folder), OSError)
    assert "no prototypes.safetensors" in message
    assert "prototypes.pt" in message


@pytest.mark.parametrize("unknown", ["no_such_model", None])
def test_an_unknown_model_type_is_refused_by_name(folder, unknown):
    edit_json(folder / "config.json", model_type=unknown)
    assert f"model_type {unknown!r}" in refusal(
        lambda: PicoModel.from_pretrained(folder), ValueError
    )


def test_an_unknown_encoder_inside_a_model_is_refused_by_name(folder):
    edit_json(folder / "config.json", encoder_config={"model_type": "no_such_model"})
    message = refusal(lambda: PicoModel.from_pretrained(folder), ValueError)
    assert "`encoder_config` has model_type 'no_such_model'" in message


def test_code_in_a_repository_is_not_run_unless_the_user_says_so(folder):
    edit_json(folder / "config.json", model_type="x", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert "trust_remote_code" in refusal(lambda: PicoModel.from_pretrained(folder), ValueError)


@pytest.mark.parametrize(
    "name",
    [
        "../../x.safetensors",
        "/x.safetensors",
        "a/../../x.safetensors",
        "..\\x.safetensors",
        "x.bin",
    ],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, name):
    weights = folder / "model.safetensors"
    (folder.parent / "x.safetensors").write_bytes(weights.read_bytes())
    weight_map = dict.fromkeys(load_file(weights), name)
    weights.unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(lambda: PicoModel.from_pretrained(folder), ValueError)
    assert repr(name) in message
    assert "inside the model's own folder" in message


def test_weights_named_by_the_configuration_must_be_inside_the_folder(folder):
    edit_json(folder / "config.json", transformers_weights="../x.safetensors")
    message = refusal(lambda: PicoModel.from_pretrained(folder), ValueError)
    assert "'../x.safetensors'" in message


@pytest.mark.parametrize(
    "index", ["[]", "{}", "{", '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
)
def test_an_index_that_is_none_is_refused(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(
        lambda: PicoModel.from_pretrained(folder), ValueError
    )


def test_a_shard_that_is_missing_is_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(lambda: PicoModel.from_pretrained(folder), OSError)
    assert "lacks model-00001-of-00001.safetensors" in message


def test_a_sharded_model_loads(folder):
    model = PicoModel.from_pretrained(folder)
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert (folder / "shards" / "model.safetensors.index.json").exists()
    again = PicoModel.from_pretrained(folder / "shards")
    inputs = tiny_inputs()
    assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)


BAD_PROTOTYPES = {
    "cut short": lambda f: (f / "prototypes.safetensors").write_bytes(b"\x08"),
    "another shape": lambda f: edit_tensors(f / "prototypes.safetensors", vision=torch.zeros(4, 3)),
    "another number of columns": lambda f: edit_tensors(
        f / "prototypes.safetensors", semantic_probability=torch.ones(17)
    ),
    "NaN": lambda f: edit_tensors(f / "prototypes.safetensors", text=torch.full((3, 3), torch.nan)),
    "infinity": lambda f: edit_tensors(
        f / "prototypes.safetensors", text=torch.full((3, 3), torch.inf)
    ),
    "no probability": lambda f: edit_tensors(
        f / "prototypes.safetensors", semantic_probability=torch.full((16,), 2.0)
    ),
    "a basis that is none": lambda f: edit_tensors(
        f / "prototypes.safetensors", image_basis=2 * torch.eye(16)
    ),
    "a foreign tensor": lambda f: edit_tensors(f / "prototypes.safetensors", more=torch.ones(1)),
    "no JSON": lambda f: (f / "prototypes.json").write_text("{"),
    "no object": lambda f: (f / "prototypes.json").write_text("[]"),
    "facts missing": lambda f: (f / "prototypes.json").write_text("{}"),
    "huge": lambda f: edit_json(f / "prototypes.json", num_columns=10**15, probe_size=10**15),
    "a negative number": lambda f: edit_json(f / "prototypes.json", num_prototypes=-1),
    "a number as text": lambda f: edit_json(f / "prototypes.json", probe_size="3"),
    "an unknown estimator": lambda f: edit_json(f / "prototypes.json", estimators=["exec"]),
    "no fingerprint": lambda f: edit_json(f / "prototypes.json", encoder_fingerprint="x"),
}


@pytest.mark.parametrize("damage", BAD_PROTOTYPES)
def test_damaged_prototypes_are_refused_and_the_live_model_stays(folder, damage):
    model = tiny_refined()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    BAD_PROTOTYPES[damage](folder)
    message = refusal(
        lambda: model.adopt_prototypes(PicoPrototypes.from_pretrained(folder)), ValueError
    )
    assert "prototypes.json" in message or "prototypes.safetensors" in message
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_prototypes_of_another_encoder_are_refused_and_the_live_model_stays(folder):
    other, wide = tiny_refined(seed=1), tiny_refined("siglip")
    for model, reason in ((other, "fingerprint"), (wide, "16 columns, the encoder has 32")):
        knobs, before = model.config.to_dict(), model.prototypes
        foreign = PicoPrototypes.from_pretrained(folder)
        assert reason in refusal(lambda m=model, f=foreign: m.adopt_prototypes(f), ValueError)
        assert model.prototypes is before
        assert model.config.to_dict() == knobs


def test_a_damaged_checkpoint_is_refused_before_the_live_model_changes(make_trainer):
    trainer = make_trainer(num_train_epochs=1, load_best_model_at_end=False)
    trainer.train()
    checkpoint = f"{trainer.args.output_dir}/checkpoint-4"

    edit_tensors(Path(checkpoint) / "model.safetensors", logit_scale=torch.tensor(torch.nan))
    again = make_trainer(num_train_epochs=1, load_best_model_at_end=False)
    before = {name: value.clone() for name, value in again.model.state_dict().items()}
    message = refusal(lambda: again.train(resume_from_checkpoint=checkpoint), ValueError)
    assert "`logit_scale`" in message
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, before[name]), name
