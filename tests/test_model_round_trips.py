"""What is written of a model is read back, and nothing that was written before it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from pico_hf import PicoConfig, PicoModel, PicoPrototypes
from pico_hf.cards.publishing import copy_model_files
from pico_hf.configuration_pico import own_fields
from pico_hf.core.losses import LOSSES
from saved_files import edit_json, edit_tensors, outcome, refusal
from tiny import tiny_encoder, tiny_inputs, tiny_refined

KNOBS = {
    "num_prototypes": [1, 5],
    "probe_size": [2, 7],
    "estimators": [["canonical"], ["style"], ["style", "canonical", "pooled"]],
    "feedback_temperature": [1, 0.5],
    "loss": sorted(LOSSES),
    "margin": [0.05, 2.0],
    "column_dropout": [0.0, 0.25],
    "keep_special_tokens": [False, True],
    "fallback_widths": [None, [8, 8, 4]],
    "encoder_config": [None, tiny_encoder().config.to_dict()],
}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**tiny_inputs()).logits_per_image


def test_every_key_of_the_configuration_is_tried():
    assert KNOBS.keys() == set(own_fields())


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in KNOBS.items() for v in values])
def test_every_key_of_a_configuration_is_read_back(name, value, tmp_path):
    config = PicoConfig(**{name: value})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is PicoConfig
    told = {"_name_or_path": "", "transformers_version": ""}
    assert {**again.to_dict(), **told} == {**config.to_dict(), **told}


@pytest.mark.parametrize("name", ["num_prototypes", "probe_size", "estimators", "loss", "margin"])
def test_every_knob_of_a_model_is_read_back_with_its_weights(name, tmp_path):
    for number, value in enumerate(KNOBS[name]):
        model = PicoModel.from_encoder(
            tiny_encoder(), **{"probe_size": 3, "pooled_share": 0.0, name: value}
        )
        model.save_pretrained(tmp_path / str(number))
        again = PicoModel.from_pretrained(tmp_path / str(number))
        assert getattr(again.config, name) == value
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"variant": "fp16"}])
def test_weights_of_any_type_and_in_any_parts_are_read_back(dtype, options, tmp_path):
    model = tiny_refined().to(dtype)
    model.save_pretrained(tmp_path, **options)
    variant = {key: value for key, value in options.items() if key == "variant"}
    again = PicoModel.from_pretrained(tmp_path, **variant)
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype, name
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("encoder", ["blip", "siglip", "vit+bert", "align"])
def test_tied_weights_are_written_once_and_read_back(encoder, tmp_path):
    model = tiny_refined("clip") if encoder == "clip" else None
    model = PicoModel.from_encoder(
        tiny_encoder(encoder), num_prototypes=3, probe_size=3, pooled_share=0.0
    )
    model.save_pretrained(tmp_path)
    again = PicoModel.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# ---- what was there before ---------------------------------------------------------------------

WAYS = {
    "shards into a whole": ({}, {"max_shard_size": "20KB"}),
    "a whole into shards": ({"max_shard_size": "20KB"}, {}),
    "shards into more shards": ({"max_shard_size": "20KB"}, {"max_shard_size": "60KB"}),
    "shards of a variant": ({"variant": "b"}, {"variant": "b", "max_shard_size": "20KB"}),
    "a whole variant": ({"variant": "b", "max_shard_size": "20KB"}, {"variant": "b"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_last_save_is_what_is_read_and_other_files_stay(way, tmp_path):
    first, second = WAYS[way]
    one, two = tiny_refined(seed=0), tiny_refined(seed=5)
    one.save_pretrained(tmp_path, **first)
    mine = {"notes.txt": b"mine", "pytorch_model.bin": b"mine", "mine.safetensors": b"mine"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    two.save_pretrained(tmp_path, **second)
    variant = {key: value for key, value in second.items() if key == "variant"}
    again = PicoModel.from_pretrained(tmp_path, **variant)
    assert torch.equal(logits(again), logits(two))
    for name, content in mine.items():
        assert (tmp_path / name).read_bytes() == content


def test_a_pushed_folder_holds_the_last_checkpoint_alone(tmp_path):
    one, two = tiny_refined(seed=0), tiny_refined(seed=5)
    for first, second in (({}, {"max_shard_size": "20KB"}), ({"max_shard_size": "20KB"}, {})):
        shutil.rmtree(tmp_path, ignore_errors=True)
        one.save_pretrained(tmp_path / "pushed", **first)
        two.save_pretrained(tmp_path / "checkpoint", **second)
        copy_model_files(tmp_path / "checkpoint", tmp_path / "pushed")
        again = PicoModel.from_pretrained(tmp_path / "pushed")
        assert torch.equal(logits(again), logits(two))


@pytest.fixture
def folder(tmp_path):
    tiny_refined().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_file_beside_shards_is_refused_naming_both(folder):
    whole = (folder / "model.safetensors").read_bytes()
    PicoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").write_bytes(whole)
    message = refusal(lambda: PicoModel.from_pretrained(folder))
    assert "model.safetensors and model.safetensors.index.json" in message


def test_prototypes_of_an_earlier_save_are_refused_unless_they_are_chosen(folder):
    model = tiny_refined()
    model.prototypes.semantic_probability.fill_(0.5)
    model.prototypes.save_pretrained(folder)
    message = refusal(lambda: PicoModel.from_pretrained(folder))
    assert "prototypes.safetensors" in message
    assert "model.safetensors" in message
    chosen = PicoModel.from_pretrained(folder, prototypes=folder)
    assert chosen.semantic_probability.unique().tolist() == [0.5]


def test_a_plain_encoder_beside_an_adapter_is_refused(folder):
    tiny_encoder().save_pretrained(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(lambda: PicoModel.from_pretrained(folder))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("lost", ["projection", "q_proj", "embed"])
def test_weights_that_were_not_saved_are_named(folder, plain, lost):
    if plain:
        tiny_encoder().save_pretrained(folder)
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if lost not in name}
    save_file(kept, path, metadata={"format": "pt"})
    message = refusal(lambda: PicoModel.from_pretrained(folder))
    assert "but lacks" in message
    assert lost in message


def test_a_checkpoint_that_lacks_weights_is_not_resumed_from(make_trainer):
    trainer = make_trainer(num_train_epochs=1, load_best_model_at_end=False)
    trainer.train()
    path = f"{trainer.args.output_dir}/checkpoint-4/model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "q_proj" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    again = make_trainer(num_train_epochs=2, load_best_model_at_end=False)
    before = {name: value.clone() for name, value in again.model.state_dict().items()}
    message = refusal(lambda: again.train(resume_from_checkpoint=path.rpartition("/")[0]))
    assert "does not fit the model: it lacks `encoder." in message
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nope", "/nope/nope", "no/such/folder", "../nope", "nope/"])
@pytest.mark.parametrize("load", [PicoModel.from_pretrained, PicoPrototypes.from_pretrained])
def test_a_folder_that_is_not_there_is_said_to_be_missing(load, name):
    message = refusal(lambda: load(name))
    assert f"The folder '{name}' does not exist" in message


def test_a_file_is_no_folder(folder):
    message = refusal(lambda: PicoModel.from_pretrained(folder / "model.safetensors"))
    assert "is a file, not a folder" in message


def test_what_was_loaded_is_told_of_any_model(folder, tmp_path):
    tiny_encoder().save_pretrained(tmp_path / "plain")
    for path in (folder, tmp_path / "plain"):
        model, info = PicoModel.from_pretrained(path, output_loading_info=True)
        assert type(model) is PicoModel
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


# ---- files of a stranger ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("plain", [False, True])
def test_infinity_is_refused_by_name(folder, plain, value):
    if plain:
        tiny_encoder().save_pretrained(folder)
    name = "visual_projection.weight" if plain else "encoder.visual_projection.weight"
    edit_tensors(folder / "model.safetensors", **{name: torch.full((16, 32), value)})
    message = refusal(lambda: PicoModel.from_pretrained(folder))
    assert f"`{name}` in model.safetensors contains infinity" in message


@pytest.mark.parametrize("value", [-0.1, 1.5, 0.0])
def test_probabilities_out_of_range_are_refused_in_a_model(folder, value):
    name = "prototypes.semantic_probability"
    edit_tensors(folder / "model.safetensors", **{name: torch.full((16,), value)})
    assert "must be in [0, 1]" in refusal(lambda: PicoModel.from_pretrained(folder))


HUGE = [
    {"num_labels": 10**9},
    {"num_prototypes": 10**9},
    {"probe_size": 10**12},
    {"encoder_config": {"num_labels": 10**9}},
    {"encoder_config": {"text_config": {"vocab_size": 10**12}}},
    {"encoder_config": {"text_config": {"num_labels": 10**9}}},
    {"encoder_config": {"text_config": {"num_hidden_layers": 10**9}}},
    {"encoder_config": {"vision_config": {"hidden_size": 2**40}}},
    {"encoder_config": {"vision_config": {"image_size": 2**30}}},
    {"encoder_config": {"projection_dim": 2**50}},
]


def deep(one: dict, other: dict) -> dict:
    merged = dict(one)
    for name, value in other.items():
        nested = isinstance(value, dict) and isinstance(one.get(name), dict)
        merged[name] = deep(one[name], value) if nested else value
    return merged


@pytest.mark.parametrize("changes", HUGE)
def test_sizes_that_the_weights_do_not_have_are_refused_before_they_are_allocated(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(deep(json.loads(path.read_text()), changes)))
    refusal(lambda: PicoModel.from_pretrained(folder))


WRONG_TYPES = [None, 3, -1, 0.5, "x", [], {}, [1], {"a": [1]}, True]
KEYS = [
    *KNOBS,
    "model_type",
    "architectures",
    "auto_map",
    "dtype",
    "num_labels",
    "id2label",
    "transformers_weights",
    "quantization_config",
    "transformers_version",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("plain", [False, True])
def test_a_key_of_any_type_is_read_or_refused_in_one_line(folder, plain, key):
    if plain:
        tiny_encoder().save_pretrained(folder)
    path = folder / "config.json"
    whole = path.read_text()
    for value in WRONG_TYPES:
        edit_json(path, **{key: value})
        assert "\n" not in outcome(lambda: PicoModel.from_pretrained(folder)), value
        path.write_text(whole)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "", '"x"', "[" * 100000])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_file_that_is_no_object_is_refused_in_one_line(folder, file, text):
    model = PicoModel.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / file).write_text(text)
    message = refusal(lambda: PicoModel.from_pretrained(folder))
    assert file in message


@pytest.mark.parametrize("value", WRONG_TYPES)
@pytest.mark.parametrize("key", ["weight_map", "metadata"])
def test_an_index_of_any_type_is_read_or_refused_in_one_line(folder, key, value):
    PicoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    edit_json(folder / "model.safetensors.index.json", **{key: value})
    assert "\n" not in outcome(lambda: PicoModel.from_pretrained(folder))


def test_an_index_that_does_not_fit_its_shards_is_refused(folder):
    PicoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    lost = next(iter(weight_map))
    del weight_map[lost]
    edit_json(index, weight_map=weight_map)
    assert f"only one of them has `{lost}`" in refusal(lambda: PicoModel.from_pretrained(folder))
