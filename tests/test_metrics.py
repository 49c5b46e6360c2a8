import pytest
import torch

from pico_hf.core.metrics import (
    image_to_text_ranks,
    recall_at_k,
    retrieval_metrics,
    text_to_image_ranks,
)
from reference import identity_ranks_loop, ranks_loop

FOUR_IMAGES_EIGHT_CAPTIONS = torch.tensor(
    [
        # own:   ↓    ↓
        [0.9, 0.1, 0.8, 0.2, 0.3, 0.4, 0.0, 0.5],  # best own .9: nothing before it → rank 1
        #                  ↓    ↓
        [0.3, 0.2, 0.5, 0.6, 0.7, 0.1, 0.8, 0.0],  # best own .6 < .7, .8           → rank 3
        #                            ↓    ↓
        [0.5, 0.4, 0.3, 0.2, 0.5, 0.1, 0.0, 0.4],  # best own .5 = .5 of another    → rank 2
        #                                      ↓    ↓
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],  # best own .3 < all six others   → rank 7
    ]
)
OWNERS = torch.arange(8) // 2


def random_retrieval(images, captions, seed, levels=None):
    """Scores and an index in which every image has at least one caption, in shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(images, (captions - images,), generator=generator)
    index = torch.cat([torch.arange(images), extra])
    index = index[torch.randperm(captions, generator=generator)]
    scores = torch.randn(images, captions, generator=generator)
    return (scores if levels is None else (scores * levels).round()), index


def test_ranks_of_images_equal_the_hand_table():
    ranks = image_to_text_ranks(FOUR_IMAGES_EIGHT_CAPTIONS, OWNERS)
    assert ranks.tolist() == [1, 3, 2, 7]


def test_ranks_of_texts_equal_the_hand_table():
    ranks = text_to_image_ranks(FOUR_IMAGES_EIGHT_CAPTIONS, OWNERS)
    #                 .9=.9  .1   .5   .6=.6  .5=.5=.5  .1   .3  .2
    assert ranks.tolist() == [2, 4, 3, 2, 3, 4, 2, 3]


def test_metrics_equal_the_hand_table():
    metrics = retrieval_metrics(FOUR_IMAGES_EIGHT_CAPTIONS, OWNERS)
    assert metrics == {
        "i2t_r1": 25.0,
        "i2t_r5": 75.0,
        "i2t_r10": 100.0,
        "i2t_median_rank": 2.5,
        "t2i_r1": 0.0,
        "t2i_r5": 100.0,
        "t2i_r10": 100.0,
        "t2i_median_rank": 3.0,
        "rsum": 400.0,
    }


@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "many ties"])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_the_loop_for_shuffled_and_uneven_captions(seed, levels):
    scores, index = random_retrieval(9, 31, seed, levels)
    by_image, by_text = ranks_loop(scores, index)
    assert image_to_text_ranks(scores, index).tolist() == by_image
    assert text_to_image_ranks(scores, index).tolist() == by_text


def test_more_images_than_one_block_are_ranked_as_one():
    scores, index = random_retrieval(150, 200, seed=0, levels=3)
    by_image, by_text = ranks_loop(scores, index)
    assert image_to_text_ranks(scores, index).tolist() == by_image
    assert text_to_image_ranks(scores, index).tolist() == by_text


@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "many ties"])
@pytest.mark.parametrize(("images", "things"), [(9, 4), (9, 9), (150, 40), (9, 1)])
def test_ranks_by_identity_equal_the_loop(images, things, levels):
    scores, index = random_retrieval(images, images + 22, images, levels)
    ids = torch.randint(things, (images,), generator=torch.Generator().manual_seed(things)) * 3
    by_image, by_text = identity_ranks_loop(scores, index, ids)
    assert image_to_text_ranks(scores, index, ids).tolist() == by_image
    assert text_to_image_ranks(scores, index, ids).tolist() == by_text


def test_identities_that_all_differ_change_no_rank():
    scores, index = random_retrieval(90, 200, seed=3, levels=2)
    scores[0, 0] = -torch.inf
    ids = torch.randperm(90)
    for rank in (image_to_text_ranks, text_to_image_ranks):
        assert torch.equal(rank(scores, index, ids), rank(scores, index))
    assert retrieval_metrics(scores, index, ids) == retrieval_metrics(scores, index)


def test_two_views_of_a_thing_share_their_captions():
    # Either view finds the other's caption first, and no view pushes the other down.
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.5], [0.3, 0.3, 0.4]])
    index, ids = torch.arange(3), torch.tensor([0, 0, 1])
    assert image_to_text_ranks(scores, index).tolist() == [3, 3, 1]
    assert image_to_text_ranks(scores, index, ids).tolist() == [1, 1, 1]
    assert text_to_image_ranks(scores, index).tolist() == [3, 3, 3]
    assert text_to_image_ranks(scores, index, ids).tolist() == [1, 1, 3]


def test_a_collapsed_model_finds_nothing():
    metrics = retrieval_metrics(torch.ones(20, 40), torch.arange(40) // 2)
    assert metrics["rsum"] == 0.0
    assert metrics["i2t_median_rank"] == 39.0  # all 38 captions of others come first
    assert metrics["t2i_median_rank"] == 20.0


def test_a_perfect_model_scores_600():
    index = torch.arange(60) // 3
    scores = torch.nn.functional.one_hot(index, 20).T.float()
    assert retrieval_metrics(scores, index)["rsum"] == 600.0


def test_permuting_images_and_captions_changes_no_metric():
    scores, index = random_retrieval(12, 40, seed=1)
    rows, columns = torch.randperm(12), torch.randperm(40)
    new_row = torch.empty(12, dtype=torch.long).scatter_(0, rows, torch.arange(12))
    moved = retrieval_metrics(scores[rows][:, columns], new_row[index[columns]])
    assert moved == retrieval_metrics(scores, index)


def test_any_increasing_map_of_the_scores_changes_no_rank():
    scores, index = random_retrieval(12, 40, seed=2)
    torch.testing.assert_close(
        image_to_text_ranks(scores.double().exp() * 7 - 3, index),
        image_to_text_ranks(scores, index),
    )


def test_infinite_scores_are_ranked_like_any_other():
    scores = torch.tensor([[float("-inf"), 1.0], [float("-inf"), float("inf")]])
    assert text_to_image_ranks(scores, torch.tensor([0, 1])).tolist() == [2, 1]
    assert image_to_text_ranks(scores, torch.tensor([0, 1])).tolist() == [2, 1]


def test_recall_counts_ranks_up_to_and_including_k():
    assert recall_at_k(torch.tensor([1, 5, 6, 10]), 5) == 50.0


@pytest.mark.parametrize("metric", [retrieval_metrics, image_to_text_ranks, text_to_image_ranks])
class TestRefusals:
    def test_an_index_of_another_length_is_refused(self, metric):
        with pytest.raises(ValueError, match=r"each of the 4 texts, at least one, got 3 entries"):
            metric(torch.randn(2, 4), torch.tensor([0, 1, 1]))

    def test_no_texts_at_all_are_refused(self, metric):
        with pytest.raises(ValueError, match=r"each of the 0 texts, at least one, got 0 entries"):
            metric(torch.randn(2, 0), torch.zeros(0, dtype=torch.long))

    @pytest.mark.parametrize("row", [-1, 2])
    def test_a_row_that_is_not_there_is_refused(self, metric, row):
        with pytest.raises(ValueError, match=r"`text_to_image` must hold rows from 0 to 1, got"):
            metric(torch.randn(2, 3), torch.tensor([0, 1, row]))

    def test_an_image_without_a_caption_is_named(self, metric):
        with pytest.raises(ValueError, match=r"but image 1 has no caption\. Leave such images out"):
            metric(torch.randn(3, 2), torch.tensor([0, 2]))

    def test_identities_of_another_length_are_refused(self, metric):
        with pytest.raises(ValueError, match=r"each of the 3 images, got shape \(2,\)\. Give one"):
            metric(torch.randn(3, 3), torch.arange(3), torch.arange(2))

    def test_scores_that_are_no_number_are_refused(self, metric):
        scores = torch.randn(3, 3)
        scores[2, 0] = float("nan")
        with pytest.raises(ValueError, match=r"`scores` must be numbers, got NaN\. Check"):
            metric(scores, torch.arange(3))


@pytest.mark.slow
def test_5000_images_and_25000_captions_are_ranked_exactly():
    scores, index = random_retrieval(5000, 25000, seed=0)
    own = scores[index, torch.arange(25000)]
    by_text, by_image = text_to_image_ranks(scores, index), image_to_text_ranks(scores, index)
    for text in range(0, 25000, 997):
        assert by_text[text] == 1 + (scores[:, text] > own[text]).sum()
    for image in range(0, 5000, 197):
        best = scores[image][index == image].max()
        assert by_image[image] == 1 + (scores[image] > best).sum()
