"""One path to token features per architecture, faithful to the encoder it wraps."""

import pytest
import torch
from transformers import (
    DistilBertConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from pico_hf.encoders.check import check_encoder
from pico_hf.encoders.projection_modules import projection_parameters
from pico_hf.encoders.spec import EncoderSpec, Step, TokenMap
from pico_hf.encoders.table import ENCODERS, register_encoder
from pico_hf.encoders.tokens import (
    image_hidden_states,
    project,
    text_hidden_states,
)
from tiny import BUILDERS, tiny_encoder, tiny_inputs
from tiny_encoders import VISION

ALL = pytest.mark.parametrize("name", sorted(BUILDERS))


@ALL
@torch.no_grad()
def test_special_tokens_and_padding_are_no_words(name):
    encoder, inputs = tiny_encoder(name), tiny_inputs(encoder=name)
    ids, attended = inputs["input_ids"], inputs["attention_mask"]
    words = text_hidden_states(encoder, input_ids=ids, attention_mask=attended).mask
    kept = {"siglip": [1], "siglip2": [1], "tipsv2": [1, 2]}  # of their texts' BOS 1 and EOS 2
    special = torch.isin(ids, torch.tensor([i for i in (1, 2) if i not in kept.get(name, [])]))
    assert torch.equal(words, attended.bool() & ~special)


@torch.no_grad()
def test_left_padding_drops_the_same_words():
    encoder = tiny_encoder("vit+bert")
    ids = torch.tensor([[0, 0, 1, 5, 6, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    words = text_hidden_states(encoder, input_ids=ids, attention_mask=mask).mask
    assert words.tolist() == [[False, False, False, True, True, False]]


@torch.no_grad()
def test_a_text_of_special_tokens_alone_keeps_them():
    encoder = tiny_encoder("clip")
    words = text_hidden_states(encoder, input_ids=torch.tensor([[1, 2]])).mask
    assert words.tolist() == [[True, True]]


@torch.no_grad()
def test_siglip_without_an_attention_mask_counts_no_padding_as_words():
    encoder = tiny_encoder("siglip")
    words = text_hidden_states(encoder, input_ids=torch.tensor([[5, 6, 2, 2, 2]])).mask
    assert words.tolist() == [[True, True, False, False, False]]


@torch.no_grad()
def test_siglip_2_pads_with_another_token_than_its_config_says():
    encoder = tiny_encoder("siglip")  # the config's pad token 2 is the EOS of this text
    words = text_hidden_states(encoder, input_ids=torch.tensor([[5, 0, 6, 2, 0, 0]])).mask
    assert words.tolist() == [[True, True, True, False, False, False]]


@ALL
def test_only_projections_get_gradients_from_cached_hidden_states(name):
    encoder, inputs = tiny_encoder(name), tiny_inputs(encoder=name)
    texts = {key: inputs.pop(key) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        patches = image_hidden_states(encoder, **inputs)
        words = text_hidden_states(encoder, **texts)
    total = torch.zeros(())
    for side, hidden in (("image", patches), ("text", words)):
        hidden.features.requires_grad_()
        projected = project(encoder, side, hidden)
        total = total + projected.features.pow(2).sum() + projected.pooled.pow(2).sum()
    total.backward()
    touched = {n for n, p in encoder.named_parameters() if p.grad is not None}
    assert touched <= set(projection_parameters(encoder))
    assert touched or name == "tipsv2"  # whose towers end in one space


def test_a_wrong_row_is_found_out_when_wrapping(monkeypatch):
    wrong = EncoderSpec(TokenMap((Step("visual_projection"),), prefix=1), ENCODERS["clip"].text)
    monkeypatch.setitem(ENCODERS, "clip", wrong)  # post_layernorm forgotten
    with pytest.raises(ValueError, match="image tokens of CLIPModel do not reproduce its pooled"):
        check_encoder(tiny_encoder("clip"))


def test_a_text_tower_without_a_pooler_is_refused():
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**VISION), DistilBertConfig(dim=32, hidden_dim=37, n_layers=1, n_heads=4)
    )
    with pytest.raises(
        ValueError, match=r"VisionTextDualEncoderModel has no module `text_model.po"
    ):
        check_encoder(VisionTextDualEncoderModel(config))


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones():
    encoder = tiny_encoder("clip")
    encoder.config.model_type = "whisper"
    with pytest.raises(ValueError, match=r"got model_type 'whisper'. Supported: .*clip.*siglip"):
        check_encoder(encoder)


def test_an_encoder_without_token_features_is_refused(monkeypatch):
    encoder = tiny_encoder("clip")
    full = encoder.get_image_features

    def pooled_only(**inputs):
        out = full(**inputs)
        out.last_hidden_state = None
        return out

    monkeypatch.setattr(encoder, "get_image_features", pooled_only)
    with pytest.raises(ValueError, match="gives no image token features"):
        check_encoder(encoder)


def test_outsiders_can_add_an_architecture(monkeypatch):
    monkeypatch.delitem(ENCODERS, "clip")
    register_encoder("clip", EncoderSpec(_image(), _text()))
    check_encoder(tiny_encoder("clip"))


def _image() -> TokenMap:
    return TokenMap((Step("vision_model.post_layernorm"), Step("visual_projection")), prefix=1)


def _text() -> TokenMap:
    return TokenMap((Step("text_projection"),), prefix=1, suffix=1)
