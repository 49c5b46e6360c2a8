"""The wrapped model: faithful, stateless in forward, exact on disk, fp32 where it counts."""

import pytest
import torch
from transformers import AutoModel

from pico_hf import PicoConfig, PicoModel
from tiny import tiny_encoder, tiny_inputs, tiny_refined

# Every architecture is in test_architectures.py; these stand for a row each of another kind.
KINDS = pytest.mark.parametrize("name", ["clip", "siglip", "vit+bert", "swin+bert"])


def wrapped(name: str = "clip", **knobs) -> PicoModel:
    knobs = {"num_prototypes": 3, "probe_size": 3, **knobs}
    return PicoModel.from_encoder(tiny_encoder(name), **{"pooled_share": 0.0, **knobs})


@KINDS
@torch.no_grad()
def test_wrapping_changes_neither_weights_nor_features(name):
    bare, model = tiny_encoder(name), wrapped(name)
    for key, value in bare.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[key]), key
    inputs = tiny_inputs()
    pixels = inputs.pop("pixel_values")
    for method, given in (
        ("get_text_features", inputs),
        ("get_image_features", {"pixel_values": pixels}),
    ):
        before = getattr(bare, method)(**given).pooler_output
        assert torch.equal(getattr(model.encoder, method)(**given).pooler_output, before)


def test_the_causal_mask_of_the_text_tower_survives_wrapping():
    encoder = tiny_encoder("clip")
    used = encoder.config.text_config._attn_implementation
    model = PicoModel.from_encoder(encoder, probe_size=3, pooled_share=0.0)
    assert model.encoder.config.text_config._attn_implementation == used is not None
    ids = tiny_inputs()["input_ids"]
    changed = ids.clone()
    changed[:, -1] = 7  # a causal tower cannot see the last token from the first positions
    with torch.no_grad():
        first, second = (
            model.encode_texts(words, torch.ones_like(words)).features[:, :-1]
            for words in (ids, changed)  # all attended: the mask is not read off the padding
        )
    assert torch.equal(first, second)


@KINDS
@torch.no_grad()
def test_forward_gives_scaled_scores_both_ways_and_the_features_behind_them(name):
    model = tiny_refined(name)
    out = model(**tiny_inputs())
    scores = model.score(out.image_features, out.text_features)
    assert out.logits_per_image.shape == (3, 3)
    assert out.logits_per_image.dtype == scores.dtype == torch.float32
    expected = scores * model.logit_scale.exp() + model.logit_bias
    torch.testing.assert_close(out.logits_per_image, expected)
    assert torch.equal(out.logits_per_text, out.logits_per_image.t())
    assert out.loss.ndim == 0
    norms = out.image_features.features.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_forward_changes_no_state():
    model = tiny_refined().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(**tiny_inputs()).loss.backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@torch.no_grad()
def test_no_loss_is_computed_for_a_matrix_that_is_not_square():
    model, inputs = wrapped(), tiny_inputs()
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    out = model(**inputs)
    assert out.loss is None
    assert out.logits_per_image.shape == (1, 3)
    assert model(**tiny_inputs(), return_loss=False).loss is None


@torch.no_grad()
def test_a_column_of_zero_weight_does_not_matter():
    model, inputs = wrapped(), tiny_inputs()
    images = model.encode_images(inputs["pixel_values"])
    texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
    model.prototypes.semantic_probability[3] = 0.0
    scores = model.score(images, texts)
    texts.features[..., 3] = 9.0
    torch.testing.assert_close(model.score(images, texts), scores)
    assert model.column_weights.mean() == pytest.approx(1.0)


@KINDS
@torch.no_grad()
def test_a_saved_model_scores_exactly_as_before(name, tmp_path):
    model = tiny_refined(name).eval()
    model.save_pretrained(tmp_path)
    for again in (PicoModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(again) is PicoModel
        inputs = tiny_inputs()
        assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
        for key, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key


@KINDS
def test_files_name_weights_as_the_live_modules_do(name, tmp_path):
    from safetensors import safe_open

    model = wrapped(name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


@torch.no_grad()
def test_a_plain_clip_repository_is_wrapped_with_its_own_weights(tmp_path):
    bare = tiny_encoder("clip")
    bare.save_pretrained(tmp_path)
    model = PicoModel.from_pretrained(tmp_path, num_prototypes=2)
    assert model.config.num_prototypes == 2
    inputs = tiny_inputs()
    pixels = inputs["pixel_values"]
    expected = bare.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(
        model.encoder.get_image_features(pixel_values=pixels).pooler_output, expected
    )


def test_a_misspelt_knob_is_refused_when_a_plain_repository_is_wrapped(tmp_path):
    tiny_encoder("clip").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Did you mean `num_prototypes`"):
        PicoModel.from_pretrained(tmp_path, nun_prototypes=2)


def test_two_towers_are_joined_and_wrapped(tmp_path):
    pair = tiny_encoder("vit+bert")
    pair.vision_model.save_pretrained(tmp_path / "vision")
    pair.text_model.save_pretrained(tmp_path / "text")
    model = PicoModel.from_vision_text_pretrained(
        tmp_path / "vision", tmp_path / "text", num_prototypes=2
    )
    assert model.config.num_prototypes == 2
    assert model(**tiny_inputs()).logits_per_image.shape == (3, 3)


@torch.no_grad()
def test_half_precision_loads_with_exact_statistics_and_fp32_scores(tmp_path):
    model = tiny_refined()
    model.save_pretrained(tmp_path)
    half = PicoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.encoder.dtype == torch.bfloat16
    for name, buffer in model.prototypes.named_buffers():
        assert torch.equal(dict(half.prototypes.named_buffers())[name], buffer), name
    inputs = tiny_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert half(**inputs).logits_per_image.dtype == torch.float32


def test_a_checkpoint_without_prototypes_gets_fresh_ones(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_refined().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not k.startswith("prototypes.")}
    save_file(kept, path, metadata={"format": "pt"})
    model = PicoModel.from_pretrained(tmp_path)
    assert model.semantic_probability.tolist() == [1.0] * 16
    assert model.prototypes.vision.abs().max() == 0
    assert int(model.prototypes.iteration) == 0


def test_more_prototypes_than_columns_are_refused():
    with pytest.raises(ValueError, match="`num_prototypes` must be between 1 and the 16 columns"):
        wrapped(num_prototypes=17)


def test_features_that_are_no_numbers_are_refused():
    model = wrapped()
    with torch.no_grad():
        model.encoder.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="image features contain NaN"):
        model(**tiny_inputs())


def test_frozen_towers_stay_in_eval_mode_and_leave_projections_trainable():
    model = wrapped()
    model.freeze_towers()
    model.train()
    assert model.training
    assert not model.encoder.training
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "encoder.visual_projection.weight" in trainable
    assert not any("encoder.layers" in name for name in trainable)


@torch.no_grad()
def test_cached_hidden_states_give_the_same_logits_as_pixels_and_words():
    from pico_hf.encoders.tokens import image_hidden_states, text_hidden_states

    model, inputs = tiny_refined(), tiny_inputs()
    patches = image_hidden_states(model.encoder, pixel_values=inputs["pixel_values"])
    words = text_hidden_states(
        model.encoder, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    )
    cached = model(
        image_hidden_states=patches.features,
        text_hidden_states=words.features,
        word_mask=words.mask,
    )
    assert torch.equal(cached.logits_per_image, model(**inputs).logits_per_image)


@pytest.mark.parametrize("loss", ["hinge", "infonce", "sigmoid"])
def test_a_training_step_lowers_every_loss(loss):
    model = wrapped(loss=loss).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    values = []
    for _ in range(8):
        value = model(**tiny_inputs()).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]


def test_the_default_configuration_builds():
    assert PicoConfig().encoder_config.model_type == "clip"


def test_column_dropout_leaves_whole_columns_out_in_training_only(monkeypatch):
    from pico_hf.encoders import tokens as encoders

    model = PicoModel.from_encoder(tiny_encoder("clip"), column_dropout=0.5, pooled_share=0.0)
    seen = []
    project = encoders.project
    monkeypatch.setattr(
        encoders,
        "project",
        lambda e, side, hidden, *how: (
            seen.append(hidden.features) or project(e, side, hidden, *how)
        ),
    )
    states = torch.ones(3, 16, 32)
    for training in (False, True):
        model.train(training).encode_images(image_hidden_states=states)
    assert torch.equal(seen[0], states)
    assert set(seen[1].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(seen[1], seen[1][:, :1].expand_as(seen[1]))  # alike in all patches
    assert not torch.equal(seen[1][0], seen[1][1])


@pytest.mark.parametrize("name", ["clip", "siglip", "vit+bert", "owlvit", "groupvit"])
def test_word_embeddings_are_resized_saved_and_loaded(name, tmp_path):
    model = wrapped(name)
    before = model.get_input_embeddings().weight.detach().clone()
    resized = model.resize_token_embeddings(len(before) + 7)
    assert resized is model.get_input_embeddings()
    assert resized.num_embeddings == len(before) + 7
    assert torch.equal(resized.weight[: len(before)], before)
    model.save_pretrained(tmp_path)
    again = PicoModel.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, resized.weight)
