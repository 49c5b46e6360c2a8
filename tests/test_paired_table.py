"""Every row stands beside the base that was named, seed by seed."""

import pytest

import paired_table


def line(recipe: str, row: str, seed: int, rsum: float) -> dict:
    metrics = {"dev": {"rsum": rsum}}
    about = {"dataset": "flickr8k", "loss": "infonce", "seed": seed, "metrics": metrics}
    return {**about, "recipe": recipe, "row": row}


FOUND = [
    line("own loss", "pooled cosine", 0, 100.0),
    line("own loss", "pooled cosine", 1, 200.0),
    line("own loss", "feedback", 0, 101.0),
    line("own loss", "feedback", 1, 203.0),
    line("ours", "feedback", 1, 210.0),
    line("ours", "feedback", 0, 110.0),
]


def gains(base):
    rows = paired_table.table(FOUND, base).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[3]: row[5] for row in cells}


@pytest.mark.parametrize(
    ("base", "ours", "own"),
    [
        ("own loss: pooled cosine", "10.0 ± 0.0", "2.0 ± 12.7"),  # one row for all
        ("own loss", "8.0 ± 12.7", "0.0 ± 0.0"),  # the same row of that recipe
    ],
)
def test_gains_are_taken_to_the_base_of_the_same_seed(base, ours, own):
    found = gains(base)
    assert found["ours: feedback"] == ours
    assert found["own loss: feedback"] == own
    assert found["own loss: pooled cosine"] == "0.0 ± 0.0"
