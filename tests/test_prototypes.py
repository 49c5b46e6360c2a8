"""Prototypes: clustering, matching, refining, and the life of the buffers."""

import math

import pytest
import torch

from pico_hf.core.construction import construct
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.score_form import ScoreForm
from pico_hf.core.semantic import standardise
from pico_hf.core.style import StyleClusters, style_prototypes
from pico_hf.core.token_features import TokenFeatures

STYLE = StyleClusters()


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


def prototypes(**kwargs) -> StylePrototypes:
    return StylePrototypes(10, 3, 6, estimators=["style"], **kwargs)


def test_before_any_refinement_every_column_is_semantic():
    assert prototypes().semantic_probability.tolist() == [1.0] * 10


class Probe:
    """Statistics of one probe set after the other."""

    def __init__(self, *seeds: int, pairs: int = 6):
        self.seeds, self.pairs = list(seeds), pairs

    def probe(self):
        generator = torch.Generator().manual_seed(self.seeds.pop(0))
        yield tuple(
            TokenFeatures(
                torch.randn(self.pairs, tokens, 10, generator=generator),
                torch.ones(self.pairs, tokens, dtype=torch.bool),
            )
            for tokens in (5, 3)
        )

    def moments(self):
        raise AssertionError("style prototypes come from the probe set")


def refine(module, seed: int = 0, trial=None, estimator=STYLE, **knobs):
    (report,) = construct(module, [estimator], Probe(seed), trial, **knobs)
    return report


class PseudoOnly(StyleClusters):
    def probability(self, statistics, vision, text):
        return statistics.pseudo_semantic_probability


@pytest.mark.parametrize("estimator", [STYLE, PseudoOnly()])
def test_a_refinement_gives_probabilities_that_differ_between_columns(estimator):
    module = prototypes()
    report = refine(module, estimator=estimator)
    assert report.iteration == int(module.iteration) == int(module.style_iteration) == 1
    assert report.fused_weight == 1.0
    assert module.semantic_probability.min() >= 0
    assert module.semantic_probability.max() <= 1
    assert module.semantic_probability.std() > 0


def test_the_gain_is_the_trial_minus_the_trial_of_what_is_there():
    module, seen = prototypes(), []
    report = refine(module, trial=lambda form: seen.append(form) or 200.0 + 7.5 * (len(seen) > 1))
    statistics = STYLE.collect(Probe(0))
    alone = STYLE.form(module, statistics, *STYLE.propose(prototypes(), statistics))
    assert report.gain == 7.5
    assert seen[0].semantic_probability.tolist() == [1.0] * 10
    assert torch.equal(seen[1].semantic_probability, alone.semantic_probability)


def test_fused_prototypes_are_the_gain_weighted_mean_of_all_iterations():
    module = prototypes()
    gains, proposed = [2.0, -3.0, 6.0], []
    for number, gain in enumerate(gains):
        ((vision, _),) = STYLE.propose(module, STYLE.collect(Probe(number)))
        proposed.append(vision)
        told = iter([100.0, 100.0 + gain, 0.0])
        refine(module, number, lambda form, told=told: next(told), guarded=False)
    weights = torch.softmax(torch.tensor(gains) / 5.0, dim=0)
    expected = torch.einsum("n,nkr->kr", weights, torch.stack(proposed))
    torch.testing.assert_close(module.vision, expected, atol=1e-5, rtol=1e-4)


def test_a_refinement_resumed_from_a_saved_state_equals_the_unbroken_one():
    def gaining(gain):
        told = iter([100.0, 100.0 + gain, 200.0])
        return lambda form: next(told)

    unbroken, saved = prototypes(), prototypes()
    for module in (unbroken, saved):
        refine(module, 0, gaining(3.0))
        module.note_evaluation()
    resumed = prototypes()
    resumed.load_state_dict(saved.state_dict())
    for module in (unbroken, resumed):
        refine(module, 1, gaining(-3.0))
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_half_precision_never_rounds_the_statistics():
    module = prototypes()
    refine(module)
    exact = module.semantic_probability.clone()
    module.to(torch.bfloat16).half()
    assert module.semantic_probability.dtype == module.vision.dtype == torch.float32
    assert torch.equal(module.semantic_probability, exact)


def test_restart_makes_room_for_another_probe_set_and_forgets():
    module = prototypes()
    refine(module)
    module.restart(4)
    assert module.vision.shape == module.text.shape == (3, 4)
    assert int(module.iteration) == int(module.style_iteration) == 0
    assert module.semantic_probability.tolist() == [1.0] * 10


def test_statistics_of_another_probe_set_are_refused():
    with pytest.raises(ValueError, match=r"`statistics` must hold .* = \(10, 6\), got \(10, 4\)"):
        construct(prototypes(), [STYLE], Probe(0, pairs=4))


def test_a_commit_of_what_is_not_finite_changes_nothing():
    module = prototypes()
    refine(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    good = torch.ones(10)
    for form, memory in (
        (ScoreForm(good * math.inf), {}),
        (ScoreForm(good), {"vision": torch.full((3, 6), math.nan)}),
    ):
        with pytest.raises(ValueError, match="must be finite, got NaN or infinity"):
            module.commit(form, **memory)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("number", [0, 11])
def test_a_number_of_prototypes_out_of_range_is_refused(number):
    with pytest.raises(ValueError, match="`num_prototypes` must be between 1 and the 10 columns"):
        StylePrototypes(10, number, 6)
