"""The pair of encoders that the examples run on; its weights come with packages."""

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BertConfig

from pico_hf import PicoModel
from pico_hf.encoders.check import check_encoder

lite_clip = pytest.importorskip("lite_clip", reason="the demo extra is not installed")


def small_pair():
    torch.manual_seed(0)
    text = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    config = lite_clip.LiteClipConfig(
        vision_config={"image_size": 64}, text_config=text, projection_dim=8
    )
    return lite_clip.LiteClipModel(config).eval()


def inputs():
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    return {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
    }


def test_its_token_map_reproduces_its_pooled_features():
    check_encoder(small_pair())


@torch.no_grad()
def test_wrapped_saved_and_loaded_it_scores_as_before(tmp_path):
    model = PicoModel.from_encoder(small_pair(), num_prototypes=2, probe_size=4)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is PicoModel
    out = model(**inputs())
    assert torch.equal(again(**inputs()).logits_per_image, out.logits_per_image)
    assert out.image_features.mask.shape == (2, 4)
    assert out.text_features.mask.tolist() == [
        [False, True, True, False],
        [False, True, False, False],
    ]


def test_frozen_batch_statistics_never_move():
    model = PicoModel.from_encoder(small_pair(), num_prototypes=2, probe_size=4)
    model.freeze_towers()
    before = {n: b.clone() for n, b in model.encoder.named_buffers()}
    model.train()
    model(**inputs()).loss.backward()
    for name, buffer in model.encoder.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.slow
@torch.no_grad()
def test_the_pretrained_towers_load_and_see(tmp_path):
    model, processor = lite_clip.load_lite_clip(32)
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    batch = processor(images=[Image.new("RGB", (50, 90), "red")], text=["red"], return_tensors="pt")
    assert model.get_image_features(batch["pixel_values"]).last_hidden_state.shape == (1, 49, 1280)
    words = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    assert words.last_hidden_state.shape == (1, 3, 384)


def test_a_wrong_size_or_tower_is_refused():
    with pytest.raises(ValueError, match="`vision` must be one of lite0, lite1, lite2, got 'b7'"):
        lite_clip.load_lite_clip(vision="b7")
    with pytest.raises(ValueError, match="`image_size` must be a multiple of 32, got 100"):
        lite_clip.load_lite_clip(image_size=100)
