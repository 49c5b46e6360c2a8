"""Prototypes: clustering, matching, refining, and the life of the buffers."""

import math

import pytest
import torch

from comparisons import pseudo
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.semantic import column_statistics, standardise
from pico_hf.core.style import propose_style, style_prototypes
from pico_hf.core.style_refinement import complement_of_style, refine_style
from pico_hf.core.token_features import TokenFeatures


def test_kmeans_finds_two_planted_groups_of_columns():
    pattern = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    columns = torch.cat([pattern[:1] * scale for scale in (1, 3, 9)] + [pattern[1:] * 5])
    found = style_prototypes(columns, torch.ones(4), 2)
    assert torch.cdist(found, standardise(pattern)).amin(dim=1).max() < 1e-5


def test_columns_without_style_weight_do_not_move_a_prototype():
    columns = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
    found = style_prototypes(columns, torch.tensor([1.0, 0.0]), 1)
    torch.testing.assert_close(found, standardise(columns)[:1])


def test_a_warm_start_keeps_the_order_of_the_clusters():
    columns = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    first = style_prototypes(columns, torch.ones(30), 4)
    shuffled = first[torch.tensor([2, 0, 3, 1])]
    again = style_prototypes(columns, torch.ones(30), 4, warm_start=shuffled)
    nearest = torch.cdist(again, shuffled).argmin(dim=1)
    assert nearest.tolist() == [0, 1, 2, 3]


def statistics(seed: int = 0, pairs: int = 6, columns: int = 10):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (
        TokenFeatures(
            torch.randn(pairs, tokens, columns, generator=generator),
            torch.ones(pairs, tokens, dtype=torch.bool),
        )
        for tokens in (5, 3)
    )
    return column_statistics(images, texts)


def prototypes(**kwargs) -> StylePrototypes:
    return StylePrototypes(10, 3, 6, **kwargs)


def test_before_any_refinement_every_column_is_semantic():
    assert prototypes().semantic_probability.tolist() == [1.0] * 10


def test_propose_changes_nothing():
    module = prototypes()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    propose_style(module, statistics())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("estimate", [complement_of_style, pseudo])
def test_a_refinement_gives_probabilities_that_differ_between_columns(estimate):
    module = prototypes()
    report = refine_style(module, statistics(), estimate=estimate)
    assert report.iteration == int(module.iteration) == 1
    assert report.fused_weight == 1.0
    assert module.semantic_probability.min() >= 0
    assert module.semantic_probability.max() <= 1
    assert module.semantic_probability.std() > 0


def test_the_gain_is_the_trial_minus_the_recorded_performance():
    module = prototypes()
    module.record(performance=200.0)
    seen = []
    report = refine_style(module, statistics(), trial=lambda p: seen.append(p.clone()) or 207.5)
    alone = complement_of_style(statistics(), *propose_style(prototypes(), statistics()))
    assert report.gain == 7.5
    assert torch.equal(seen[0], alone)
    assert not module.has_performance


def test_a_trial_without_a_record_is_not_run():
    def never(probability):
        raise AssertionError("the trial has nothing to be compared with")

    assert refine_style(prototypes(), statistics(), trial=never).gain == 0.0


def test_fused_prototypes_are_the_gain_weighted_mean_of_all_iterations():
    module = prototypes()
    gains, proposed = [2.0, -3.0, 6.0], []
    for number, gain in enumerate(gains):
        module.record(performance=100.0)
        proposed.append(propose_style(module, statistics(number))[0])
        refine_style(module, statistics(number), trial=lambda p, gain=gain: 100.0 + gain)
    weights = torch.softmax(torch.tensor(gains) / 5.0, dim=0)
    expected = torch.einsum("n,nkr->kr", weights, torch.stack(proposed))
    torch.testing.assert_close(module.vision, expected, atol=1e-5, rtol=1e-4)


def test_a_refinement_resumed_from_a_saved_state_equals_the_unbroken_one():
    unbroken, saved = prototypes(), prototypes()
    for module in (unbroken, saved):
        module.record(performance=100.0)
        refine_style(module, statistics(0), trial=lambda p: 103.0)
        module.record(performance=104.0)
    resumed = prototypes()
    resumed.load_state_dict(saved.state_dict())
    for module in (unbroken, resumed):
        refine_style(module, statistics(1), trial=lambda p: 101.0)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_half_precision_never_rounds_the_statistics():
    module = prototypes()
    refine_style(module, statistics())
    exact = module.semantic_probability.clone()
    module.to(torch.bfloat16).half()
    assert module.semantic_probability.dtype == module.vision.dtype == torch.float32
    assert torch.equal(module.semantic_probability, exact)


def test_restart_makes_room_for_another_probe_set_and_keeps_the_weights():
    module = prototypes()
    refine_style(module, statistics())
    kept = module.semantic_probability.clone()
    module.restart(4)
    assert module.vision.shape == module.text.shape == (3, 4)
    assert int(module.iteration) == 0
    assert torch.equal(module.semantic_probability, kept)


def test_statistics_of_another_probe_set_are_refused():
    with pytest.raises(ValueError, match=r"`statistics` must hold .* = \(10, 6\), got \(10, 4\)"):
        refine_style(prototypes(), statistics(pairs=4))


@pytest.mark.parametrize("number", [0, 11])
def test_a_number_of_prototypes_out_of_range_is_refused(number):
    with pytest.raises(ValueError, match="`num_prototypes` must be between 1 and the 10 columns"):
        StylePrototypes(10, number, 6)


def test_a_performance_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="`performance` must be finite, got nan"):
        prototypes().record(performance=math.nan)
