"""`keep_special_tokens`: CLS, registers, BOS and EOS take part beside patches and words.

Whatever the setting, a batch says which tokens are words and the model adds the rest, so that no
collator can be of another setting than the model.
"""

from __future__ import annotations

import json

import pytest
import torch

from command_line import read
from pico_hf import PicoCollator, PicoIndex, PicoModel, PicoRetriever, explain
from pico_hf.core.calibration import StyleCalibration
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.encoders.inputs import image_inputs, text_inputs
from pico_hf.encoders.special_tokens import prefix_tokens
from pico_hf.encoders.table import ENCODERS, encoder_spec
from pico_hf.encoders.tokens import image_hidden_states, prefix_length
from pico_hf.graphs.modules import attends_to_padding
from pico_hf.training.encoding import SplitEncoder, encode_batch
from pico_hf.training.feature_cache import cache_key, cache_token_features
from reference import similarity_loop
from test_architectures import bare_hidden_states
from test_explanation import CAPTION, GRIDS, picture
from tiny import BUILDERS, tiny_encoder, tiny_inputs, tiny_processor, tiny_rows

ALL = pytest.mark.parametrize("name", list(BUILDERS))
TEXTS = ("input_ids", "attention_mask")
# Tokens before the patches; all others have none.
PREFIX = dict.fromkeys(BUILDERS, 1) | {
    **dict.fromkeys(("siglip", "siglip2", "aimv2", "blip-2-itm", "align", "groupvit"), 0),
    **dict.fromkeys(("swin+bert", "swin+roberta", "swinv2+bert"), 0),
    **{"deit+bert": 2, "tipsv2": 2, "dinov3+bert": 3, "dinov2-registers+bert": 5},
}
CAPTIONS = ["a big red square", "blue disc", "a small white disc on a green square", "red"]


def wrapped(name: str = "clip", keep: bool = True, **knobs) -> PicoModel:
    encoder = tiny_encoder(name)
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:  # norms of a fresh model are identities on normed vectors
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    knobs = {"num_prototypes": 3, "probe_size": 3, "pooled_share": 0.0, **knobs}
    model = PicoModel.from_encoder(encoder, keep_special_tokens=keep, **knobs).eval()
    columns = model.column_weights.numel()
    model.prototypes.semantic_probability.copy_(torch.linspace(0.2, 1.0, columns))
    return model


def both(name: str) -> tuple[PicoModel, PicoModel]:
    """(special tokens kept, dropped) of the same weights."""
    return wrapped(name), wrapped(name, keep=False)


def sides(name: str, model: PicoModel) -> tuple[dict, dict]:
    inputs = tiny_inputs(encoder=name)
    texts = {key: inputs.pop(key) for key in TEXTS}
    if attends_to_padding(model):
        del texts["attention_mask"]
    return inputs, texts


def batch_of(name: str, model: PicoModel, **options) -> dict[str, torch.Tensor]:
    collate = PicoCollator(tiny_processor(name), config=model.config, **options)
    return collate([{"image": picture(), "caption": caption} for caption in CAPTIONS])


# ---- what takes part -----------------------------------------------------------------------------


@ALL
@torch.no_grad()
def test_an_image_has_its_prefix_before_its_patches(name):
    kept, dropped = both(name)
    images, _ = sides(name, kept)
    found, patches = kept.encode_images(**images), dropped.encode_images(**images)
    first = PREFIX[name]
    assert found.features.shape[1] == patches.features.shape[1] + first
    assert torch.equal(found.mask[:, first:], patches.mask)
    assert bool(found.mask[:, :first].all())
    real = patches.mask
    torch.testing.assert_close(found.features[:, first:][real], patches.features[real])
    assert len(prefix_tokens(kept.encoder, encoder_spec(kept.encoder).image)) == first


@ALL
@torch.no_grad()
def test_the_prefix_is_what_the_tower_gives_first(name):
    encoder, inputs = tiny_encoder(name), tiny_inputs(encoder=name)
    images = {key: value for key, value in inputs.items() if key not in TEXTS}
    states = image_hidden_states(encoder, **images, keep_special_tokens=True).features
    whole = bare_hidden_states(encoder, inputs)[0]
    whole = whole.flatten(2).transpose(1, 2) if whole.ndim == 4 else whole
    assert torch.equal(states, whole)


def test_prefix_tokens_have_names():
    def names(name: str) -> tuple[str, ...]:
        encoder = tiny_encoder(name)
        return prefix_tokens(encoder, encoder_spec(encoder).image)

    assert names("siglip") == ()
    assert names("clip") == ("CLS",)
    assert names("deit+bert") == ("CLS", "special token 2")
    assert names("dinov3+bert") == ("CLS", "register 1", "register 2")


@ALL
@torch.no_grad()
def test_a_text_has_all_attended_tokens_and_never_padding(name):
    kept, dropped = both(name)
    ids, attended = (tiny_inputs(encoder=name)[key] for key in TEXTS)
    texts = sides(name, kept)[1]
    found, words = kept.encode_texts(**texts), dropped.encode_texts(**texts)
    if attends_to_padding(kept):  # has no BOS: what comes first counts as a word
        assert words.mask.tolist() == (attended.bool() & (ids != 2)).tolist()
    assert found.mask.tolist() == attended.bool().tolist()
    if name != "tipsv2":  # its row names no special tokens
        assert bool((found.mask.sum(dim=1) > words.mask.sum(dim=1)).all())
    torch.testing.assert_close(found.features[words.mask], words.features[words.mask])


@pytest.mark.parametrize("name", ["clip", "vit+roberta", "tipsv2"])
@torch.no_grad()
def test_padding_before_a_text_changes_nothing(name):
    model, (_, texts) = wrapped(name), sides(name, wrapped(name))
    left = {key: value.clone() for key, value in texts.items()}
    for row, real in enumerate(texts["attention_mask"].bool()):
        for key in left:
            left[key][row] = torch.cat([texts[key][row][~real], texts[key][row][real]])
    found, expected = model.encode_texts(**left), model.encode_texts(**texts)
    assert torch.equal(found.mask, left["attention_mask"].bool())
    torch.testing.assert_close(found.features[found.mask], expected.features[expected.mask])


@torch.no_grad()
def test_a_siglip_text_that_fills_the_tower_ends_in_its_eos():
    model, ids = wrapped("siglip"), torch.full((2, 6), 5)
    ids[0, -1], ids[1, 3:] = 2, 2  # without padding, and with two
    assert model.encode_texts(ids).mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]


@torch.no_grad()
def test_a_text_of_special_tokens_alone_is_these_and_no_padding():
    model = wrapped("siglip")
    assert model.encode_texts(torch.full((1, 6), 2)).mask.sum().item() == 1
    texts = {"input_ids": torch.tensor([[1, 2, 2, 2]])}
    texts["attention_mask"] = torch.tensor([[1, 1, 0, 0]])
    assert wrapped().encode_texts(**texts).mask.tolist() == [[True, True, False, False]]


@torch.no_grad()
def test_siglip_2_pads_with_another_token_than_its_eos():
    model = wrapped("siglip")
    ids = torch.tensor([[5, 6, 2, 0, 0, 0], [7, 2, 0, 0, 0, 0]])  # the config names 2
    assert model.encode_texts(ids).mask.sum(dim=1).tolist() == [3, 2]


@ALL
@torch.no_grad()
def test_scores_are_those_of_a_loop_over_all_tokens(name):
    model = wrapped(name)
    images, texts = sides(name, model)
    found = model.encode_images(**images), model.encode_texts(**texts)
    expected = similarity_loop(*found, model.column_weights)
    torch.testing.assert_close(model.score(*found), expected, atol=1e-5, rtol=0)
    logits = model(**images, **texts).logits_per_image
    scaled = expected * model.logit_scale.exp() + model.logit_bias
    torch.testing.assert_close(logits, scaled, atol=1e-4, rtol=1e-5)


# ---- what does not change ------------------------------------------------------------------------


@ALL
@torch.no_grad()
def test_pooled_features_do_not_depend_on_it(name):
    kept, dropped = both(name)
    batch = batch_of(name, kept)
    for one, other in zip(encode_batch(kept, batch), encode_batch(dropped, batch), strict=True):
        assert torch.equal(one.pooled, other.pooled)
    kept.prototypes.share_score(1.0)
    dropped.prototypes.share_score(1.0)
    assert torch.equal(kept(**batch).logits_per_image, dropped(**batch).logits_per_image)


@torch.no_grad()
def test_learned_projections_pool_as_before_and_keep_what_the_tokenizer_adds(monkeypatch):
    models = []
    for keep in (True, False):
        with monkeypatch.context() as patch:
            patch.delitem(ENCODERS, "clip")
            torch.manual_seed(3)
            knobs = {"fallback_projection": True, "probe_size": 3, "keep_special_tokens": keep}
            models.append(PicoModel.from_encoder(tiny_encoder(), **knobs).eval())
    batch = batch_of("clip", models[0])
    kept, dropped = (model.encode_texts(**text_inputs(batch, "cpu")) for model in models)
    assert torch.equal(kept.mask, batch["attention_mask"].bool())
    assert torch.equal(dropped.mask, batch["word_mask"])
    assert torch.equal(kept.pooled, dropped.pooled)


@ALL
@torch.no_grad()
def test_it_is_off_by_default_and_a_config_without_the_key_is_one_with_false(name, tmp_path):
    model, inputs = wrapped(name, keep=False), tiny_inputs(encoder=name)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("keep_special_tokens") is False
    path.write_text(json.dumps(values))
    again = PicoModel.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)


# ---- collators -----------------------------------------------------------------------------------


@ALL
@torch.no_grad()
def test_no_collator_can_be_of_another_setting(name):
    kept, dropped = both(name)
    batch, other = batch_of(name, kept), batch_of(name, dropped)
    assert batch.keys() == other.keys()
    assert all(torch.equal(batch[key], other[key]) for key in batch)
    del other["word_mask"]
    # These tokenizers begin every text, which SigLIP's own does not, nor is it in its row.
    begins = int(attends_to_padding(kept))
    for model in (kept, dropped):
        masked, bare = (model(**given).text_features.mask for given in (batch, other))
        if name == "tipsv2" and model is dropped:  # its row names none, the tokenizer adds two
            assert torch.equal(masked, batch["word_mask"])
        else:
            assert torch.equal(masked[:, begins:], bare[:, begins:])


@torch.no_grad()
def test_a_choice_of_words_stays_a_choice():
    model, batch = wrapped(), batch_of("clip", wrapped())
    ids, attended = batch["input_ids"], batch["attention_mask"].bool()
    special = attended & ~batch["word_mask"]
    nouns = (ids == 9) | (ids == 10) | (ids == 3)  # square, disc, red
    found = model.encode_texts(ids, batch["attention_mask"], nouns)
    assert torch.equal(found.mask, nouns | special)
    assert int(special.sum()) == 2 * len(CAPTIONS)


# ---- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "beit+bert", "dinov3+bert", "swin+bert"])
@torch.no_grad()
def test_a_calibration_is_of_patches_and_leaves_special_tokens_alone(name):
    kept, dropped = both(name)
    images = sides(name, kept)[0]
    gallery, reference = [images], [{"pixel_values": images["pixel_values"] * 3 + 1}]
    before, first = kept.encode_images(**images), PREFIX[name]
    for model in (kept, dropped):
        model.calibrate(gallery, reference)
        assert isinstance(model._calibration, StyleCalibration)
    after, patches = kept.encode_images(**images), dropped.encode_images(**images)
    assert torch.equal(after.features[:, :first], before.features[:, :first])
    torch.testing.assert_close(after.features[:, first:], patches.features)
    assert not torch.allclose(after.features[:, first:], before.features[:, first:], atol=1e-3)
    assert torch.equal(after.pooled, patches.pooled)


# ---- cached features -----------------------------------------------------------------------------


def towers(model: PicoModel, name: str = "clip") -> SplitEncoder:
    collate = PicoCollator(tiny_processor(name), config=model.config)
    return SplitEncoder(model, collate, 4, disable_tqdm=True)


@pytest.mark.parametrize(
    "name", ["clip", "siglip", "siglip2", "beit+bert", "tipsv2", "dinov3+bert"]
)
@torch.no_grad()
def test_cached_features_are_live_ones(name, tmp_path):
    model, rows = wrapped(name, pooled_share=0.5), ImageTextDataset(tiny_rows(6))
    encoder = towers(model, name)
    cached = cache_token_features(encoder, rows, tmp_path)
    live, stored = encoder.split(rows), encoder.split(cached)
    for side in ("images", "texts"):
        one, other = getattr(live, side)[:], getattr(stored, side)[:]
        assert one.mask.sum(dim=1).tolist() == other.mask.sum(dim=1).tolist()
        torch.testing.assert_close(other.pooled, one.pooled, atol=5e-3, rtol=0)
        torch.testing.assert_close(
            other.features[other.mask], one.features[one.mask], atol=5e-3, rtol=0
        )


def test_caches_of_both_settings_lie_side_by_side_and_are_not_mixed_up(tmp_path):
    rows, (kept, dropped) = ImageTextDataset(tiny_rows(6)), map(towers, both("clip"))
    assert cache_key(kept, rows) != cache_key(dropped, rows)
    first = cache_token_features(kept, rows, tmp_path)
    second = cache_token_features(dropped, rows, tmp_path)
    for side, more in (("images", 1), ("captions", 2)):
        one, other = getattr(first, side)()[0], getattr(second, side)()[0]
        (key,) = [key for key in one if key.endswith("hidden_states")]
        assert len(one[key]) == len(other[key]) + more
    assert cache_token_features(kept, first, tmp_path) is first
    for encoder, wrong in ((kept, second), (dropped, first.sample(3))):
        with pytest.raises(ValueError, match=r"made with `keep_special_tokens=.*Give it the data"):
            cache_token_features(encoder, wrong, tmp_path)


# ---- an index ------------------------------------------------------------------------------------


def retriever(model: PicoModel, name: str = "clip") -> PicoRetriever:
    return PicoRetriever(model, tiny_processor(name), show_progress=False)


def filled(folder, search: PicoRetriever) -> PicoIndex:
    index = PicoIndex.create(folder, search, dtype="float32")
    index.add([picture(), picture().rotate(90), picture().convert("L")], show_progress=False)
    return index


def test_an_index_finds_by_all_tokens_and_is_refused_in_the_other_setting(tmp_path):
    kept, dropped = map(retriever, both("clip"))
    index = filled(tmp_path / "kept", kept)
    pictures = [picture(), picture().rotate(90), picture().convert("L")]
    expected = kept.score(pictures, CAPTIONS).max(dim=0).values.tolist()
    best = [hits[0].score for hits in index.search(CAPTIONS, top_k=1)]
    assert best == pytest.approx(expected, abs=1e-5)
    PicoIndex.open(tmp_path / "kept", kept)
    with pytest.raises(ValueError, match=r"holds 1 special tokens.*this one keeps 0"):
        PicoIndex.open(tmp_path / "kept", dropped)
    filled(tmp_path / "dropped", dropped)
    with pytest.raises(ValueError, match=r"holds 0 special tokens.*keeps 1 \(`keep_special"):
        PicoIndex.open(tmp_path / "dropped", kept)


def test_an_index_of_images_without_special_tokens_serves_both_settings(tmp_path):
    kept, dropped = (retriever(model, "siglip") for model in both("siglip"))
    filled(tmp_path / "index", dropped)
    assert len(PicoIndex.open(tmp_path / "index", kept)) == 3


def test_an_index_from_before_is_one_without_special_tokens(tmp_path, monkeypatch):
    from pico_hf.search import encoding
    from pico_hf.search.fingerprint import image_side_fingerprint

    def earlier(search) -> dict:
        found = image_side_fingerprint(search)
        return {key: value for key, value in found.items() if key != "special_tokens"}

    kept, dropped = map(retriever, both("clip"))
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "image_side_fingerprint", earlier)
        filled(tmp_path / "index", dropped)
    assert len(PicoIndex.open(tmp_path / "index", dropped)) == 3
    with pytest.raises(ValueError, match=r"holds 0 special tokens"):
        PicoIndex.open(tmp_path / "index", kept)


# ---- explanations --------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("share", [0.0, 1 / 3])
@torch.no_grad()
def test_explanations_sum_to_the_score_and_keep_the_grid(name, share):
    model, processor = wrapped(name), tiny_processor(name)
    model.prototypes.share_score(share)
    found = explain(model, processor, picture(), CAPTION)
    score = float(retriever(model, name).score([picture()], [CAPTION]))
    parts, first = found.weighted, len(found.special_patches)
    assert found.score == pytest.approx(score, abs=1e-5)
    assert float(parts.columns.sum()) == pytest.approx(score, abs=1e-5)
    assert first == prefix_length(model.encoder) == PREFIX[name]
    assert found.grid == GRIDS[name]
    patches, words = parts.products.shape
    assert found.word_maps().shape == (words, *(found.grid or (1, patches)))
    assert torch.equal(found.word_maps().flatten(1), parts.products[first:].T)
    assert torch.equal(found.patch_maps().flatten(0, 1), parts.products[first:])
    special = [found.words[place] for place in found.special_words]
    assert special == (["[EOS]"] if attends_to_padding(model) else ["[BOS]", "[EOS]"])


def test_a_figure_separates_special_tokens_from_patches():
    found = explain(wrapped("dinov3+bert"), tiny_processor(), picture(), CAPTION)
    maps, products, _ = found.figure().subfigs[0].subfigs
    assert "left of the line: CLS, register 1, register 2" in products.axes[0].get_xlabel()
    assert products.axes[0].lines[-1].get_xdata()[0] == 2.5
    drawn = maps.axes[1].images[-1].get_array()
    assert drawn.shape == (4, 4)
    plain = explain(wrapped(keep=False), tiny_processor(), picture(), CAPTION)
    assert plain.special_words == plain.special_patches == ()


def test_the_command_lists_special_tokens_apart(tmp_path):
    model, processor = wrapped("deit+bert"), tiny_processor()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    picture().save(tmp_path / "cat.png")
    paths = [str(tmp_path / name) for name in ("model", "cat.png")]
    found = read("explain", *paths, CAPTION, "--output", tmp_path / "why.png")
    assert [part["word"] for part in found["words"]] == CAPTION.split()
    assert [part["token"] for part in found["special_tokens"]] == [
        "[BOS] (caption)",
        "[EOS] (caption)",
        "CLS (image)",
        "special token 2 (image)",
    ]
    parts = [part["part"] for part in (*found["words"], *found["special_tokens"])]
    total = sum(parts) + found["patches"] + found["pooled"]
    assert total == pytest.approx(found["score"], abs=1e-5)


# ---- files ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_is_saved_with_the_model_and_can_be_changed_when_it_is_loaded(tmp_path):
    kept, dropped = both("clip")
    inputs = tiny_inputs()
    kept.save_pretrained(tmp_path)
    again = PicoModel.from_pretrained(tmp_path)
    assert again.config.keep_special_tokens is True
    assert torch.equal(again(**inputs).logits_per_image, kept(**inputs).logits_per_image)
    other = PicoModel.from_pretrained(tmp_path, keep_special_tokens=False)
    assert torch.equal(other(**inputs).logits_per_image, dropped(**inputs).logits_per_image)
    tiny_encoder().save_pretrained(tmp_path / "plain")
    assert PicoModel.from_pretrained(tmp_path / "plain", keep_special_tokens=True).config.to_dict()[
        "keep_special_tokens"
    ]


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_other_values_are_refused(value):
    with pytest.raises(Exception, match="keep_special_tokens"):
        PicoModel.from_encoder(tiny_encoder(), keep_special_tokens=value)


@torch.no_grad()
def test_an_adapter_brings_it_to_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    from pico_hf import load_adapter_model, pico_lora_config, save_adapter

    tiny_encoder().save_pretrained(tmp_path / "base")
    model = PicoModel.from_pretrained(tmp_path / "base", probe_size=3, keep_special_tokens=True)
    model.prototypes.share_score(0.0)
    config = pico_lora_config(model, r=2, init_lora_weights=False)
    adapted, inputs = peft.get_peft_model(model, config).eval(), tiny_inputs()
    before = adapted(**inputs).logits_per_image
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapter_model(tmp_path / "adapter", base=tmp_path / "base")
    assert again.get_base_model().config.keep_special_tokens is True
    assert torch.equal(again(**inputs).logits_per_image, before)
    merged = PicoModel.from_pretrained(tmp_path / "adapter", base=tmp_path / "base")
    assert merged.config.keep_special_tokens is True


# ---- graphs and bridges --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov3+bert", "beit+bert"])
@torch.no_grad()
def test_exported_programs_keep_what_the_model_keeps(name):
    from pico_hf.graphs.modules import ImageGraph, TextGraph
    from pico_hf.graphs.programs import export_programs

    model = wrapped(name, pooled_share=0.5)
    programs, (images, texts) = export_programs(model), sides(name, model)
    for program, graph, inputs in (
        (programs.image, ImageGraph(model), images),
        (programs.text, TextGraph(model), texts),
    ):
        found, expected = program.module()(**inputs), graph(**inputs)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[2], expected[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_onnx_files_keep_what_the_model_keeps(name, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from pico_hf.graphs.onnx_files import IMAGE_FILE, export_onnx, run_file

    model = wrapped(name)
    export_onnx(model, tmp_path / "graphs")  # compares both files with the model
    images = sides(name, model)[0]
    tokens, _, _ = run_file(tmp_path / "graphs" / IMAGE_FILE, images)
    assert tokens.shape[1] == 16 + PREFIX[name]


@torch.no_grad()
def test_bridges_score_all_tokens():
    mteb = pytest.importorskip("pico_hf.mteb_model")
    bridge = pytest.importorskip("pico_hf.multi_vector")
    model, processor = wrapped(), tiny_processor()
    batch = batch_of("clip", model)
    images, texts = (
        model.encode_images(**image_inputs(batch, "cpu")),
        model.encode_texts(**text_inputs(batch, "cpu")),
    )
    expected = similarity_loop(images, texts, model.column_weights)
    search = retriever(model)
    torch.testing.assert_close(search.score([picture()], CAPTIONS), expected[:1], atol=1e-5, rtol=0)
    encoder = bridge.multi_vector_encoder(model, processor)
    queries, documents = encoder.encode_query(CAPTIONS), encoder.encode_document([picture()])
    assert len(documents[0]) == 17
    found = bridge.both_directions(queries, documents).cpu()
    torch.testing.assert_close(found, expected[:1].T, atol=1e-5, rtol=0)
    tokens = mteb.PicoMteb(model, processor)._encoded({"text": CAPTIONS})
    assert torch.equal(tokens.mask, texts.mask)


def test_a_run_is_told_by_an_option(tmp_path):
    from pico_hf.training.job_options import ModelArguments
    from pico_hf.training.job_sources import load_job_model

    tiny_encoder().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path), keep_special_tokens=True)
    assert load_job_model(args)[0].config.keep_special_tokens is True
