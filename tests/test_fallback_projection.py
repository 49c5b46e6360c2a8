"""Architectures without a row: refused, unless learned projections are asked for."""

import logging

import pytest
import torch

from pico_hf import PicoConfig, PicoModel
from pico_hf.encoders.table import ENCODERS
from tiny import tiny_encoder, tiny_inputs


@pytest.fixture
def unknown(monkeypatch):
    """A dual encoder that the table does not know."""
    monkeypatch.delitem(ENCODERS, "clip")
    return tiny_encoder("clip")


def test_an_unknown_architecture_is_refused_unless_projections_are_asked_for(unknown):
    with pytest.raises(ValueError, match=r"got model_type 'clip'.*`fallback_projection=True`"):
        PicoModel.from_encoder(unknown)


def test_a_warning_says_that_the_common_space_is_untrained(unknown, caplog):
    with caplog.at_level(logging.WARNING, logger="pico_hf"):
        model = PicoModel.from_encoder(unknown, fallback_projection=True, probe_size=3)
    assert "its common space of 32 columns is untrained" in caplog.text
    assert model.config.fallback_widths == [32, 32, 32]
    assert model.column_weights.shape == (32,)


@torch.no_grad()
def test_learned_projections_come_back_from_disk(unknown, tmp_path):
    model = PicoModel.from_encoder(unknown, fallback_projection=True, probe_size=3)
    model.save_pretrained(tmp_path)
    again, inputs = PicoModel.from_pretrained(tmp_path), tiny_inputs()
    saved, loaded = model.encoder.pico_projection, again.encoder.pico_projection
    assert saved.image.weight.std() > 0
    assert torch.equal(loaded.image.weight, saved.image.weight)
    assert torch.equal(loaded.text.weight, saved.text.weight)
    assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)


@torch.no_grad()
def test_a_row_that_is_added_later_changes_nothing_for_a_saved_model(tmp_path, monkeypatch):
    inputs = tiny_inputs()
    with monkeypatch.context() as patch:
        patch.delitem(ENCODERS, "clip")
        model = PicoModel.from_encoder(tiny_encoder(), fallback_projection=True, probe_size=3)
        model.save_pretrained(tmp_path)
        before = model(**inputs).logits_per_image
    assert "clip" in ENCODERS
    assert torch.equal(PicoModel.from_pretrained(tmp_path)(**inputs).logits_per_image, before)


def test_a_known_architecture_keeps_its_own_projections():
    model = PicoModel.from_encoder(tiny_encoder(), fallback_projection=True, probe_size=3)
    assert model.config.fallback_widths is None
    assert not hasattr(model.encoder, "pico_projection")


def test_a_plain_repository_may_ask_for_projections(unknown, tmp_path):
    unknown.save_pretrained(tmp_path)
    model = PicoModel.from_pretrained(tmp_path, fallback_projection=True, probe_size=3)
    assert model.config.fallback_widths == [32, 32, 32]


def test_with_frozen_towers_the_learned_projections_train(unknown):
    model = PicoModel.from_encoder(unknown, fallback_projection=True, probe_size=3)
    model.freeze_towers()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**tiny_inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {name for name, p in model.encoder.named_parameters() if p.grad is not None}
    assert trained == {"pico_projection.image.weight", "pico_projection.text.weight"}


def test_an_encoder_without_feature_methods_is_refused(unknown):
    with pytest.raises(ValueError, match=r"must have `get_image_features`.*CLIPTextModel has not"):
        PicoModel.from_encoder(unknown.text_model, fallback_projection=True)


def test_widths_that_are_not_three_are_refused():
    with pytest.raises(ValueError, match="`fallback_widths` must be three widths"):
        PicoConfig(fallback_widths=[32, 32])
