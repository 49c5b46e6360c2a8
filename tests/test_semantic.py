import pytest
import torch

from comparisons import Product
from pico_hf.core.score_form import column_weights
from pico_hf.core.semantic import (
    ColumnStatistics,
    column_statistics,
    semantic_probability,
    standardise,
    style_score,
)
from pico_hf.core.style import StyleClusters
from pico_hf.core.token_features import TokenFeatures
from reference import (
    column_means_loop,
    pseudo_semantic_probability_loop,
    semantic_probability_loop,
)


def ragged_tokens(pairs, tokens, width, seed, zeros=True):
    """Random features a third of which are exactly 0, and padding that would be noticed."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(pairs, tokens, width, generator=generator)
    if zeros:
        features[torch.rand(features.shape, generator=generator) < 0.3] = 0.0
    mask = torch.rand(pairs, tokens, generator=generator) < 0.6
    mask[:, tokens // 2] = True
    return TokenFeatures(features.masked_fill(~mask.unsqueeze(-1), 50.0), mask)


@pytest.fixture
def images():
    return ragged_tokens(6, 5, 8, seed=0)


@pytest.fixture
def texts():
    return ragged_tokens(6, 4, 8, seed=1)


def of_one_pair(patches, words):
    """Statistics of one column, from its values over patches and words."""
    sides = (
        TokenFeatures(torch.tensor(values).view(1, -1, 1), torch.ones(1, len(values)).bool())
        for values in (patches, words)
    )
    return column_statistics(*sides).pseudo_semantic_probability.item()


def test_p_hat_equals_the_double_loop_exactly_zeros_included(images, texts):
    expected = pseudo_semantic_probability_loop(images, texts)
    assert torch.equal(column_statistics(images, texts).pseudo_semantic_probability, expected)


@pytest.mark.parametrize(
    ("patches", "words", "expected"),
    [
        ([1.0, 2.0], [3.0], 1.0),
        ([-1.0, -2.0], [-3.0], 1.0),
        ([-1.0, 2.0], [3.0], 0.5),
        ([1.0, 1.0, -1.0], [1.0, -1.0], 0.5),  # half the words agree, whatever the patches
        ([1.0, 1.0, -1.0], [1.0, 1.0, -1.0], 5 / 9),
        ([0.0, 1.0], [1.0], 0.5),  # 0 · 1 is not positive
        ([0.0, 0.0], [0.0], 0.0),
        ([-0.0, -1.0], [-1.0, 0.0], 0.25),
    ],
)
def test_p_hat_equals_the_hand_table(patches, words, expected):
    assert of_one_pair(patches, words) == torch.tensor(expected).item()


def test_products_too_small_for_floats_still_count():
    assert of_one_pair([1e-30], [1e-30]) == 1.0


def test_column_means_equal_the_loop(images, texts):
    found = column_statistics(images, texts)
    torch.testing.assert_close(found.image_columns, column_means_loop(images))
    torch.testing.assert_close(found.text_columns, column_means_loop(texts))


@pytest.mark.parametrize("noise", [1e6, -1e6, float("nan")])
def test_values_of_padding_never_change_the_statistics(images, texts, noise):
    noisy = [
        TokenFeatures(side.features.masked_fill(~side.mask.unsqueeze(-1), noise), side.mask)
        for side in (images, texts)
    ]
    expected, found = column_statistics(images, texts), column_statistics(*noisy)
    assert torch.equal(found.pseudo_semantic_probability, expected.pseudo_semantic_probability)
    assert torch.equal(found.image_columns, expected.image_columns)
    assert torch.equal(found.text_columns, expected.text_columns)


def test_more_padding_never_changes_the_statistics(images, texts):
    wider = TokenFeatures.concatenate([images, ragged_tokens(1, 9, 8, seed=2)])[:6]
    padded = column_statistics(wider, texts)
    assert torch.equal(
        padded.pseudo_semantic_probability,
        column_statistics(images, texts).pseudo_semantic_probability,
    )
    torch.testing.assert_close(padded.image_columns, column_means_loop(images))


def test_reordering_pairs_reorders_the_instances_and_keeps_p_hat(images, texts):
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    expected, found = (
        column_statistics(images, texts),
        column_statistics(images[order], texts[order]),
    )
    assert torch.equal(found.pseudo_semantic_probability, expected.pseudo_semantic_probability)
    assert torch.equal(found.image_columns, expected.image_columns[:, order])


def test_reordering_tokens_changes_nothing(images, texts):
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = TokenFeatures(images.features[:, order], images.mask[:, order])
    expected, found = column_statistics(images, texts), column_statistics(shuffled, texts)
    assert torch.equal(found.pseudo_semantic_probability, expected.pseudo_semantic_probability)
    torch.testing.assert_close(found.image_columns, expected.image_columns)


def test_batches_joined_are_the_whole_exactly(images, texts):
    parts = [column_statistics(images[cut], texts[cut]) for cut in (slice(0, 1), slice(1, 6))]
    joined, whole = ColumnStatistics.concatenate(parts), column_statistics(images, texts)
    assert torch.equal(joined.positive, whole.positive)
    assert joined.total == whole.total
    assert torch.equal(joined.pseudo_semantic_probability, whole.pseudo_semantic_probability)
    assert torch.equal(joined.image_columns, whole.image_columns)
    assert torch.equal(joined.text_columns, whole.text_columns)


def test_mismatched_pairs_give_another_p_hat():
    concept = torch.randn(40, 1, 6, generator=torch.Generator().manual_seed(3))
    one = torch.ones(40, 1, dtype=torch.bool)
    images, texts = TokenFeatures(concept, one), TokenFeatures(2 * concept, one)
    assert column_statistics(images, texts).pseudo_semantic_probability.tolist() == [1.0] * 6
    mismatched = column_statistics(
        images, texts[torch.arange(40).roll(1)]
    ).pseudo_semantic_probability
    assert (mismatched - 0.5).abs().max() < 0.35


def test_no_gradient_flows_through_the_statistics(images, texts):
    images.features.requires_grad_()
    assert not column_statistics(images, texts).image_columns.requires_grad


def test_half_precision_features_are_counted_and_averaged_in_full(images, texts):
    half = TokenFeatures(images.features.bfloat16(), images.mask)
    wide = TokenFeatures(images.features.bfloat16().float(), images.mask)
    found, expected = column_statistics(half, texts), column_statistics(wide, texts)
    assert torch.equal(found.pseudo_semantic_probability, expected.pseudo_semantic_probability)
    assert torch.equal(found.image_columns, expected.image_columns)


def test_standardised_columns_have_mean_zero_and_length_one():
    columns = torch.randn(7, 20, generator=torch.Generator().manual_seed(4)) * 30 + 5
    found = standardise(columns)
    torch.testing.assert_close(found.mean(dim=1), torch.zeros(7), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(standardise(columns * 3 - 100), found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 0.1, -12345.678])
def test_a_constant_column_becomes_zeros(constant):
    columns = torch.stack([torch.full((1023,), constant), torch.linspace(0, 1, 1023)])
    found = standardise(columns)
    assert found[0].tolist() == [0.0] * 1023
    assert found[1].norm().item() == pytest.approx(1.0)


@pytest.fixture
def spaces():
    """Columns and prototypes of both modalities: 9 columns, 6 instances, 3 prototypes."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, 6, generator=generator) for rows in (9, 9, 3, 3)]


def test_semantic_probability_equals_the_loop(spaces):
    torch.testing.assert_close(semantic_probability(*spaces), semantic_probability_loop(*spaces))


def test_the_product_equals_the_product_of_both_sides(spaces):
    image_columns, text_columns, image_prototypes, text_prototypes = spaces
    semantic = [
        1 - style_score(image_columns, image_prototypes),
        1 - style_score(text_columns, text_prototypes),
    ]
    counts = torch.zeros(9, dtype=torch.long)
    statistics = ColumnStatistics(image_columns, text_columns, counts, total=1)
    found = Product().probability(statistics, image_prototypes, text_prototypes)
    torch.testing.assert_close(found, semantic[0] * semantic[1])


@pytest.mark.parametrize("estimator", [StyleClusters(), Product()])
def test_the_semantic_probability_is_a_probability(spaces, estimator):
    image_columns, text_columns, image_prototypes, text_prototypes = spaces
    counts = torch.zeros(9, dtype=torch.long)
    statistics = ColumnStatistics(image_columns, text_columns, counts, total=1)
    found = estimator.probability(statistics, image_prototypes, text_prototypes)
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.std() > 0


def test_the_column_nearest_to_a_style_has_style_score_one_and_the_farthest_zero(spaces):
    columns, prototypes = spaces[0], spaces[2]
    prototypes[1] = standardise(columns)[4] * 0.2  # the length of a prototype does not matter
    score = style_score(columns, prototypes)
    assert score.argmax() == 4
    assert score.max() == 1.0
    assert score.min() == 0.0


def test_the_order_of_prototypes_and_the_scale_of_columns_do_not_matter(spaces):
    image_columns, text_columns, image_prototypes, text_prototypes = spaces
    found = semantic_probability(
        image_columns * 7 + 2, text_columns, image_prototypes.flip(0), text_prototypes * 3
    )
    torch.testing.assert_close(found, semantic_probability(*spaces), atol=1e-5, rtol=1e-4)


def test_columns_that_are_all_alike_are_all_semantic():
    columns = torch.tensor([[1.0, 2.0, 4.0]]).repeat(5, 1)
    prototypes = torch.tensor([[1.0, 0.0, -1.0]])
    assert semantic_probability(columns, columns, prototypes, prototypes).tolist() == [1.0] * 5


def test_columns_that_are_no_numbers_do_not_pass_for_semantic(spaces):
    spaces[0][2, 3] = float("nan")
    assert semantic_probability(*spaces).isnan().any()


def test_weights_have_mean_one_and_the_proportions_of_the_probability():
    probability = torch.rand(64, generator=torch.Generator().manual_seed(6))
    weights = column_weights(probability)
    assert weights.mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(weights / weights[0], probability / probability[0])


@pytest.mark.parametrize("value", [0.0, 1e-3, 1.0])
def test_equal_probabilities_zero_included_give_weights_of_one(value):
    torch.testing.assert_close(column_weights(torch.full((5,), value)), torch.ones(5))


def test_a_probability_that_is_no_number_does_not_pass_for_weights():
    assert column_weights(torch.tensor([0.5, float("nan")])).isnan().all()


def test_joining_nothing_is_refused():
    with pytest.raises(ValueError, match="`parts` must hold at least one batch of statistics"):
        ColumnStatistics.concatenate([])


def test_texts_that_do_not_match_row_by_row_are_refused(images, texts):
    with pytest.raises(ValueError, match=r"`texts` must match `images` row by row.*5 texts for 6"):
        column_statistics(images, texts[:5])


def test_a_probe_without_pairs_is_refused(images, texts):
    with pytest.raises(ValueError, match=r"at least one of each, got 0 texts for 0 images"):
        column_statistics(images[:0], texts[:0])


def test_texts_of_another_width_are_refused(images):
    with pytest.raises(
        ValueError, match=r"`texts` must be as wide as `images` \(8 columns\), got 3"
    ):
        column_statistics(images, ragged_tokens(6, 4, 3, seed=7))


@pytest.mark.parametrize("side", ["images", "texts"])
def test_a_row_without_real_tokens_is_refused_by_name(images, texts, side):
    sides = {"images": images, "texts": texts}
    sides[side].mask[3] = False
    with pytest.raises(ValueError, match=rf"`{side}` must have at least one real token.*\[3\]"):
        column_statistics(**sides)
