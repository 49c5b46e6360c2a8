"""A few kills at random moments; `make chaos` does many."""

import random

import pytest

import chaos


@pytest.mark.slow
def test_killed_runs_go_on_exactly(tmp_path, capsys):
    seed = random.SystemRandom().randrange(10**6)
    with capsys.disabled():
        print(f"\nchaos with seed {seed}")
        report = chaos.chaos(kills=4, minutes=3, seed=seed, root=tmp_path, per_run=2)
        print(report.table())
    assert report.wrong == []
    assert report.kills == 4


@pytest.mark.slow
def test_a_run_that_ends_otherwise_is_told_from_an_undisturbed_one(tmp_path, monkeypatch):
    chaos.phases_of(*chaos.start(tmp_path / "one", "style"))
    monkeypatch.setitem(chaos.RUNS["style"], "seed", 1)
    chaos.phases_of(*chaos.start(tmp_path / "other", "style"))
    assert chaos.differences(tmp_path / "one", tmp_path / "one") == []
    assert chaos.differences(tmp_path / "one", tmp_path / "other")
