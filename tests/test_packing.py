import pytest
import torch

from pico_hf.kernels.packing import Packing

MASK = torch.tensor([[True, True, True], [False, True, False], [True, False, True]])


@pytest.fixture
def packing():
    return Packing(MASK)


def test_items_are_sorted_by_length_and_padding_is_cut_out(packing):
    assert packing.order.tolist() == [1, 2, 0]
    assert packing.rows.tolist() == [4, 6, 8, 0, 1, 2]
    assert packing.starts.tolist() == [0, 1, 3]
    assert packing.size == 6


def test_a_full_mask_moves_nothing():
    packing = Packing(torch.ones(2, 3, dtype=torch.bool))
    assert packing.rows is None
    features = torch.arange(12.0).view(2, 3, 2)
    taken = packing.take(features, slice(1, 3), torch.float32)
    assert taken.data_ptr() == features[0, 1].data_ptr()


def test_taken_tokens_go_back_to_where_they_came_from(packing):
    features = torch.arange(18.0).view(3, 3, 2)
    packed = packing.take(features, slice(0, packing.size), torch.float64)
    expected = features.masked_fill(~MASK.unsqueeze(2), 0)
    assert packed.dtype == torch.float64
    assert torch.equal(packing.unpack(packed, features), expected)


def test_tokens_of_items_are_listed_item_by_item(packing):
    owner, rows = packing.tokens_of(torch.tensor([2, 0, 2]))
    assert owner.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert rows.tolist() == [3, 4, 5, 0, 3, 4, 5]


def test_runs_hold_equal_lengths_and_at_most_the_given_rows():
    mask = torch.arange(4) < torch.tensor([2, 4, 2, 2])[:, None]
    runs = [(r.items, r.rows, r.length) for r in Packing(mask).runs(max_rows=4)]
    assert runs == [
        (slice(0, 2), slice(0, 4), 2),
        (slice(2, 3), slice(4, 6), 2),
        (slice(3, 4), slice(6, 10), 4),
    ]


def test_an_item_longer_than_the_limit_is_a_run_of_its_own():
    assert [run.length for run in Packing(MASK).runs(max_rows=1)] == [1, 2, 3]


def test_chunks_join_runs_and_count_from_their_own_start(packing):
    first, second = packing.chunks(max_rows=3)
    assert (first.items, first.rows) == (slice(0, 2), slice(0, 3))
    assert [run.rows for run in first.runs] == [slice(0, 1), slice(1, 3)]
    assert (second.items, second.rows) == (slice(2, 3), slice(3, 6))
    assert [run.rows for run in second.runs] == [slice(0, 3)]


def test_no_items_make_no_chunks():
    assert Packing(torch.ones(0, 3, dtype=torch.bool)).chunks(max_rows=8) == []
