"""The constructor: one loop, one guard, for every source of proposals."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comparisons import FUSION_RULES
from pico_hf.core.canonical import CANDIDATES, CanonicalColumns, bilinear_form
from pico_hf.core.construction import construct
from pico_hf.core.estimator import Memory, TrainingPairs
from pico_hf.core.estimators import ESTIMATORS
from pico_hf.core.pooled_share import SHARES, PooledShare
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.score_form import ScoreForm
from pico_hf.core.state import MOST_POOLED, SOURCES
from pico_hf.core.style import StyleClusters
from pico_hf.core.token_features import TokenFeatures
from test_canonical import random_moments, random_tokens
from tiny import GivenPairs, tiny_inputs, tiny_refined


class Pairs:
    """Pairs whose moments are given."""

    def __init__(self, **sizes):
        self.sizes = sizes

    def probe(self):
        yield random_tokens(0), random_tokens(1)

    def moments(self):
        return random_moments(**self.sizes)


def bank(*estimators: str, **knobs) -> StylePrototypes:
    return StylePrototypes(4, 2, 6, estimators=estimators or tuple(ESTIMATORS), **knobs)


def own_columns() -> torch.Tensor:
    return torch.eye(4, dtype=torch.float64)


def distance(form: ScoreForm) -> float:
    """How far a form is from the encoder columns with equal weights."""
    return float((form.matrix() - own_columns()).norm())


def state_of(module: StylePrototypes) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# ---- fusing ------------------------------------------------------------------------------------


class Given:
    """Proposes given matrices of one number; the first of what is fused is the identity, 1."""

    source, needs_feedback, picks = "canonical", False, False

    def __init__(self, *numbers: float):
        self.numbers = numbers

    def collect(self, pairs):
        return None

    def memory(self, bank):
        return Memory((bank.form.matrix(),))

    def propose(self, bank, statistics):
        return [(number * torch.ones(4).double().diag(),) for number in self.numbers]

    def form(self, bank, statistics, tensors):
        return ScoreForm(tensors[0].diagonal() / 2000)

    def stored(self, memory):
        return {}


def fused(numbers, gains, fusion="normalised_gain") -> float:
    """What numbers are fused to by what each of them brings; -1 of the last report is that form."""
    module = StylePrototypes(4, 1, 2, estimators=["canonical"])
    told = iter([0.0, *gains, 1e9])
    found = construct(
        module, [Given(*numbers)], Pairs(), lambda form: next(told), fusion=FUSION_RULES[fusion]
    )
    return float(found[-1].form.semantic_probability[0]) * 2000


GAINS = st.lists(
    st.floats(-60, 60, allow_nan=False).map(lambda gain: round(gain, 3)),
    min_size=1,
    max_size=8,
    unique=True,
)


@given(GAINS)
@settings(deadline=None, max_examples=100)
def test_a_larger_gain_has_the_larger_weight_in_what_is_kept_whatever_the_order(gains):
    """The theorem of the performance-feedback weighting function, of the loop as it is run."""
    numbers = [float(10 * (n + 1)) for n in range(len(gains))]
    weights = torch.softmax(torch.tensor([0.0, *gains]).double() / 5.0, dim=0).tolist()
    expected = sum(w * number for w, number in zip(weights, [1.0, *numbers], strict=True))
    for order in itertools.islice(itertools.permutations(range(len(gains))), 6):
        found = fused([numbers[n] for n in order], [gains[n] for n in order])
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_last_form_alone_counts_for_the_rule_last():
    assert fused([10, 100], [0.0, 0.0], "last") == pytest.approx(100)
    assert fused([10, 100], [0.0, 0.0], "uniform") == pytest.approx(111 / 3)


# ---- what all sources have in common -------------------------------------------------------------


@pytest.mark.parametrize("source", list(ESTIMATORS))
def test_a_proposal_is_tried_before_anything_changes(source):
    module = bank()
    before = state_of(module)

    def trial(form):
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
        return 100.0

    construct(module, [ESTIMATORS[source]], Pairs(), trial)


@pytest.mark.parametrize("source", list(ESTIMATORS))
def test_what_scores_less_than_what_is_there_is_not_taken(source):
    module = bank()
    before = state_of(module)
    found = construct(
        module,
        [ESTIMATORS[source]],
        Pairs(),
        lambda form: -distance(form) - form.pooled_share,
    )
    assert found
    assert {refinement.fused_weight for refinement in found} == {0.0}
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("source", ["style", "canonical"])
def test_without_the_guard_it_is_taken(source):
    module = bank()
    construct(module, [ESTIMATORS[source]], Pairs(), lambda form: -distance(form), guarded=False)
    assert module.semantic_probability.std() > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("source", list(ESTIMATORS))
def test_proposals_that_give_no_number_are_left_out_and_nothing_is_taken(source, bad, caplog):
    module = bank()
    before, tried = state_of(module), []

    def trial(form):
        tried.append(form)
        return 100.0 if len(tried) == 1 else bad

    found = construct(module, [ESTIMATORS[source]], Pairs(), trial)
    assert "gave NaN or infinity and were left out" in caplog.text
    assert {(one.gain, one.fused_weight) for one in found} == {(0.0, 0.0)}
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("source", list(ESTIMATORS))
def test_where_the_score_of_what_is_there_is_no_number_it_stays(source):
    module, tried = bank(), []

    def trial(form):
        tried.append(form)
        return math.nan if len(tried) == 1 else 100.0

    construct(module, [ESTIMATORS[source]], Pairs(), trial)
    assert module.semantic_probability.tolist() == [1.0] * 4
    assert module.score_share == 0.0


@pytest.mark.parametrize("source", list(ESTIMATORS))
def test_a_trial_that_fails_changes_nothing(source):
    module = bank()
    before = state_of(module)

    def power_cut(form):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        construct(module, [ESTIMATORS[source]], Pairs(), power_cut)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_construction_answers_the_evaluation_that_asked_for_it():
    module = bank()
    module.note_evaluation()
    assert bool(module.evaluated)
    construct(module, [ESTIMATORS["style"]], Pairs(), lambda form: -distance(form))
    assert not bool(module.evaluated)


def test_every_source_begins_with_what_the_one_before_has_left():
    module = bank()
    tried = []

    def trial(form):
        tried.append(form)
        return 100.0 + distance(form)

    construct(module, [ESTIMATORS["style"], ESTIMATORS["canonical"]], Pairs(), trial)
    assert tried[0].same_columns(ScoreForm(torch.ones(4)))
    style, first_of_canonical = tried[2], tried[3]
    assert style.same_columns(first_of_canonical)
    assert style.semantic_probability.std() > 0


def test_estimators_are_what_the_loop_takes():
    from pico_hf.core.estimator import Estimator

    assert ESTIMATORS.keys() == SOURCES.keys()
    assert all(ESTIMATORS[name].source == name for name in SOURCES)
    assert all(isinstance(estimator, Estimator) for estimator in ESTIMATORS.values())
    assert isinstance(Pairs(), TrainingPairs)


# ---- canonical columns ---------------------------------------------------------------------------


def align(module: StylePrototypes, trial=None, candidates=CANDIDATES, **sizes):
    return construct(module, [CanonicalColumns(candidates)], Pairs(**sizes), trial)


def test_before_the_alignment_tokens_are_the_encoders_own_bit_for_bit():
    tokens, module = random_tokens(0), bank()
    for side in ("image", "text"):
        assert torch.equal(module.to_columns(tokens, side).features, tokens.features)
    assert module.semantic_probability.tolist() == [1.0] * 4


def test_without_a_trial_all_candidates_count_alike():
    module, moments = bank(), random_moments()
    assert [report.gain for report in align(module)] == [0.0] * len(CANDIDATES)
    mean = torch.stack([own_columns(), *(bilinear_form(moments, c) for c in CANDIDATES)]).mean(0)
    basis = module.image_basis @ module.semantic_probability.diag() @ module.text_basis.t()
    torch.testing.assert_close(basis * float(torch.linalg.svdvals(mean)[0]), mean.float())


def test_every_candidate_is_tried_against_what_is_there():
    tried = []

    def trial(form):
        tried.append(form)
        return 100.0 + len(tried)

    reports = align(bank(), trial, CANDIDATES[:3])
    assert torch.equal(tried[0].matrix(), own_columns())
    assert [report.gain for report in reports] == [1.0, 2.0, 3.0]
    assert [report.iteration for report in reports] == [1, 2, 3]
    assert len(tried) == 5  # at last the fused one


def test_the_log_has_the_spread_of_what_was_fused_up_to_then():
    reports = align(bank(), lambda form: 100.0 + distance(form))
    spreads = [float(report.form.semantic_probability.std()) for report in reports]
    assert len(set(spreads)) == len(spreads)


def test_columns_that_are_not_taken_are_warned_of(caplog):
    module, tokens = bank(), random_tokens(0)
    align(module, lambda form: -distance(form))
    assert "rSum on the dev split, what is there" in caplog.text
    assert torch.equal(module.to_columns(tokens, "image").features, tokens.features)


def test_the_way_to_canonical_columns_and_back_ends_where_it_began():
    module, tokens = bank(), random_tokens(0)
    align(module)
    there = module.to_columns(tokens, "image")
    assert not torch.allclose(there.features, tokens.features, atol=1e-2)
    back = module.to_encoder_columns(there, "image").features
    torch.testing.assert_close(back, tokens.features, atol=1e-5, rtol=1e-5)


def test_restart_goes_back_to_the_encoders_own_columns():
    module = bank()
    align(module)
    module.restart(5)
    assert torch.equal(module.image_basis, torch.eye(4))
    assert module.semantic_probability.tolist() == [1.0] * 4
    assert int(module.iteration) == 0


def test_loaded_columns_are_used_at_once():
    aligned, fresh, tokens = bank(), bank(), random_tokens(0)
    align(aligned)
    fresh.to_columns(tokens, "image")
    fresh.load_state_dict(aligned.state_dict())
    one, other = (module.to_columns(tokens, "image").features for module in (fresh, aligned))
    assert torch.equal(one, other)
    fresh.load_state_dict(bank().state_dict())
    assert torch.equal(fresh.to_columns(tokens, "image").features, tokens.features)


@torch.no_grad()
def test_mixed_precision_rounds_no_rotated_token():
    module, tokens = bank(), random_tokens(0)
    align(module)
    exact = module.to_columns(tokens, "image").features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module.to_columns(tokens, "image").features
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, exact)


@torch.no_grad()
def test_a_model_scores_what_its_bilinear_form_scores():
    model = tiny_refined()
    inputs = tiny_inputs()
    images = model.encode_images(inputs["pixel_values"])
    texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
    module = model.prototypes
    form = module.form.matrix().float()
    own = module.to_encoder_columns(images, "image"), module.to_encoder_columns(texts, "text")
    met = TokenFeatures(own[1].features @ form.t(), own[1].mask)
    expected = model.score(own[0], met, torch.ones(len(form)))
    torch.testing.assert_close(model.score(images, texts), expected, atol=1e-5, rtol=1e-5)
    assert model.column_weights.std() > 0


def test_columns_that_no_estimator_of_a_model_rotates_are_refused():
    with pytest.raises(ValueError, match="Add 'canonical' to `estimators`, which are style"):
        align(bank("style"))


def test_moments_of_another_width_are_refused():
    with pytest.raises(ValueError, match="`moments` must have the encoder's 4 columns, got 6"):
        align(bank(), columns=6)


def test_no_candidates_are_refused():
    with pytest.raises(ValueError, match="`candidates` must hold at least one"):
        CanonicalColumns([])


def test_candidates_whose_trial_is_no_number_change_nothing_for_the_others(caplog):
    module, other, calls = bank(), bank(), []

    def trial(form):
        calls.append(form)
        if 1 < len(calls) <= 1 + len(CANDIDATES) and len(calls) % 2:
            return math.nan
        return 100.0 + distance(form)

    found = align(module, trial)
    expected = align(other, lambda form: 100.0 + distance(form), CANDIDATES[::2])
    assert "9 of 18 proposals of 'canonical' gave NaN or infinity" in caplog.text
    assert [one.fused_weight for one in found[1::2]] == [0.0] * 9
    assert [one.fused_weight for one in found[::2]] == [one.fused_weight for one in expected]
    assert torch.equal(module.semantic_probability, other.semantic_probability)


# ---- the share of pooled vectors -----------------------------------------------------------------


def choose_share(module: StylePrototypes, trial):
    return construct(module, [PooledShare()], Pairs(), lambda form: trial(form.pooled_share))


def sharing(share: float) -> StylePrototypes:
    module = bank()
    module.share_score(share)
    return module


def test_the_share_that_brings_most_is_found():
    module = sharing(0.0)
    reports = choose_share(module, lambda m: 100 - 60 * abs(m - 0.5))
    assert module.score_share == pytest.approx(0.5, abs=0.17)
    assert [report.source for report in reports] == ["pooled"] * len(SHARES)
    best = max(reports, key=lambda report: report.gain)
    assert SHARES[best.iteration - 1] == 0.5
    assert best.gain == pytest.approx(30.0)


def test_of_two_ways_that_are_good_and_far_apart_the_better_one_is_taken():
    module = sharing(0.0)
    choose_share(module, lambda m: 90.0 if m == 1.0 else 80.0 * (m == 0.0))
    assert module.score_share == 1.0


@pytest.mark.parametrize("own", [0.0, 0.4, 1.0])
def test_a_share_that_nothing_beats_stays(own):
    module = sharing(own)
    choose_share(module, lambda m: 100.0 if m == own else 50.0)
    assert module.score_share == pytest.approx(own)
    choose_share(module, lambda m: 100.0)  # nor does it move where nothing differs
    assert module.score_share == pytest.approx(own)


def test_shares_that_give_no_number_are_left_out():
    module = sharing(0.2)
    choose_share(module, lambda m: 100.0 + m if m < 0.5 else math.nan)
    assert 0.2 < module.score_share < 0.5


def test_without_a_dev_split_the_share_stays():
    module = sharing(0.4)
    assert construct(module, [PooledShare()], Pairs()) == []
    assert module.score_share == pytest.approx(0.4)


def test_a_run_trains_tokens_even_if_pooled_features_were_all_of_the_score():
    module = sharing(1.0)
    module.restart(3)
    assert module.score_share == pytest.approx(MOST_POOLED)


# ---- style prototypes ----------------------------------------------------------------------------


def test_style_is_proposed_once_per_construction_and_fused_into_what_is_there():
    module = bank("style")
    pairs = GivenPairs(random_tokens(0), random_tokens(1))
    for number in (1, 2, 3):
        (report,) = construct(module, [StyleClusters()], pairs, lambda form: 100.0)
        assert (report.source, report.iteration) == ("style", number)
    assert int(module.style_iteration) == 3
    assert report.fused_weight == pytest.approx(1 / 3)
