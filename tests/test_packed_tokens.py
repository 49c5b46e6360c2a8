"""Packed tokens: whatever is chosen comes back as it was, in memory and on disk."""

import pytest
import torch

from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.token_features import TokenFeatures


def ragged(seed: int, items: int = 7, tokens: int = 5, columns: int = 3) -> TokenFeatures:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(items, tokens, columns, generator=generator)
    mask = torch.rand(items, tokens, generator=generator) < 0.6
    mask[:, 0] = True
    return TokenFeatures(features, mask)


def real(tokens: TokenFeatures) -> list[torch.Tensor]:
    return [f[m] for f, m in zip(tokens.features, tokens.mask, strict=True)]


@pytest.fixture(params=[float("inf"), 0.0, 300.0], ids=["memory", "disk", "spilled half-way"])
def packed(request) -> PackedTokens:
    return PackedTokens.collect([ragged(0), ragged(1, tokens=8)], max_bytes=request.param)


@pytest.mark.parametrize(
    "items",
    [
        slice(None),
        slice(3, 9),
        torch.tensor([13, 0, 5]),
        torch.arange(14) % 3 == 0,
        torch.tensor([4]),
    ],
)
def test_chosen_items_come_back_token_by_token(packed, items):
    everything = [*real(ragged(0)), *real(ragged(1, tokens=8))]
    rows = torch.arange(14)[items].tolist()
    found = real(packed[items])
    assert len(found) == len(rows)
    for row, tokens in zip(rows, found, strict=True):
        assert torch.equal(tokens, everything[row])


@pytest.mark.parametrize("rows", [[3, 4, 5, 6], [5, 6, 7, 8], [13, 0, 5, 6, 6], [7], []])
@pytest.mark.parametrize("max_bytes", [float("inf"), 0.0])
def test_items_of_one_length_come_back_as_they_were(rows, max_bytes):
    features = torch.randn(14, 3, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(14, 3, dtype=torch.bool)
    parts = [TokenFeatures(features[own], mask[own]) for own in (slice(0, 7), slice(7, 14))]
    packed = PackedTokens.collect(parts, max_bytes)
    apart = PackedTokens(list(features.flatten(0, 1).split(21)), [torch.full((7,), 3)] * 2)
    for tokens in (packed, apart):
        chosen = tokens[torch.tensor(rows, dtype=torch.long)]
        assert torch.equal(chosen.features[chosen.mask], features[rows].flatten(0, 1))
        assert chosen.mask.all() or not rows


def test_items_without_tokens_have_none():
    packed = PackedTokens([torch.zeros(0, 4)], [torch.zeros(3, dtype=torch.long)])
    assert packed[:].features.shape == (3, 0, 4)


def test_padding_is_zero_and_as_long_as_the_longest_chosen_item(packed):
    lengths = [len(tokens) for tokens in real(ragged(0))]
    chosen = packed[:3]
    assert chosen.features.shape[1] == max(lengths[:3])
    assert chosen.features[~chosen.mask].abs().sum() == 0


def test_blocks_cover_every_chosen_item_once(packed, monkeypatch):
    monkeypatch.setattr("pico_hf.core.packed_tokens.BLOCK_TOKENS", 8)
    chosen = torch.tensor([9, 2, 4, 7, 0])
    blocks = list(packed.blocks(chosen))
    assert len(blocks) > 1
    assert torch.cat([rows for _, rows in blocks]).tolist() == chosen.tolist()
    assert torch.cat([torch.arange(5)[place] for place, _ in blocks]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([rows for _, rows in packed.blocks()]).tolist() == list(range(14))


def test_no_items_give_no_tokens(packed):
    assert packed[:0].features.shape == (0, 1, 3)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="`batches` must hold at least one batch, got none"):
        PackedTokens.collect([])
