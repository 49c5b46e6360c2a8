"""The table of recipes takes gains seed by seed, and to a recipe that was trained as long."""

import recipe_table


def line(recipe: str, seed: int, rsum: float, row: str = "w = 1") -> dict:
    metrics = {"dev": {"rsum": rsum}}
    return {"dataset": "photos", "recipe": recipe, "row": row, "seed": seed, "metrics": metrics}


def test_gains_are_taken_seed_by_seed():
    found = [line("best w = 1", 1, 200.0), line("best w = 1", 0, 100.0)]
    found += [line("default", 0, 110.0, "feedback"), line("default", 1, 210.0, "feedback")]
    last = recipe_table.table(found).splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[2:4] == ["default", "feedback"]
    assert cells[5] == "10.0 ± 0.0"
    assert cells[6].startswith("7.5 ± ")  # of 10 % and 5 %


def test_a_longer_run_is_compared_with_a_longer_one():
    found = [line("best w = 1", 0, 100.0), line("best w = 1, twice as long", 0, 120.0)]
    found.append(line("default, twice as long", 0, 126.0, "feedback"))
    cells = recipe_table.table(found).splitlines()[-1].split("|")
    assert cells[6].strip() == "6.0"
