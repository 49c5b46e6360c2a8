"""Features of a text are its own: no padding, on either side, changes them."""

import pytest
import torch
import transformers as hf

from pico_hf import PicoCollator, PicoModel
from pico_hf.encoders.padding import text_positions
from pico_hf.encoders.text_lengths import text_lengths
from tiny import tiny_encoder, tiny_processor
from tiny_encoders import BERT, BUILDERS

TEXTS = ["disc", "a big red square", "red disc on a small blue square"]


def words_of(model, batch, row):
    texts = model.encode_texts(**batch)
    return texts.features[row][texts.mask[row]]


@pytest.mark.parametrize("keep", [("input_ids", "attention_mask"), ("input_ids",)])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", sorted(BUILDERS))
@torch.no_grad()
def test_a_text_has_the_same_features_alone_and_padded(name, side, keep):
    model = PicoModel.from_encoder(
        tiny_encoder(name), num_prototypes=3, probe_size=8, pooled_share=0.0
    ).eval()
    tokenizer = tiny_processor().tokenizer
    fixed, _ = text_lengths(model.encoder.config)
    if fixed:
        tokens = {"padding": "max_length", "max_length": fixed, "padding_side": "right"}
        keep = ("input_ids",)  # as such towers were trained
    else:
        tokens = {"padding": True, "padding_side": side}
    batch = {key: tokenizer(TEXTS, return_tensors="pt", **tokens)[key] for key in keep}
    for row, text in enumerate(TEXTS):
        one = tokenizer([text], return_tensors="pt", **tokens)
        alone = words_of(model, {key: one[key] for key in keep}, 0)
        # siglip and tipsv2 know no BOS: the tokenizer's counts as a word
        assert name in ("siglip", "siglip2", "tipsv2") or len(alone) == len(text.split())
        torch.testing.assert_close(words_of(model, batch, row), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@torch.no_grad()
def test_a_long_caption_is_cut_to_what_the_tower_takes(name):
    model = PicoModel.from_encoder(
        tiny_encoder(name), num_prototypes=3, probe_size=8, pooled_share=0.0
    ).eval()
    processor = tiny_processor()
    processor.tokenizer.model_max_length = int(1e30)
    collate = PicoCollator(processor, config=model.config)
    ids = collate([{"caption": "red " * 600}])["input_ids"]
    positions = text_lengths(model.encoder.config)[1]
    assert ids.shape[1] == positions
    assert model.encode_texts(ids).features.isfinite().all()


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (hf.BertConfig(**BERT, pad_token_id=1), 64),
        (hf.RobertaConfig(**BERT, pad_token_id=1), 62),
        (hf.XLMRobertaConfig(**BERT, pad_token_id=0), 63),
        (hf.CamembertConfig(**BERT, pad_token_id=1), 62),
        (hf.MPNetConfig(**BERT, pad_token_id=1), 62),
        (hf.CLIPTextConfig(max_position_embeddings=77), 77),
    ],
)
def test_positions_are_counted_as_the_tower_counts_them(config, tokens):
    assert text_positions(config) == tokens


def test_a_max_length_beyond_the_tower_is_refused():
    config = tiny_encoder("vit+roberta").config
    message = r"`max_length` must be at most 63, .* got 64\. Pass a smaller one"
    with pytest.raises(ValueError, match=message):
        PicoCollator(tiny_processor(), max_length=64, config=config)
    assert PicoCollator(tiny_processor(), max_length=63, config=config).max_length == 63


def test_a_tokenizer_that_pads_left_gives_batches_padded_right():
    processor = tiny_processor()
    processor.tokenizer.padding_side = "left"
    batch = PicoCollator(processor)([{"caption": text} for text in TEXTS])
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
