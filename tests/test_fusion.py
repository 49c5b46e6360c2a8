"""The performance-feedback weighting function: its theorem, and the rules it is compared with."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comparisons import FUSION_RULES
from pico_hf.core.fusion import FusionState

GAINS = st.lists(
    st.floats(-60, 60, allow_nan=False).map(lambda gain: round(gain, 3)),
    min_size=2,
    max_size=12,
    unique=True,
)


def final_weights(rule: str, gains: list[float], temperature: float = 5.0) -> list[float]:
    """Weight of every iteration inside the final prototypes, by unrolling the recursion."""
    weights: list[float] = []
    log_total = -math.inf
    for number, gain in enumerate(gains, start=1):
        state = FusionState(number, gain, log_total, temperature)
        share, log_total = FUSION_RULES[rule](state)
        weights = [weight * (1 - share) for weight in weights] + [share]
    return weights


def wrong_pairs(weights: list[float], gains: list[float]) -> int:
    pairs = itertools.combinations(range(len(gains)), 2)
    return sum((gains[a] - gains[b]) * (weights[a] - weights[b]) < 0 for a, b in pairs)


@given(GAINS)
@settings(deadline=None, max_examples=300)
def test_a_larger_gain_always_gets_the_larger_weight_whatever_the_order(gains):
    weights = final_weights("normalised_gain", gains)
    total = sum(math.exp((gain - max(gains)) / 5.0) for gain in gains)
    for gain, weight in zip(gains, weights, strict=True):
        expected = math.exp((gain - max(gains)) / 5.0) / total
        assert weight == pytest.approx(expected, rel=1e-6, abs=1e-12)
    for a, b in itertools.permutations(range(len(gains)), 2):
        if gains[a] > gains[b] and weights[a] > 1e-9:
            assert weights[a] > weights[b]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_gains_of_any_size_never_overflow(first, second):
    weights = final_weights("normalised_gain", [first, second], temperature=1.0)
    assert all(0.0 <= weight <= 1.0 for weight in weights)
    assert sum(weights) == pytest.approx(1.0)


def test_the_gated_ema_breaks_the_theorem():
    generator = torch.Generator().manual_seed(0)
    wrong = total = 0
    for _ in range(200):
        gains = (10 * torch.randn(8, generator=generator)).tolist()
        wrong += wrong_pairs(final_weights("gated_ema", gains), gains)
        total += 28
        assert wrong_pairs(final_weights("normalised_gain", gains), gains) == 0
    assert wrong / total > 0.15


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("last", [0.0, 0.0, 1.0]),
        ("ema", [0.81, 0.09, 0.1]),
        ("gated_ema", [0.9025, 0.0475, 0.05]),
        ("normalised_gain", [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_each_rule_gives_the_weights_of_the_hand_table_when_nothing_improves(rule, expected):
    assert final_weights(rule, [0.0, 0.0, 0.0]) == pytest.approx(expected)
