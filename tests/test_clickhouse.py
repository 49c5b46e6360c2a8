"""The recipe of docs/search_cost.md: ClickHouse scores both directions inside its engine."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from pages import ROOT
from pico_hf import TokenFeatures
from pico_hf.core.similarity import similarity
from test_search import synthetic

chdb = pytest.importorskip("chdb", reason="chdb is not installed")


def recipe() -> list[str]:
    """The statements of the page."""
    page = (ROOT / "docs" / "search_cost.md").read_text(encoding="utf-8")
    found = re.search(r"RECIPE = '''\n(.*?)'''", page, re.DOTALL)
    assert found is not None
    return [one.strip() for one in found[1].split(";") if one.strip()]


def literal(tokens: torch.Tensor) -> str:
    return str(tokens.tolist())


def test_clickhouse_gives_the_score_of_both_directions(tmp_path: Path):
    images, words = synthetic(40)
    lengths = torch.arange(40) % 5 + 8
    images = TokenFeatures(images.features, torch.arange(12) < lengths.unsqueeze(1))
    sides = (images.features, images.mask)
    rows = {
        "id": [str(n) for n in range(40)],
        "pooled": images.mean().tolist(),
        "tokens": [own[mask].tolist() for own, mask in zip(*sides, strict=True)],
    }
    floats = pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema(
        [("id", pyarrow.string()), ("pooled", floats), ("tokens", pyarrow.list_(floats))]
    )
    pyarrow.parquet.write_table(pyarrow.table(rows, schema), tmp_path / "images.parquet")
    query = words[:1]
    real = query.features[0][query.mask[0]]
    values = {
        "{file}": str(tmp_path / "images.parquet"),
        "{words}": literal(real),
        "{pooled}": literal(query.mean()[0]),
    }
    session = chdb.session.Session(str(tmp_path / "database"))
    for depth in ("40", "15"):
        for statement in recipe():
            for name, value in {**values, "{depth}": depth}.items():
                statement = statement.replace(name, value)
            answer = session.query(statement, "CSV")
        lines = [line.split(",") for line in str(answer).split()]
        expected = similarity(images, query).flatten()
        first = (images.mean() @ query.mean()[0]).topk(int(depth)).indices
        best = first[expected[first].argsort(descending=True)][:10].tolist()
        assert [int(key.strip('"')) for key, _ in lines] == best
        for key, score in lines:
            assert float(score) == pytest.approx(float(expected[int(key.strip('"'))]), abs=1e-6)
    session.close()
