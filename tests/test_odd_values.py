"""Right values for each kind of fault that fuzzing found: one clear line, or a value of use."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pico_hf import PicoIndex, PicoModel, PicoPrototypes, load_image_text
from pico_hf.core.token_features import TokenFeatures, unit_length
from pico_hf.data.checking import checked_rows
from pico_hf.data.image_sizes import check_image_sizes
from pico_hf.data.raw_inputs import caption_rows, image_list, image_rows, text_list
from pico_hf.data.token_store import TokenStore
from pico_hf.encoders.check import try_encoder
from pico_hf.hub.errors import plain_build
from pico_hf.lora import load_adapter_model, pico_lora_config, save_adapter
from pico_hf.model_and_processor import model_and_processor
from pico_hf.search.files import _digest, file_digest
from pico_hf.training.cache_folder import cache_entries, clear_cache
from pico_hf.training.resuming import _check_state
from saved_files import edit_json, edit_tensors, refusal
from tiny import tiny_encoder, tiny_inputs, tiny_processor, tiny_refined

# ---- configurations --------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    tiny_refined().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("value", [2**40, 1.5, "2", {"a": 1}, [[True]]])
def test_a_token_id_that_no_text_can_have_is_refused_before_it_is_met(model, value):
    config = json.loads((model / "config.json").read_text())
    config["encoder_config"]["text_config"]["eos_token_id"] = value
    edit_json(model / "config.json", **config)
    message = refusal(lambda: PicoModel.from_pretrained(model))
    assert "eos_token_id" in message
    assert str(model) in message


@pytest.mark.parametrize("value", ["yes", 0.5, {"a": []}])
def test_a_switch_that_is_none_is_refused_before_it_is_met(model, value):
    config = json.loads((model / "config.json").read_text())
    config["encoder_config"]["text_config"]["output_hidden_states"] = value
    edit_json(model / "config.json", **config)
    assert "output_hidden_states" in refusal(lambda: PicoModel.from_pretrained(model))


@pytest.mark.parametrize(
    ("tower", "key", "value"),
    [
        ("text_config", "layer_norm_eps", None),
        ("text_config", "eos_token_id", None),
        ("text_config", "output_hidden_states", [[]]),
        ("vision_config", "layer_norm_eps", None),
        ("vision_config", "num_channels", 4),
    ],
)
def test_a_setting_that_is_met_in_a_call_only_is_refused_when_a_model_is_loaded(
    tower, key, value, model, monkeypatch
):
    def late(*_, **__):
        raise AssertionError("the weights were read into a model")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", late)
    config = json.loads((model / "config.json").read_text())
    config["encoder_config"][tower][key] = value
    edit_json(model / "config.json", **config)
    assert str(model) in refusal(lambda: PicoModel.from_pretrained(model))


def test_a_call_that_needs_numbers_is_not_tried():
    """What SigLIP 2 and ALIGN decide by the numbers of a tensor cannot be known without them."""
    for name in ("siglip2", "align", "clip"):
        encoder = tiny_encoder(name).to("meta")
        try_encoder(encoder)
    encoder.text_model.final_layer_norm.eps = None
    with pytest.raises(TypeError, match="eps"):
        try_encoder(encoder)


@pytest.mark.parametrize("name", ["margin", "feedback_temperature"])
@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan")])
def test_a_number_beyond_any_use_is_refused(name, value, model):
    edit_json(model / "config.json", **{name: value})
    assert f"`{name}` must be a number" in refusal(lambda: PicoModel.from_pretrained(model))


def test_a_long_value_of_a_configuration_is_not_repeated(model):
    edit_json(model / "config.json", probe_size="x" * 5000)
    assert len(refusal(lambda: PicoModel.from_pretrained(model))) < 600


# ---- numbers that overflow -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("logit_scale", 89.0), ("logit_bias", 3e38)])
def test_logits_that_can_be_no_numbers_are_refused_when_a_model_is_loaded(name, value, model):
    edit_tensors(model / "model.safetensors", **{f"pair_logits.{name}": torch.tensor(value)})
    assert f"`{name}` must lie between" in refusal(lambda: PicoModel.from_pretrained(model))


def test_logits_of_an_adapter_that_can_be_no_numbers_are_refused(model, tmp_path):
    peft = pytest.importorskip("peft")
    base = PicoModel.from_pretrained(model)
    save_adapter(peft.get_peft_model(base, pico_lora_config(base)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    (name,) = (name for name in load_file(path) if name.endswith("logit_scale"))
    edit_tensors(path, **{name: torch.tensor(300.0)})
    load = partial(load_adapter_model, tmp_path / "adapter", base=model)
    assert "`logit_scale` must lie between" in refusal(load)


def test_an_adapter_that_makes_weights_overflow_is_refused(model, tmp_path):
    peft = pytest.importorskip("peft")
    base = PicoModel.from_pretrained(model)
    save_adapter(peft.get_peft_model(base, pico_lora_config(base)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name, value = next((n, v) for n, v in load_file(path).items() if "lora_B" in n)
    edit_tensors(path, **{name: torch.full_like(value, 3e38)})
    load = partial(PicoModel.from_pretrained, tmp_path / "adapter", base=model)
    assert "cannot be merged" in refusal(load)


@pytest.mark.parametrize("huge", [torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("part", ["tokens", "pooled"])
def test_features_without_a_length_are_refused(part, huge):
    """Divided by an infinite length they would be zeros, which look like features."""
    values = {"tokens": torch.ones(2, 3, 4), "pooled": torch.ones(2, 4)}
    mask = torch.ones(2, 3).bool()
    unit_length(values["tokens"], mask, "image", values["pooled"])
    values[part][1, ..., 0] = huge
    call = partial(unit_length, values["tokens"], mask, "image", values["pooled"])
    assert "image features contain NaN or infinity" in refusal(call)


def test_weights_that_overflow_in_a_forward_pass_are_refused_there(model):
    name = "encoder.visual_projection.weight"
    weights = load_file(model / "model.safetensors")[name]
    edit_tensors(model / "model.safetensors", **{name: torch.full_like(weights, 3e38)})
    loaded = PicoModel.from_pretrained(model)
    assert "image features contain NaN" in refusal(lambda: loaded(**tiny_inputs()))


def test_a_value_error_of_others_gets_the_name_of_what_is_read():
    said = r"'here' cannot be built .*invalid literal"
    with pytest.raises(ValueError, match=said), plain_build("here"):
        int("x")


def test_content_is_not_repeated_at_length(model):
    edit_json(model / "prototypes.json", num_prototypes="x" * 5000)
    message = refusal(lambda: PicoPrototypes.from_pretrained(model))
    assert "num_prototypes" in message
    assert len(message) < 1000


# ---- processors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("preprocessor_config.json", {"image_mean": ["a", 0.5, 0.5]}),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}),
        ("preprocessor_config.json", {"image_std": [0.0, 0.0, 0.0]}),
        ("preprocessor_config.json", {"size": "large"}),
        ("preprocessor_config.json", {"size": {"height": 32_000_000, "width": 32}}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 10**9}}),
        ("tokenizer_config.json", {"eos_token": [3]}),
        ("tokenizer.json", {"model": 3}),
    ],
)
def test_a_processor_that_cannot_work_is_refused_by_name(file, changes, model, tmp_path):
    folder = tmp_path / "processor"
    tiny_processor().save_pretrained(folder)
    path = folder / file
    if not path.exists():  # newer versions keep the image processor's settings in one file
        path = folder / "processor_config.json"
        saved = json.loads(path.read_text())
        changes = {"image_processor": {**saved["image_processor"], **changes}}
    edit_json(path, **changes)
    live = PicoModel.from_pretrained(model)
    assert str(folder) in refusal(lambda: model_and_processor(live, folder))


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"size": {"height": 2048, "width": 2048}}, True),
        ({"size": {"height": 2048, "width": 2049}}, False),
        ({"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}, False),
        ({"size": {"shortest_edge": 56, "longest_edge": 12_845_056}}, True),
        ({"crop_size": 2049}, False),
        ({"size_divisor": 10**9}, False),
        ({"size": {"height": 1e300, "width": 1}}, False),
        ({"size": None, "do_resize": True, "resample": 10**9}, True),
    ],
)
def test_sizes_of_processors_have_a_budget(settings, taken):
    processor = SimpleNamespace(to_dict=lambda: settings)
    if taken:
        check_image_sizes(processor)
    else:
        assert "4194304 pixels" in refusal(lambda: check_image_sizes(processor))


def test_a_whole_processor_is_taken(model, tmp_path):
    tiny_processor().save_pretrained(tmp_path / "processor")
    live = PicoModel.from_pretrained(model)
    assert model_and_processor(live, tmp_path / "processor")[1].tokenizer.eos_token == "[EOS]"


# ---- runs ------------------------------------------------------------------------------------

STATE = {"global_step": 3, "epoch": 1.0, "log_history": [], "best_metric": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown": 3},
        {"stateful_callbacks": [{}]},
        {"global_step": -1},
        {"global_step": True},
        {"global_step": 2**70},
        {"log_history": "x"},
        {"best_metric": float("nan")},
        {"best_metric": float("inf")},
        {"best_metric": 10**400},
        {"best_metric": "best"},
    ],
)
def test_a_state_that_no_run_has_is_refused(changes, tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps(STATE))
    _check_state(tmp_path, tmp_path)
    path.write_text(json.dumps({**STATE, **changes}))
    assert "trainer_state.json" in refusal(lambda: _check_state(tmp_path, tmp_path))


# ---- cached features -------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path) -> Path:
    batch = TokenFeatures(torch.randn(5, 4, 8), torch.ones(5, 4).bool(), torch.randn(5, 8))
    TokenStore.write(tmp_path / "images", iter([batch]))
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("ends.npy", b""),
        ("ends.npy", b"no numpy at all"),
        ("tokens.f16", b""),
        ("tokens.f16", b"abc"),
        ("pooled.f16", b"12" * 7),
    ],
)
def test_a_damaged_store_says_how_to_make_it_anew(file, content, store):
    assert len(TokenStore(store, "image_hidden_states")) == 5
    (store / file).write_bytes(content)
    message = refusal(lambda: TokenStore(store, "image_hidden_states"))
    assert "pico-hf cache --clear" in message


@pytest.mark.parametrize(
    "ends", [[4, 3, 12, 16, 20], [0, 8, 12, 16, 20], [-4, 8, 12, 16, 20], [4.0] * 5, [[4], [20]]]
)
def test_ends_that_no_rows_have_are_refused(ends, store):
    np.save(store / "ends.npy", np.array(ends))
    assert "damaged" in refusal(lambda: TokenStore(store, "image_hidden_states"))


def test_a_header_that_promises_more_than_the_file_has_allocates_nothing(store):
    content = (store / "ends.npy").read_bytes().replace(b"(5,), }", b"(9999999999,), }"[:16])
    (store / "ends.npy").write_bytes(content)
    assert "damaged" in refusal(lambda: TokenStore(store, "image_hidden_states"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("file", ["tokens.f16", "pooled.f16"])
def test_features_that_are_not_finite_are_never_given(file, value, store):
    values = np.fromfile(store / file, np.float16)
    values[0] = value
    values.tofile(store / file)
    damaged = TokenStore(store, "image_hidden_states")
    assert "row 0" in refusal(lambda: damaged[0])
    assert torch.isfinite(damaged[1]["image_hidden_states"]).all()


@pytest.mark.parametrize("about", ["", "[]", '{"encoder": "clip"}', '{"encoder": 3, "images": 1}'])
def test_a_damaged_entry_of_the_cache_is_listed_and_can_be_cleared(about, tmp_path):
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "about.json").write_text(about)
    assert [(one.key, one.encoder) for one in cache_entries(tmp_path)] == [("entry", "damaged")]
    clear_cache(tmp_path, "entry")
    assert cache_entries(tmp_path) == []


# ---- collections -----------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path) -> Path:
    tokens = torch.nn.functional.normalize(torch.randn(4, 3, 8), dim=-1)
    made = PicoIndex.create(tmp_path / "index")
    made.add_features(TokenFeatures(tokens, torch.ones(4, 3).bool()), ["a", "b", "c", "d"])
    assert len(PicoIndex.open(tmp_path / "index")) == 4
    return tmp_path / "index"


def sign(folder: Path, **changes) -> None:
    """Makes the digests of an index right, as whoever means harm would."""
    manifest = json.loads((folder / "index.json").read_text())
    for shard in manifest["shards"]:
        for suffix in shard["digests"]:
            shard["digests"][suffix] = file_digest(folder / "shards" / f"{shard['name']}{suffix}")
    manifest = {**manifest, **changes}
    content = {k: v for k, v in manifest.items() if k not in ("format", "version", "digest")}
    (folder / "index.json").write_text(json.dumps({**manifest, "digest": _digest(content)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": None},
        {"shards": [3]},
        {"dtype": "float8"},
        {"merging": 0},
        {"width": "x"},
        {"encoder": 3},
        {"encoder": {"tower": {}}},
        {"generation": -1},
        {"next_shard": 2**70},
    ],
)
def test_a_manifest_of_odd_values_is_refused_though_its_digest_is_right(changes, collection):
    sign(collection, **changes)
    assert "no readable index file" in refusal(lambda: PicoIndex.open(collection))


@pytest.mark.parametrize(
    "facts", [{"name": "../../x"}, {"name": "1"}, {"images": -1}, {"deleted": [9]}, {"digests": {}}]
)
def test_facts_of_a_shard_that_cannot_be_are_refused(facts, collection):
    shard = json.loads((collection / "index.json").read_text())["shards"][0]
    sign(collection)
    manifest = json.loads((collection / "index.json").read_text())
    manifest["shards"] = [{**shard, **facts}]
    content = {k: v for k, v in manifest.items() if k not in ("format", "version", "digest")}
    (collection / "index.json").write_text(json.dumps({**manifest, "digest": _digest(content)}))
    assert "no readable index file" in refusal(lambda: PicoIndex.open(collection))


@pytest.mark.parametrize("record", ["{", "3", "[]", '{"id": 3}', "[" * 100_000])
def test_records_of_odd_kinds_are_damage(record, collection):
    path = next((collection / "shards").glob("*.jsonl"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([record, *lines[1:]]) + "\n")
    sign(collection)
    assert "is damaged" in refusal(lambda: PicoIndex.open(collection))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", torch.full((12, 8), torch.nan, dtype=torch.float16)),
        ("pooled", torch.full((4, 8), torch.inf)),
        ("pooled", torch.zeros(4, 9)),
        ("lengths", torch.tensor([3, 3, 3, 4])),
        ("lengths", torch.tensor([-3, 9, 3, 3])),
        ("scales", torch.zeros(11)),
        ("has_summary", torch.zeros(4)),
    ],
)
def test_tensors_that_do_not_fit_or_are_not_finite_are_damage(name, value, collection):
    path = next((collection / "shards").glob("*.safetensors"))
    tensors = load_file(path)
    tensors.setdefault("has_summary", torch.zeros(4).bool())
    tensors.setdefault("summary", torch.zeros(4, 8))
    save_file({**tensors, name: value}, path)
    sign(collection)
    assert "is damaged" in refusal(lambda: PicoIndex.open(collection))


def test_no_hit_has_a_score_that_is_not_finite(collection):
    path = next((collection / "shards").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["tokens"][0] = torch.nan
    save_file(tensors, path)
    sign(collection)
    unread = PicoIndex.open(collection, verify=False)
    query = TokenFeatures(torch.ones(1, 2, 8) / 8**0.5, torch.ones(1, 2).bool())
    assert "not finite" in refusal(lambda: unread.search(query))


# ---- data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.parquet", b"PAR1 and nothing of it"),
        ("rows.jsonl", b'{"image": '),
        ("rows.csv", b'image,caption\na.png,"a'),
        ("rows.csv", b"\xff\xfe\x00"),
    ],
)
def test_a_damaged_table_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert name in refusal(lambda: load_image_text(files=str(tmp_path / name)))


def test_a_column_of_odd_values_is_named():
    rows = datasets.Dataset.from_dict({"image": [[[1], None]], "caption": ["a disc"]})
    message = refusal(lambda: checked_rows(rows))
    assert "image" in message


@pytest.mark.parametrize("value", [{"a": 1}, {}, 3, None])
def test_what_is_no_list_is_named(value):
    assert "`texts` must" in refusal(lambda: caption_rows(text_list(value)))


def test_a_long_path_is_cut_in_messages():
    message = refusal(lambda: image_rows(image_list(["x" * 3000]), (0, 0, 0))[0])
    assert "`images`[0]" in message
    assert len(message) < 600
