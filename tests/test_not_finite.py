"""NaN, infinity and nothing at all: never built into column weights, answered by one line."""

import math

import pytest
import torch

from pico_hf import PicoCollator
from pico_hf.core.token_features import TokenFeatures
from pico_hf.training import trials
from pico_hf.training.evaluation import GalleryScores
from pico_hf.training.feedback_log import logged_refinements
from tiny import tiny_inputs, tiny_processor, tiny_refined


def encoded(model) -> tuple[TokenFeatures, TokenFeatures]:
    inputs = tiny_inputs()
    with torch.no_grad():
        images = model.encode_images(inputs["pixel_values"])
        return images, model.encode_texts(inputs["input_ids"], inputs["attention_mask"])


def assert_finite(prototypes) -> None:
    for name, value in prototypes.state_dict().items():
        assert bool(torch.isfinite(value).all()), name


# ---- feedback --------------------------------------------------------------------------------


@pytest.mark.parametrize("estimators", [["style"], ["canonical"]])
def test_trials_whose_scores_are_nan_do_not_stop_a_run(make_trainer, monkeypatch, estimators):
    """As a device of few bits may give, when a candidate is large."""
    trainer = make_trainer(estimators=estimators, num_train_epochs=2)

    def overflowed(model, split, form):
        yield GalleryScores(*[None] * 2, torch.full((2, 2), math.nan), torch.arange(2), None)

    monkeypatch.setattr(trials, "gallery_scores", overflowed)
    trainer.train()
    assert trainer.pico_model.column_weights.tolist() == [1.0] * 16
    assert_finite(trainer.pico_model.prototypes)
    assert {e["feedback"] for e in logged_refinements(trainer.state.log_history)} == {0.0}


# ---- nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["clip", "siglip", "vit+bert"])
def test_no_images_or_no_texts_are_one_clear_line(encoder):
    model = tiny_refined(encoder)
    inputs = tiny_inputs(encoder=encoder)
    none = {name: value[:0] for name, value in inputs.items()}
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="`pixel_values` must hold at least one row, got none"):
        model.encode_images(none["pixel_values"])
    with pytest.raises(ValueError, match="`pixel_values` must hold at least one row, got none"):
        model(pixel_values=none["pixel_values"], **words)
    with pytest.raises(ValueError, match="`input_ids` must hold at least one row, got none"):
        model.encode_texts(none["input_ids"], none["attention_mask"])
    with pytest.raises(ValueError, match="`pixel_values` must hold at least one row, got none"):
        model.get_image_features(none["pixel_values"])


def test_scores_of_nothing_are_empty():
    model = tiny_refined()
    images, texts = encoded(model)
    no_images, no_texts = (TokenFeatures(s.features[:0], s.mask[:0]) for s in (images, texts))
    assert model.score(no_images, texts).shape == (0, 3)
    assert model.score(images, no_texts).shape == (3, 0)


def test_a_batch_of_no_rows_is_one_clear_line():
    with pytest.raises(ValueError, match="`rows` must hold at least one row, got none"):
        PicoCollator(tiny_processor())([])
