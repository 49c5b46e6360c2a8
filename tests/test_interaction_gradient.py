import pytest
import torch

from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.kernels import interaction_gradient, late_interaction
from pico_hf.kernels.interaction_gradient import bags, column_blocks
from reference import similarity_loop

WEIGHTS = torch.tensor([0.0, 0.5, 1.5, 2.0], dtype=torch.float64)


def random_tokens(n, tokens, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, tokens, 4, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(n, tokens, generator=generator) < 0.6
    mask[:, tokens // 2] = True
    return TokenFeatures(features.requires_grad_(), mask)


@pytest.fixture
def images():
    return random_tokens(5, 6, seed=0)


@pytest.fixture
def texts():
    return random_tokens(4, 5, seed=1)


@pytest.fixture
def incoming():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gradients(score, images, texts, incoming, *args):
    scores = score(images, texts, *args)
    return torch.autograd.grad((scores * incoming).sum(), [images.features, texts.features])


def assert_same_gradients(actual, expected, **tolerance):
    for side, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want, msg=lambda m, s=side: f"side {s}: {m}", **tolerance)


def test_gradients_equal_autograd_of_the_loop(images, texts, incoming):
    expected = gradients(similarity_loop, images, texts, incoming)
    assert_same_gradients(gradients(similarity, images, texts, incoming), expected)


def test_weighted_gradients_equal_autograd_of_the_loop(images, texts, incoming):
    expected = gradients(similarity_loop, images, texts, incoming, WEIGHTS)
    assert_same_gradients(gradients(similarity, images, texts, incoming, WEIGHTS), expected)


def test_gradients_pass_the_numerical_check(images, texts):
    def score(image_features, text_features):
        sides = (image_features, images.mask), (text_features, texts.mask)
        return similarity(*(TokenFeatures(*side) for side in sides), WEIGHTS)

    assert torch.autograd.gradcheck(score, (images.features, texts.features))


def test_pairs_without_gradient_pass_none(images, texts, incoming):
    few = torch.zeros_like(incoming)
    few[1, 2], few[3, 0], few[3, 3] = 1.0, -2.0, 0.5
    expected = gradients(similarity_loop, images, texts, few)
    actual = gradients(similarity, images, texts, few)
    assert_same_gradients(actual, expected)
    assert not actual[0][[0, 2, 4]].any()
    assert not actual[1][1].any()


def test_a_zero_gradient_passes_zeros(images, texts, incoming):
    for gradient in gradients(similarity, images, texts, torch.zeros_like(incoming)):
        assert not gradient.any()


def test_block_sizes_never_change_scores_or_gradients(images, texts, incoming, monkeypatch):
    scores, expected = similarity(images, texts), gradients(similarity, images, texts, incoming)
    monkeypatch.setattr(late_interaction, "BLOCK_ELEMENTS", 12)
    monkeypatch.setattr(late_interaction, "BLOCK_PATCHES", 4)
    monkeypatch.setattr(interaction_gradient, "BAG_ENTRIES", 20)
    monkeypatch.setattr(interaction_gradient, "BAG_PATCHES", 8)
    monkeypatch.setattr(interaction_gradient, "BAG_COLUMNS", 3)
    torch.testing.assert_close(similarity(images, texts), scores)
    assert_same_gradients(gradients(similarity, images, texts, incoming), expected)


def test_items_of_more_than_256_tokens_keep_their_gradients(incoming):
    images, texts = random_tokens(2, 600, seed=3), random_tokens(2, 5, seed=4)
    expected = gradients(similarity_loop, images, texts, incoming[:2, :2])
    assert_same_gradients(gradients(similarity, images, texts, incoming[:2, :2]), expected)


def test_the_first_of_tied_tokens_takes_the_whole_gradient():
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], requires_grad=True)
    words = torch.tensor([[[1.0, 0.0]]])
    images = TokenFeatures(features, torch.ones(1, 2, dtype=torch.bool))
    similarity(images, TokenFeatures(words, images.mask[:, :1])).sum().backward()
    # Half of the word's mean over both patches, and all of the word's best patch for the first.
    assert features.grad.tolist() == [[[1.5, 0.0], [0.5, 0.0]]]


def test_nan_in_padding_reaches_no_gradient(images, texts, incoming):
    expected = gradients(similarity, images, texts, incoming)
    dirty = [
        TokenFeatures(side.features.masked_fill(~side.mask.unsqueeze(2), torch.nan), side.mask)
        for side in (images, texts)
    ]
    assert_same_gradients(gradients(similarity, *dirty, incoming), expected)


@pytest.mark.parametrize("side", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing(images, texts, incoming, side):
    expected = gradients(similarity, images, texts, incoming)[1 - side]
    sides = [images, texts]
    sides[side] = TokenFeatures(sides[side].features.detach(), sides[side].mask)
    (similarity(*sides) * incoming).sum().backward()
    assert sides[side].features.grad is None
    torch.testing.assert_close(sides[1 - side].features.grad, expected)


def test_non_contiguous_features_get_the_same_gradients(images, texts, incoming):
    expected = gradients(similarity, images, texts, incoming)
    strided = images.features.detach().transpose(1, 2).contiguous().transpose(1, 2)
    odd = TokenFeatures(strided.requires_grad_(), images.mask)
    assert_same_gradients(gradients(similarity, odd, texts, incoming), expected)


def test_half_precision_features_get_gradients_of_their_own_precision(incoming):
    images = random_tokens(5, 6, seed=0, dtype=torch.bfloat16)
    texts = random_tokens(4, 5, seed=1, dtype=torch.bfloat16)
    wide = [
        TokenFeatures(s.features.detach().float().requires_grad_(), s.mask) for s in (images, texts)
    ]
    weights, incoming = WEIGHTS.float(), incoming.float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = similarity(images, texts, weights)
        actual = gradients(similarity, images, texts, incoming, weights)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, similarity(*wide, weights))
    expected = [g.bfloat16() for g in gradients(similarity, *wide, incoming, weights)]
    assert_same_gradients(actual, expected)


def test_gradients_are_the_same_to_the_bit_in_every_run(images, texts, incoming):
    first, second = (gradients(similarity, images, texts, incoming) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_second_differentiation_is_refused(images, texts):
    with pytest.raises(RuntimeError, match=r"`similarity` cannot be differentiated twice"):
        torch.autograd.grad(similarity(images, texts).sum(), images.features, create_graph=True)


def test_bags_without_entries_are_zero():
    none = torch.zeros(0, dtype=torch.long)
    [(columns, sums)] = bags(column_blocks(torch.ones(2, 3)), none, none, torch.zeros(0), 2)
    assert columns == slice(0, 3)
    assert sums.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
