"""The effect study: what a split may not share, and numbers a reader can check."""

import json
from pathlib import Path

import pytest
import torch

import report
from features import store_names, to_grid
from main_table import LITERAL
from pico_hf.core.token_features import TokenFeatures
from pretrained import paired
from small_vit import GRID, mirrored
from study import Job, Study, corpus_facts, family, from_command_line, row_numbers, trained_sides

EFFECT = Path(report.__file__).parent


@pytest.fixture(scope="module")
def drawings():
    nowhere = Path("the embedded drawings need no other data")
    return row_numbers("drawings/fluent", nowhere), corpus_facts("drawings", nowhere)


def test_no_concept_of_training_gives_feedback_or_is_reported_on(drawings):
    rows, facts = drawings
    concepts = {part: {facts.ids[row] for row in chosen} for part, chosen in rows.items()}
    assert set(rows) == {"train", "feedback", "seen", "unseen"}
    for part in ("feedback", "seen", "unseen"):
        assert not concepts["train"] & concepts[part], part
    assert not concepts["feedback"] & (concepts["seen"] | concepts["unseen"])


def test_the_family_left_out_is_in_the_unseen_split_alone(drawings):
    rows, facts = drawings
    families = {part: {family(facts.galleries[n]) for n in chosen} for part, chosen in rows.items()}
    assert families.pop("unseen") == {"fluent"}
    assert not any("fluent" in seen for seen in families.values())


def test_two_generations_of_one_vendor_are_one_family():
    assert family("google") == family("noto-v1") == "noto"
    assert family("fluent-3d") == family("fluent-emoji-flat") == "fluent"


def test_every_config_file_is_read_by_a_script_of_its_name(tmp_path):
    for path in EFFECT.glob("*.yaml"):
        assert Study(path, tmp_path, tmp_path).config["seeds"], path
    smoke = Study(EFFECT / "smoke.yaml", tmp_path, tmp_path).config
    assert set(smoke["jobs"][0]["literal"]) <= set(LITERAL)


def test_special_tokens_have_stores_of_their_own_where_there_are_any():
    assert store_names("flickr8k", "vit", "captions", False) == (
        "flickr8k-vit",
        "flickr8k-captions",
    )
    assert store_names("flickr8k", "lite0", "captions", True) == (
        "flickr8k-lite0",
        "flickr8k-captions-special",
    )
    assert store_names("emoji", "vit", "tags", True) == ("emoji-vit-special", "emoji-tags-special")


def test_the_grid_comes_after_the_tokens_before_it():
    cells = torch.arange(64.0).view(1, 64, 1)
    first = torch.tensor([[[7.0], [9.0]]])
    tokens = TokenFeatures(torch.cat([first, cells], dim=1), torch.ones(1, 66).bool())
    plain = to_grid(TokenFeatures(cells, torch.ones(1, 64).bool())).features
    assert plain[0, 0, 0] == (0 + 1 + 8 + 9) / 4
    assert torch.equal(to_grid(tokens, 2).features, torch.cat([first, plain], dim=1))


def test_the_table_of_special_tokens_is_paired_by_seed():
    line = {"target": "photos", "few": "64 pairs", "half": 3.0, "aligned": 5.0}
    lines = [
        {**line, "seed": seed, "special": kept, "tokens": 10.0 * seed + 4 * kept}
        for seed in (0, 1)
        for kept in (False, True)
    ]
    lines.append({**line, "seed": 2, "tokens": 99.0})  # of a run without them
    assert "| photos | 64 pairs | 5.0 | 4.0 ± 0.0 | 3.0 | 0.0 ± 0.0 | 5.0 |" in paired(lines)


def test_two_processes_share_the_seeds(monkeypatch, tmp_path):
    taken = []
    for part in ("0/2", "1/2"):
        wanted = ["script", "--part", part, "--output", str(tmp_path)]
        monkeypatch.setattr("sys.argv", [*wanted, "--config", str(EFFECT / "smoke.yaml")])
        _, mine = from_command_line(None, "main_table.py")
        taken.append(list(filter(mine, range(5))))
    assert taken == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize(
    ("tuned", "sides"),
    [
        (None, ()),
        ("text", ("text",)),
        ("text-lora", ("text",)),
        ("both", ("image", "text")),
        ("both-lora", ("image", "text")),
    ],
)
def test_which_towers_a_job_trains(tuned, sides):
    assert trained_sides(Job("emoji/fluent", "vit", "hinge", 0, tuned=tuned)) == sides


def test_a_mirrored_picture_has_a_mirrored_map():
    torch.manual_seed(0)
    pixels = torch.rand(16, 3, GRID, GRID)  # a pixel per cell
    cells = pixels.flatten(2).transpose(1, 2)
    turned, theirs = mirrored(pixels, cells)
    assert torch.equal(theirs, turned.flatten(2).transpose(1, 2))
    kept = (turned == pixels).flatten(1).all(dim=1)
    assert 0 < int(kept.sum()) < 16
    assert torch.equal(turned[~kept], pixels[~kept].flip(3))


def test_the_interval_is_students():
    assert report.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 · 1 / √3
    assert report.interval([2.0]) == "2.0"


def line(row: str, seed: int, rsum: float, **more) -> dict:
    known = {"dataset": "x", "tower": "t", "loss": "hinge", "seed": seed, "row": row}
    return {**known, "metrics": {"dev": {"rsum": rsum}}, "spread": 0.0, **more}


def test_differences_are_taken_within_a_seed():
    base = [line(report.BASE, 0, 100.0), line(report.BASE, 1, 200.0)]
    rows = [line("other", 1, 207.0), line("other", 0, 101.0), line("other", 2, 999.0)]
    assert report.differences(rows, base, "dev") == [7.0, 1.0]


def test_of_a_job_that_was_run_twice_the_last_line_counts(tmp_path):
    file = tmp_path / "main_table.jsonl"
    written = [line(report.BASE, 0, 100.0), line(report.BASE, 0, 103.0), line("complete", 0, 0.0)]
    file.write_text("\n".join(map(json.dumps, written)))
    assert [report.rsum(kept, "dev") for kept in report.lines(file)] == [103.0]


def test_tables_stand_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("one\n<!-- a: begin -->\nold\n<!-- a: end -->\ntwo\n")
    report.fill(page, {"a": "new"})
    assert page.read_text() == "one\n<!-- a: begin -->\nnew\n<!-- a: end -->\ntwo\n"


def test_the_summary_gives_the_gain_in_points_and_in_percent(tmp_path):
    rows = [line(report.BASE, n, 200.0) for n in (0, 1)]
    rows += [line(report.CHOSEN, n, 210.0) for n in (0, 1)]
    last = report.summary(rows).splitlines()[-1]
    assert "| x, t, hinge | dev | 200.0 ± 0.0 | 210.0 ± 0.0 | 10.0 ± 0.0 | 5.0 ± 0.0 | 2 |" in last
