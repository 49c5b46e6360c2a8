"""Ranks of matches, Recall@k, Precision@k and mean AP for queries and targets of one kind."""

import jaxtyping
import pytest
import torch
from sklearn.metrics import average_precision_score

from pico_hf.core.match_metrics import (
    average_precision,
    match_metrics,
    match_ranks,
    precision_at_k,
)
from reference import match_ranks_loop

THREE_QUERIES_FIVE_TARGETS = torch.tensor(
    [
        # match        match
        [0.9, 0.8, 0.7, 0.6, 0.5],  # matches at 1 and 3 → AP (1/1 + 2/3) / 2
        [0.1, 0.9, 0.2, 0.2, 0.3],  # match 3 of score .2 ties with another → rank 4, AP 1/4
        [0.5, 0.4, 0.3, 0.2, 0.1],  # match last → rank 5, AP 1/5
    ]
)
QUERY_IDS, TARGET_IDS = torch.tensor([0, 1, 2]), torch.tensor([0, 3, 0, 1, 2])


def random_matches(queries, targets, seed, levels=None):
    """Scores and a mask in which every query has a match."""
    generator = torch.Generator().manual_seed(seed)
    matches = torch.rand(queries, targets, generator=generator) < 0.3
    matches[torch.arange(queries), torch.randint(targets, (queries,), generator=generator)] = True
    scores = torch.randn(queries, targets, generator=generator)
    return (scores if levels is None else (scores * levels).round()), matches


def test_metrics_equal_the_hand_table():
    metrics = match_metrics(THREE_QUERIES_FIVE_TARGETS, QUERY_IDS, TARGET_IDS)
    assert metrics == {
        "r1": pytest.approx(100 / 3),
        "r5": 100.0,
        "r10": 100.0,
        "p5": pytest.approx(100 * (2 + 1 + 1) / 15),
        "p10": pytest.approx(100 * (2 + 1 + 1) / 30),
        "map": pytest.approx(100 * (5 / 6 + 1 / 4 + 1 / 5) / 3),
        "median_rank": 4.0,
        "queries": 3.0,
    }


@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "many ties"])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_of_matches_equal_the_loop(seed, levels):
    scores, matches = random_matches(7, 23, seed, levels)
    ranks = match_ranks(scores, matches)
    assert [[rank for rank in row if rank] for row in ranks.tolist()] == match_ranks_loop(
        scores, matches
    )


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_that_of_scikit_learn(seed):
    scores, matches = random_matches(9, 40, seed)
    expected = [
        average_precision_score(wanted.numpy(), row.numpy())
        for row, wanted in zip(scores, matches, strict=True)
    ]
    found = average_precision(match_ranks(scores, matches))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_ties_never_flatter_a_model_more_than_scikit_learn_lets_them():
    scores, matches = random_matches(20, 30, seed=0, levels=1)
    found = average_precision(match_ranks(scores, matches)).tolist()
    expected = [
        average_precision_score(wanted.numpy(), row.numpy())
        for row, wanted in zip(scores, matches, strict=True)
    ]
    assert all(own <= theirs + 1e-12 for own, theirs in zip(found, expected, strict=True))
    assert found != expected


def test_a_model_that_scores_everything_alike_finds_nothing_at_rank_one():
    ids = torch.arange(12)
    metrics = match_metrics(torch.zeros(12, 12), ids, ids)
    assert metrics["r1"] == metrics["r10"] == 0.0
    assert metrics["map"] == pytest.approx(100 / 12)


def test_precision_counts_the_matches_among_the_first_k():
    scores, matches = random_matches(8, 20, seed=1)
    found = precision_at_k(match_ranks(scores, matches), 4)
    first = scores.topk(4, dim=1).indices
    assert found.tolist() == (matches.gather(1, first).sum(dim=1) / 4).tolist()


def test_queries_in_their_own_gallery_leave_themselves_out():
    # Everything is most like itself; without that the first two find each other and the third
    # finds the first before its own match, the fourth.
    scores = torch.tensor(
        [
            [2.0, 1.0, 0.9, 0.0],
            [1.0, 2.0, 0.1, 0.2],
            [0.9, 0.1, 2.0, 0.3],
            [0.0, 0.2, 0.3, 2.0],
        ]
    )
    ids, images = torch.tensor([0, 0, 1, 1]), torch.arange(4)
    assert match_metrics(scores, ids, ids)["r1"] == 100.0
    assert match_metrics(scores, ids, ids, images, images)["r1"] == 75.0


def test_a_copy_of_the_query_with_its_identity_is_no_match_and_with_another_a_competitor():
    scores = torch.tensor([[2.0, 2.0, 1.0]])  # a copy, a copy that is called otherwise, the match
    metrics = match_metrics(
        scores,
        torch.tensor([0]),
        torch.tensor([0, 1, 0]),
        torch.tensor([7]),
        torch.tensor([7, 7, 8]),
    )
    assert metrics["median_rank"] == 2.0


def test_queries_without_a_match_are_counted_out():
    ids, images = torch.tensor([0, 0, 1]), torch.arange(3)
    metrics = match_metrics(torch.eye(3), ids, ids, images, images)
    assert metrics["queries"] == 2.0
    with pytest.raises(ValueError, match="`target_ids` must hold a match of at least one query"):
        match_metrics(torch.eye(3), images, images, images, images)


def test_more_queries_than_one_block_are_ranked_as_one():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(150, 40, generator=generator)
    query_ids = torch.randint(12, (150,), generator=generator)
    target_ids = torch.arange(40) % 12
    matches = query_ids.unsqueeze(1) == target_ids
    loop = match_ranks_loop(scores, matches)
    metrics = match_metrics(scores, query_ids, target_ids)
    assert metrics["r5"] == pytest.approx(100 * sum(row[0] <= 5 for row in loop) / 150)
    assert metrics["map"] == pytest.approx(
        100 * sum(sum(n / r for n, r in enumerate(row, 1)) / len(row) for row in loop) / 150
    )


def test_targets_that_are_not_ranked_neither_match_nor_compete():
    scores = torch.tensor([[-torch.inf, -torch.inf, 0.1, 0.2]])
    matches = torch.tensor([[True, False, True, False]])
    assert match_ranks(scores, matches).tolist() == [[2, 0, 0, 0]]


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="`scores` must be numbers, got NaN"):
        match_metrics(torch.tensor([[torch.nan]]), torch.tensor([0]), torch.tensor([0]))


@pytest.fixture
def without_shape_checks():
    """As users run the package: only the test run checks shapes in signatures."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_identities_that_do_not_fit_the_scores_are_refused(without_shape_checks):
    with pytest.raises(ValueError, match="`target_ids` must hold one number for each of the 2"):
        match_metrics(torch.eye(2), torch.arange(2), torch.arange(3))
    with pytest.raises(ValueError, match="`matches` must be of the shape of `scores`"):
        match_ranks(torch.eye(2), torch.ones(2, 3, dtype=torch.bool))
