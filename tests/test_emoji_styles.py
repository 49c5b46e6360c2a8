"""The embedded drawings: free art, unseen concepts, one family held out."""

import datasets
import pytest
from PIL import Image

from make_emoji_styles import SIZE_LIMIT, make_splits
from run_pico import EMBEDDED_DATA


def rows(concepts: list[str], licence: str = "MIT") -> datasets.Dataset:
    styles = ["google", "fluent-3d"]
    table = {
        "concept": [c for c in concepts for _ in styles],
        "style": styles * len(concepts),
        "image": [Image.new("RGB", (4, 4))] * (2 * len(concepts)),
        "label": [f"label {c}" for c in concepts for _ in styles],
        "art_license": [licence] * (2 * len(concepts)),
    }
    return datasets.Dataset.from_dict(table)


def test_the_held_out_family_is_nowhere_in_training():
    splits = make_splits(rows(["a", "b"]), rows(["c"]))
    assert splits["train"]["style"] == ["google", "google"]
    assert splits["validation_seen"]["style"] == ["google"]
    assert splits["validation_unseen"]["style"] == ["fluent-3d"]
    assert splits["validation_unseen"]["caption"] == ["label c"]


def test_art_under_another_licence_is_left_out():
    assert len(make_splits(rows(["a"], "CC-BY-NC-4.0"), rows(["c"]))["train"]) == 0


def test_a_concept_on_both_sides_is_refused():
    with pytest.raises(ValueError, match="must hold other concepts than `train`"):
        make_splits(rows(["a"]), rows(["a"]))


def embedded(name: str) -> datasets.Dataset:
    path = EMBEDDED_DATA / f"{name}.parquet"
    return datasets.load_dataset("parquet", data_files=str(path), split="train")


def test_the_embedded_files_keep_the_rules_and_the_size_limit():
    train, seen, unseen = map(embedded, ("train", "validation_seen", "validation_unseen"))
    assert all(style.startswith("fluent-") for style in unseen["style"])
    known = {*train["style"], *seen["style"]}
    assert not any(style.startswith("fluent-") for style in known)
    assert not set(train["concept"]) & (set(seen["concept"]) | set(unseen["concept"]))
    total = sum(path.stat().st_size for path in EMBEDDED_DATA.glob("*.parquet"))
    assert total < SIZE_LIMIT
    attribution = (EMBEDDED_DATA / "ATTRIBUTION.md").read_text()
    assert all(style in attribution for style in known | set(unseen["style"]))
