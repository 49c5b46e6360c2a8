import pytest
import torch

from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from reference import similarity_loop


def random_tokens(n, tokens, width, seed, ragged=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, tokens, width, generator=generator, dtype=dtype)
    features = torch.nn.functional.normalize(features, dim=-1)
    mask = torch.ones(n, tokens, dtype=torch.bool)
    if ragged:
        mask = torch.rand(n, tokens, generator=generator) < 0.6
        mask[:, tokens // 2] = True
    return TokenFeatures(features, mask)


@pytest.fixture
def images():
    return random_tokens(5, 7, 6, seed=0)


@pytest.fixture
def texts():
    return random_tokens(4, 5, 6, seed=1)


@pytest.fixture
def weights():
    return torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 1.0])


def test_scores_equal_the_loop_over_real_tokens(images, texts):
    torch.testing.assert_close(similarity(images, texts), similarity_loop(images, texts))


def test_weighted_scores_equal_the_weighted_loop(images, texts, weights):
    expected = similarity_loop(images, texts, weights)
    torch.testing.assert_close(similarity(images, texts, weights), expected)


def test_values_of_padding_never_change_the_score(images, texts):
    expected = similarity(images, texts)
    noisy = [
        TokenFeatures(side.features.masked_fill(~side.mask.unsqueeze(-1), 1e6), side.mask)
        for side in (images, texts)
    ]
    torch.testing.assert_close(similarity(*noisy), expected)


def test_no_gradient_flows_through_column_weights(images, texts, weights):
    weights.requires_grad_()
    assert not similarity(images, texts, weights).requires_grad


def test_slices_and_index_tensors_choose_rows(images):
    assert torch.equal(images[1:3].features, images.features[1:3])
    assert torch.equal(images[torch.tensor([4, 0])].mask, images.mask[[4, 0]])


def test_concatenation_of_ragged_batches_keeps_every_score(images, texts):
    parts = [texts[:1], TokenFeatures(texts[1:].features[:, :4], texts[1:].mask[:, :4])]
    joined = TokenFeatures.concatenate(parts)
    assert joined.features.shape == (4, 5, 6)
    assert not joined.features[1:, 4].any()
    expected = torch.cat([similarity(images, part) for part in parts], dim=1)
    torch.testing.assert_close(similarity(images, joined), expected)


def test_moving_to_a_device_keeps_the_tokens(images):
    assert torch.equal(images.to("cpu").features, images.features)


def test_features_without_a_batch_axis_are_refused(images):
    with pytest.raises(ValueError, match=r"`features` must be of shape \(n, tokens, D\), got"):
        TokenFeatures(images.features[0], images.mask)


def test_an_integer_mask_is_refused(images):
    with pytest.raises(ValueError, match=r"`mask` must be boolean.*int64. Convert it with"):
        TokenFeatures(images.features, images.mask.long())


def test_a_mask_on_another_device_is_refused(images):
    with pytest.raises(ValueError, match=r"`mask` must be on the device of `features` \(cpu\)"):
        TokenFeatures(images.features, images.mask.to("meta"))


def test_two_sides_on_different_devices_are_refused(images, texts):
    with pytest.raises(ValueError, match=r"`texts` must be on the device of `images` \(cpu\)"):
        similarity(images, texts.to("meta"))


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "full"])
def test_no_tensor_is_made_on_another_device_than_that_of_the_features(ragged):
    sides = [random_tokens(5, 70, 6, 0, ragged), random_tokens(4, 5, 6, 1, ragged)]
    for side in sides:
        side.features.requires_grad_()
    expected = similarity(*sides)
    gradients = torch.autograd.grad(expected.sum(), [s.features for s in sides])
    with torch.device("meta"):  # a tensor made without naming a device lands there and fails
        scores = similarity(*sides)
        found = torch.autograd.grad(scores.sum(), [s.features for s in sides])
        with torch.no_grad():
            plain = similarity(*sides)
    torch.testing.assert_close((scores, plain, *found), (expected, expected, *gradients))


def test_a_mask_of_another_length_is_refused(images):
    with pytest.raises(ValueError, match=r"`mask` must be of shape \(5, 7\)"):
        TokenFeatures(images.features, images.mask[:, :-1])


def test_concatenating_nothing_is_refused():
    with pytest.raises(ValueError, match="`parts` must hold at least one batch"):
        TokenFeatures.concatenate([])


def test_texts_of_another_width_are_refused(images):
    with pytest.raises(ValueError, match=r"`texts` must be as wide as `images` \(6 columns\)"):
        similarity(images, random_tokens(2, 3, 4, seed=2))


def test_column_weights_of_another_width_are_refused(images, texts):
    with pytest.raises(ValueError, match=r"`column_weights` must be of shape \(6,\)"):
        similarity(images, texts, torch.ones(5))


@pytest.mark.parametrize("side", ["images", "texts"])
def test_a_row_without_real_tokens_is_refused_by_name(side):
    sides = {"images": random_tokens(3, 4, 6, 0), "texts": random_tokens(3, 4, 6, 1)}
    sides[side].mask[1] = False
    with pytest.raises(ValueError, match=rf"`{side}` must have at least one real token.*\[1\]"):
        similarity(**sides)


def test_no_texts_give_no_scores(images, texts):
    assert similarity(images, texts[:0]).shape == (5, 0)
    assert similarity(images[:0], texts).shape == (0, 4)


def test_reordering_the_items_reorders_the_scores(images, texts):
    rows, columns = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 3, 1, 0])
    expected = similarity(images, texts)[rows][:, columns]
    torch.testing.assert_close(similarity(images[rows], texts[columns]), expected)


def test_float32_scores_are_within_1e_5_of_float64():
    images, texts = random_tokens(6, 50, 512, seed=3), random_tokens(8, 20, 512, seed=4)
    wide = [TokenFeatures(side.features.double(), side.mask) for side in (images, texts)]
    difference = similarity(images, texts) - similarity(*wide)
    assert similarity(*wide).dtype == torch.float64
    assert difference.abs().max() < 1e-5


def test_progress_is_shown_only_on_request(images, texts, capsys):
    similarity(images, texts)
    assert capsys.readouterr().err == ""
    similarity(images, texts, progress=True)
    assert "similarity" in capsys.readouterr().err
