"""Alignment: forms fused by what they brought, committed by named calls only."""

import pytest
import torch

from comparisons import FUSION_RULES
from pico_hf import PicoConfig
from pico_hf.core.alignment import align_columns
from pico_hf.core.canonical import CANDIDATES, bilinear_form
from pico_hf.core.fusion import fuse_forms
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.semantic import column_statistics
from pico_hf.core.style_refinement import refine_style
from pico_hf.core.token_features import TokenFeatures
from test_canonical import random_moments, random_tokens
from tiny import tiny_inputs, tiny_refined


def prototypes(canonical: bool = True) -> StylePrototypes:
    return StylePrototypes(4, 2, 3, canonical=canonical)


def test_canonical_is_what_a_model_has_unless_told_otherwise():
    assert PicoConfig().estimator == "canonical"


def test_a_form_that_brought_more_weighs_more_whatever_the_order():
    forms = [torch.full((1, 1), float(n)).double() for n in (10, 100, 1000)]
    gains = [3.0, -2.0, 8.0]
    weights = torch.softmax(torch.tensor([0.0, *gains]) / 5.0, dim=0).double()
    expected = weights[0] + sum(w * form for w, form in zip(weights[1:], forms, strict=True))
    torch.testing.assert_close(fuse_forms(forms, gains)[0], expected, rtol=1e-6, atol=0)
    backwards = fuse_forms(forms[::-1], gains[::-1])[0]
    torch.testing.assert_close(backwards, expected, rtol=1e-6, atol=0)


def test_the_last_form_alone_counts_for_the_rule_last():
    forms = [torch.full((1, 1), float(n)).double() for n in (10, 100)]
    assert fuse_forms(forms, [0.0, 0.0], FUSION_RULES["last"])[0].item() == 100
    assert fuse_forms(forms, [0.0, 0.0], FUSION_RULES["uniform"])[0].item() == pytest.approx(
        111 / 3
    )


def test_before_the_alignment_tokens_are_the_encoders_own_bit_for_bit():
    tokens, module = random_tokens(0), prototypes()
    for side in ("image", "text"):
        assert torch.equal(module.to_columns(tokens, side).features, tokens.features)
    assert module.semantic_probability.tolist() == [1.0] * 4


def test_without_a_trial_all_candidates_count_alike():
    module, moments = prototypes(), random_moments()
    reports = align_columns(module, moments)
    assert [report.gain for report in reports] == [0.0] * len(CANDIDATES)
    own = torch.eye(4, dtype=torch.float64)
    mean = torch.stack([own, *(bilinear_form(moments, c) for c in CANDIDATES)]).mean(dim=0)
    basis = module.image_basis @ module.semantic_probability.diag() @ module.text_basis.t()
    torch.testing.assert_close(basis * float(torch.linalg.svdvals(mean)[0]), mean.float())


def test_every_candidate_is_tried_against_the_encoders_own_columns():
    tried = []

    def trial(form):
        tried.append(form)
        return 100.0 + len(tried)

    reports = align_columns(prototypes(), random_moments(), trial, CANDIDATES[:3])
    assert torch.equal(tried[0], torch.eye(4, dtype=torch.float64))
    assert [report.gain for report in reports] == [1.0, 2.0, 3.0]
    assert [report.iteration for report in reports] == [1, 2, 3]
    assert len(tried) == 5  # at last the fused one


def test_columns_that_score_less_than_the_encoders_own_are_not_taken(caplog):
    module = prototypes()
    reports = align_columns(
        module, random_moments(), lambda form: -float((form - torch.eye(4)).norm())
    )
    assert {report.fused_weight for report in reports} == {0.0}
    assert "less than the encoder columns on the dev split" in caplog.text
    assert module.semantic_probability.tolist() == [1.0] * 4
    tokens = random_tokens(0)
    one, other = (module.to_columns(tokens, side).features for side in ("image", "text"))
    torch.testing.assert_close(one @ other.mT, tokens.features @ tokens.features.mT)


def test_the_way_to_canonical_columns_and_back_ends_where_it_began():
    module, tokens = prototypes(), random_tokens(0)
    align_columns(module, random_moments())
    there = module.to_columns(tokens, "image")
    assert not torch.allclose(there.features, tokens.features, atol=1e-2)
    back = module.to_encoder_columns(there, "image").features
    torch.testing.assert_close(back, tokens.features, atol=1e-5, rtol=1e-5)


def test_a_trial_that_fails_changes_nothing():
    module = prototypes()
    align_columns(module, random_moments())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="power cut"):
        align_columns(module, random_moments(captions=3), _power_cut)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def _power_cut(form):
    raise RuntimeError("power cut")


def test_restart_goes_back_to_the_encoders_own_columns():
    module = prototypes()
    align_columns(module, random_moments())
    module.restart(5)
    assert torch.equal(module.image_basis, torch.eye(4))
    assert module.semantic_probability.tolist() == [1.0] * 4
    assert int(module.iteration) == 0


def test_loaded_columns_are_used_at_once():
    aligned, fresh, tokens = prototypes(), prototypes(), random_tokens(0)
    align_columns(aligned, random_moments())
    fresh.to_columns(tokens, "image")
    fresh.load_state_dict(aligned.state_dict())
    one, other = (module.to_columns(tokens, "image").features for module in (fresh, aligned))
    assert torch.equal(one, other)
    fresh.load_state_dict(prototypes().state_dict())
    assert torch.equal(fresh.to_columns(tokens, "image").features, tokens.features)


@torch.no_grad()
def test_mixed_precision_rounds_no_rotated_token():
    module, tokens = prototypes(), random_tokens(0)
    align_columns(module, random_moments())
    exact = module.to_columns(tokens, "image").features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module.to_columns(tokens, "image").features
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, exact)


@torch.no_grad()
def test_a_model_scores_what_its_bilinear_form_scores():
    model = tiny_refined()
    inputs = tiny_inputs()
    images = model.encode_images(inputs["pixel_values"])
    texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
    module = model.prototypes
    form = module.image_basis @ model.column_weights.diag() @ module.text_basis.t()
    own = module.to_encoder_columns(images, "image"), module.to_encoder_columns(texts, "text")
    met = TokenFeatures(own[1].features @ form.t(), own[1].mask)
    expected = model.score(own[0], met, torch.ones(len(form)))
    torch.testing.assert_close(model.score(images, texts), expected, atol=1e-5, rtol=1e-5)
    assert model.column_weights.std() > 0


def test_style_prototypes_are_not_refined_on_canonical_columns_nor_the_other_way_round():
    with pytest.raises(ValueError, match="has no style prototypes to refine"):
        refine_style(prototypes(), column_statistics(random_tokens(0), random_tokens(1)))
    with pytest.raises(
        ValueError, match=r'`align_columns` needs `estimator="canonical"`, got "paper"'
    ):
        align_columns(prototypes(canonical=False), random_moments())


def test_moments_of_another_width_are_refused():
    with pytest.raises(ValueError, match="`moments` must have the encoder's 4 columns, got 6"):
        align_columns(prototypes(), random_moments(columns=6))


def test_no_candidates_are_refused():
    with pytest.raises(ValueError, match="`candidates` must hold at least one"):
        align_columns(prototypes(), random_moments(), candidates=[])
