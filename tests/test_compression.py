"""Fewer bits and fewer tokens: how far from the original, and independent of padding."""

import pytest
import torch

from pico_hf.core.compression import merge_tokens
from pico_hf.core.quantisation import dequantise, quantise
from pico_hf.core.token_features import TokenFeatures


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def test_eight_bits_are_at_most_half_a_level_away():
    tokens = unit(50, 64) * torch.linspace(1e-6, 1e3, 50).unsqueeze(1)
    levels, scales = quantise(tokens)
    assert levels.abs().amax(dim=1).tolist() == [127] * 50
    error = (dequantise(levels, scales) - tokens).abs()
    assert (error <= scales.unsqueeze(1) * 0.5001).all()
    assert error.max() > 0


def test_a_token_of_zeros_stays_zero():
    levels, scales = quantise(torch.zeros(2, 3))
    assert dequantise(levels, scales).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_merging_keeps_one_in_so_many_tokens_of_each_image(factor):
    mask = torch.arange(12) < torch.tensor([[12], [7], [1]])
    merged = merge_tokens(TokenFeatures(unit(3, 12, 16), mask), factor)
    assert merged.mask.sum(dim=1).tolist() == [-(-n // factor) for n in (12, 7, 1)]
    lengths = merged.features[merged.mask].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(len(lengths)))


def test_groups_that_lie_apart_become_their_means():
    centres = torch.eye(4)[[2, 0, 2, 3, 0, 3]]
    tokens = torch.nn.functional.normalize(centres + 0.05 * unit(6, 4), dim=-1)
    merged = merge_tokens(TokenFeatures(tokens.unsqueeze(0), torch.ones(1, 6).bool()), 2)
    pairs = [(0, 2), (1, 4), (3, 5)]  # in the order of their first tokens
    means = torch.stack([tokens[list(pair)].mean(dim=0) for pair in pairs])
    expected = means / means.norm(dim=1, keepdim=True)
    torch.testing.assert_close(merged.features[0], expected)


def test_padding_takes_no_part_in_merging():
    mask = torch.arange(9) < torch.tensor([[6], [9]])
    tokens = unit(2, 9, 8)
    merged = merge_tokens(TokenFeatures(tokens, mask), 2)
    other = tokens.masked_fill(~mask.unsqueeze(2), torch.nan)
    assert torch.equal(merge_tokens(TokenFeatures(other, mask), 2).features, merged.features)


def test_a_factor_below_one_is_refused():
    tokens = TokenFeatures(unit(1, 2, 3), torch.ones(1, 2).bool())
    assert merge_tokens(tokens, 1) is tokens
    with pytest.raises(ValueError, match="`factor` must be >= 1, got 0"):
        merge_tokens(tokens, 0)
