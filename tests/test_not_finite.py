"""NaN, infinity and nothing at all: never built into column weights, answered by one line."""

import math

import pytest
import torch

from pico_hf import PicoCollator
from pico_hf.core.alignment import align_columns
from pico_hf.core.canonical import CANDIDATES, PairMoments
from pico_hf.core.metrics import retrieval_metrics
from pico_hf.core.moments import TokenMoments
from pico_hf.core.semantic import column_statistics
from pico_hf.core.style_refinement import refine_style
from pico_hf.core.token_features import TokenFeatures
from pico_hf.training import feedback
from tiny import tiny_encoder, tiny_inputs, tiny_processor, tiny_refined

BAD = [math.nan, math.inf, -math.inf]


def encoded(model) -> tuple[TokenFeatures, TokenFeatures]:
    inputs = tiny_inputs()
    with torch.no_grad():
        images = model.encode_images(inputs["pixel_values"])
        return images, model.encode_texts(inputs["input_ids"], inputs["attention_mask"])


def fresh_canonical():
    from pico_hf import PicoModel

    return PicoModel.from_encoder(tiny_encoder(), num_prototypes=3, probe_size=3, pooled_share=0.0)


def moments_of(model) -> PairMoments:
    return PairMoments(*(TokenMoments.of([side]) for side in encoded(model)), torch.arange(3))


def state_of(prototypes) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in prototypes.state_dict().items()}


def assert_finite(prototypes) -> None:
    for name, value in prototypes.state_dict().items():
        assert bool(torch.isfinite(value).all()), name


# ---- style prototypes ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD)
def test_a_trial_that_is_no_number_leaves_style_prototypes_as_they_are(bad, caplog):
    model = tiny_refined(estimator="paper")
    prototypes = model.prototypes
    prototypes.record(performance=100.0)
    before = state_of(prototypes)
    report = refine_style(prototypes, column_statistics(*encoded(model)), lambda _: bad)
    assert "The trial of the new prototypes gave NaN or infinity and was left out" in caplog.text
    assert (report.gain, report.fused_weight, report.iteration) == (0.0, 0.0, 1)
    assert not bool(prototypes.has_performance)  # or every step would try again
    for name, value in prototypes.state_dict().items():
        assert name == "has_performance" or torch.equal(value, before[name]), name


@pytest.mark.parametrize("bad", BAD)
def test_an_estimate_that_is_not_finite_is_left_out_before_any_trial(bad, caplog):
    model = tiny_refined(estimator="paper")
    before, tried = state_of(model.prototypes), []
    model.prototypes.record(performance=100.0)
    refine_style(
        model.prototypes,
        column_statistics(*encoded(model)),
        tried.append,
        estimate=lambda *_: torch.full((16,), bad),
    )
    assert tried == []
    assert "left out" in caplog.text
    assert torch.equal(model.semantic_probability, before["semantic_probability"])


def test_a_fusion_that_is_no_number_commits_nothing(caplog):
    model = tiny_refined(estimator="paper")
    before = state_of(model.prototypes)
    statistics = column_statistics(*encoded(model))
    refine_style(model.prototypes, statistics, fusion=lambda _: (math.nan, 0.0))
    assert "fused to gave NaN" in caplog.text
    for name, value in model.prototypes.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- canonical columns -----------------------------------------------------------------------


def farther(form: torch.Tensor) -> float:
    """A score that grows with the distance from the encoder columns."""
    return 100.0 + float((form - torch.eye(len(form)).to(form)).norm())


@pytest.mark.parametrize("bad", BAD)
def test_candidates_whose_trial_is_no_number_are_left_out(bad, caplog):
    """The other candidates give what they give without those."""
    model, other = fresh_canonical(), fresh_canonical()
    calls = []

    def trial(form):
        calls.append(form)
        if 1 < len(calls) <= 1 + len(CANDIDATES) and len(calls) % 2:
            return bad
        return farther(form)

    moments = moments_of(model)
    reports = align_columns(model.prototypes, moments, trial)
    assert "9 of 18 candidates for canonical columns gave NaN or infinity" in caplog.text
    told = CANDIDATES[::2]
    expected = align_columns(other.prototypes, moments, farther, told)
    assert [report.fused_weight for report in reports[1::2]] == [0.0] * 9
    assert [r.fused_weight for r in reports[::2]] == [r.fused_weight for r in expected]
    assert [report.gain for report in reports[1::2]] == [0.0] * 9
    assert_finite(model.prototypes)
    assert torch.equal(model.semantic_probability, other.semantic_probability)
    assert model.column_weights.std() > 0


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["all", "the encoder columns", "the fused one"])
def test_without_a_trial_that_tells_the_encoder_columns_stay(bad, which, caplog):
    model = fresh_canonical()
    calls = []

    def trial(form):
        calls.append(form)
        first, last = len(calls) == 1, len(calls) > 1 + len(CANDIDATES)
        chosen = {"all": True, "the encoder columns": first, "the fused one": last}[which]
        return bad if chosen else 100.0

    reports = align_columns(model.prototypes, moments_of(model), trial)
    assert {report.fused_weight for report in reports} == {0.0}
    assert {report.gain for report in reports} == {0.0}
    assert model.column_weights.tolist() == [1.0] * 16
    assert_finite(model.prototypes)
    assert caplog.text


def test_a_commit_of_what_is_not_finite_changes_nothing():
    prototypes = tiny_refined(estimator="paper").prototypes
    before = state_of(prototypes)
    good, bad = torch.ones(16), torch.full((3, 3), math.nan)
    for values in ({"semantic_probability": good * math.inf}, {"vision": bad}):
        values = {"semantic_probability": good, **values}
        with pytest.raises(ValueError, match="must be finite, got NaN or infinity"):
            prototypes.commit(iteration=7, log_total_gain=0.0, **values)
    for name, value in prototypes.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("estimator", ["paper", "canonical"])
def test_trials_whose_scores_are_nan_do_not_stop_a_run(make_trainer, monkeypatch, estimator):
    """As a device of few bits may give, when a candidate is large."""
    trainer = make_trainer(estimator=estimator, num_train_epochs=2)

    def overflowed(model, split, *weights):
        return retrieval_metrics(torch.full((2, 2), math.nan), torch.arange(2))

    monkeypatch.setattr(feedback, "evaluate_retrieval", overflowed)
    monkeypatch.setattr(feedback, "evaluate_form", overflowed)
    trainer.train()
    assert trainer.pico_model.column_weights.tolist() == [1.0] * 16
    assert_finite(trainer.pico_model.prototypes)
    logged = [e["pico_feedback"] for e in trainer.state.log_history if "pico_feedback" in e]
    assert set(logged) == {0.0}


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
