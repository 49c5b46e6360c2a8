"""The parts of a score are those of a loop, and they sum to it."""

import pytest
import torch

from pico_hf.core.attribution import attribute
from pico_hf.core.similarity import similarity
from reference import column_parts_loop
from test_similarity import random_tokens


@pytest.fixture
def pair():
    images, texts = random_tokens(3, 7, 6, seed=0), random_tokens(3, 5, 6, seed=1)
    return images[1:2], texts[2:3]


WEIGHTS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 1.0])


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_columns_add_what_the_loop_over_real_tokens_says(pair, weights):
    (image, text), ones = pair, torch.ones(6)
    patches, words = image.features[image.mask], text.features[text.mask]
    expected = column_parts_loop(patches, words, ones if weights is None else weights)
    torch.testing.assert_close(attribute(image, text, weights).columns, expected)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_patches_words_and_columns_sum_to_the_score(pair, weights):
    parts, expected = attribute(*pair, weights), float(similarity(*pair, weights))
    assert parts.score == pytest.approx(expected, abs=1e-6)
    assert float(parts.columns.sum()) == pytest.approx(expected, abs=1e-6)


def test_what_padding_holds_never_changes_a_part(pair):
    before = attribute(*pair, WEIGHTS)
    for side in pair:
        assert not side.mask.all()
        side.features[~side.mask] = 100.0
    after = attribute(*pair, WEIGHTS)
    assert torch.equal(after.products, before.products)
    assert torch.equal(after.columns, before.columns)


def test_winners_are_those_of_the_maxima(pair):
    parts = attribute(*pair, WEIGHTS)
    patches, words = parts.products.shape
    won = parts.products[torch.arange(patches), parts.best_words]
    torch.testing.assert_close(won, parts.patches * patches)
    won = parts.products[parts.best_patches, torch.arange(words)]
    torch.testing.assert_close(won, parts.words * words)


def test_a_batch_is_refused(pair):
    image, text = pair
    both = type(image)(image.features.repeat(2, 1, 1), image.mask.repeat(2, 1))
    with pytest.raises(ValueError, match="must be one each, got 2 and 1"):
        attribute(both, text)
