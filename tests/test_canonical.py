"""Canonical columns: moments against loops, planted style, and what a rotation must not change."""

from dataclasses import replace

import pytest
import torch

from pico_hf.core.canonical import CANDIDATES, Candidate, bilinear_form
from pico_hf.core.moments import TokenMoments
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.score_form import ScoreForm
from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures


def random_tokens(seed, items=6, tokens=5, columns=4):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(items, tokens, columns, generator=generator)
    mask = torch.rand(items, tokens, generator=generator) < 0.7
    mask[:, 0] = True
    return TokenFeatures(features, mask)


def random_moments(images=6, captions=2, columns=4) -> PairMoments:
    sides = random_tokens(0, images, 5, columns), random_tokens(1, images * captions, 3, columns)
    owner = torch.arange(images).repeat_interleave(captions)
    return PairMoments(*(TokenMoments.of([side]) for side in sides), owner)


@pytest.mark.parametrize("cut", [6, 2])
def test_moments_are_those_of_the_real_tokens_however_they_are_batched(cut):
    tokens = random_tokens(0)
    batches = [tokens[:cut], tokens[cut:]] if cut < 6 else [tokens]
    moments = TokenMoments.of(batches)
    real = [tokens.features[n][tokens.mask[n]].double() for n in range(6)]
    torch.testing.assert_close(moments.items, torch.stack([item.mean(dim=0) for item in real]))
    torch.testing.assert_close(moments.scatter, torch.cat(real).t().cov(correction=0))


def test_what_is_in_the_padding_counts_for_nothing():
    tokens = random_tokens(0)
    dirty = TokenFeatures(tokens.features.masked_fill(~tokens.mask.unsqueeze(-1), 99), tokens.mask)
    one, other = TokenMoments.of([tokens]), TokenMoments.of([dirty])
    assert torch.equal(one.items, other.items)
    assert torch.equal(one.scatter, other.scatter)


def test_shared_is_the_agreement_of_matched_pairs_less_that_of_all_pairs():
    moments = random_moments()
    images, texts = moments.images.items, moments.texts.items
    matched = torch.zeros(4, 4, dtype=torch.float64)
    every = torch.zeros(4, 4, dtype=torch.float64)
    for text, image in enumerate(moments.text_to_image.tolist()):
        matched += torch.outer(images[image], texts[text]) / len(texts)
        for other in range(len(images)):
            every += torch.outer(images[other], texts[text]) / len(texts) / len(images)
    torch.testing.assert_close(moments.shared, matched - every)


def planted(pairs: int = 400) -> PairMoments:
    """Column 0 is shared, column 1 of images is loud style, column 1 of texts a quiet one."""
    generator = torch.Generator().manual_seed(0)
    meaning = torch.randn(pairs, 1, generator=generator)
    style = [scale * torch.randn(pairs, 1, generator=generator) for scale in (5.0, 0.5)]
    one = torch.ones(pairs, 1, dtype=torch.bool)
    sides = [TokenFeatures(torch.cat([meaning, s], dim=1).unsqueeze(1), one) for s in style]
    return PairMoments(*(TokenMoments.of([side]) for side in sides), torch.arange(pairs))


@pytest.mark.parametrize("scatter", ["items", "tokens"])
def test_a_planted_style_gets_the_lowest_probability_however_loud_it_is(scatter):
    columns = ScoreForm.of(bilinear_form(planted(), Candidate(scatter, 0.1, 1.0)))
    assert columns.image_basis[:, 0].abs().argmax() == 0
    assert columns.text_basis[:, 0].abs().argmax() == 0
    assert columns.semantic_probability[0] == 1
    assert columns.semantic_probability[1] < 0.1


@pytest.mark.parametrize("candidate", CANDIDATES[:3])
def test_the_weighted_interaction_in_canonical_columns_is_the_bilinear_form(candidate):
    form = bilinear_form(random_moments(), candidate)
    columns = ScoreForm.of(form)
    images, texts = random_tokens(2), random_tokens(3)
    rotated = [
        TokenFeatures(side.features @ basis.float(), side.mask)
        for side, basis in ((images, columns.image_basis), (texts, columns.text_basis))
    ]
    met = TokenFeatures(texts.features @ form.t().float(), texts.mask)
    weighted = similarity(*rotated, columns.semantic_probability.float())
    expected = similarity(images, met) / float(torch.linalg.svdvals(form)[0])
    torch.testing.assert_close(weighted, expected, atol=1e-5, rtol=1e-5)
    for side, before in zip(rotated, (images, texts), strict=True):
        torch.testing.assert_close(side.features.norm(dim=2), before.features.norm(dim=2))


def test_few_pairs_leave_the_encoders_own_columns_almost_as_they_are():
    few, many = random_moments(images=2, captions=1), random_moments(images=200, captions=1)
    own = torch.eye(4, dtype=torch.float64)
    candidate = Candidate("items", 1.0, 0.75)
    form = bilinear_form(few, candidate)
    # M has singular values of mean 1; share 0.75 · 2 / (2 + 4) of it
    assert (form - 0.75 * own).abs().max() <= 0.25 * 4
    assert (bilinear_form(many, candidate) - own).norm() > (form - own).norm() / 4


def test_pairs_that_share_nothing_leave_the_encoders_own_columns():
    moments = random_moments()
    constant = replace(moments.texts, items=torch.ones_like(moments.texts.items))
    alone = PairMoments(moments.images, constant, moments.text_to_image)
    assert torch.equal(bilinear_form(alone, CANDIDATES[0]), torch.eye(4, dtype=torch.float64))


def test_rounding_is_not_taken_for_what_pairs_share():
    moments = random_moments()
    alike = moments.texts.items[:1].expand_as(moments.texts.items) * (1 + 1e-15)
    alone = PairMoments(moments.images, replace(moments.texts, items=alike), moments.text_to_image)
    for candidate in CANDIDATES:
        assert torch.equal(bilinear_form(alone, candidate), torch.eye(4, dtype=torch.float64))


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="`batches` must hold at least one real token, got none"):
        TokenMoments.of([])
    tokens = random_tokens(0)
    tokens.mask[1] = False
    with pytest.raises(ValueError, match="at least one real token in every row"):
        TokenMoments.of([tokens])


def test_an_index_of_another_length_is_refused():
    moments = random_moments()
    with pytest.raises(ValueError, match="`text_to_image` must name the image of every text"):
        PairMoments(moments.images, moments.texts, torch.arange(3))
