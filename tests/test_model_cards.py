"""The published pages hold what a page of the Hub needs, and nothing that was typed in."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image

from pico_hf.cards.model_card import METRICS

FOLDER = Path(__file__).resolve().parents[1] / "model_cards"
NAMES = ("emoji-styles", "flickr8k")
ROW = re.compile(r"^\| (\w+) \| (base|PICO) \| (.+) \|$", re.MULTILINE)


@pytest.fixture(params=NAMES)
def page(request):
    return FOLDER / request.param / "README.md"


def test_the_metadata_are_what_the_hub_reads(page):
    data = ModelCard.load(page).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert data.license == "apache-2.0"
    assert "pico" in data.tags
    assert data.datasets == [page.parent.name]
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert index == data.to_dict()["model-index"]


def test_the_table_has_base_beside_pico_and_agrees_with_the_metadata(page):
    card = ModelCard.load(page)
    rows = {(split, model): values.split(" | ") for split, model, values in ROW.findall(card.text)}
    splits = {split for split, _ in rows}
    assert set(rows) == {(split, model) for split in splits for model in ("base", "PICO")}
    for result in card.data.eval_results:
        shown = float(rows[result.dataset_split, "PICO"][METRICS.index(result.metric_type)])
        assert shown == pytest.approx(result.metric_value, abs=0.051)


def test_the_page_names_command_commit_and_arguments(page):
    text = page.read_text(encoding="utf-8")
    assert "python examples/run_pico.py" in text
    assert re.search(r"at commit `[0-9a-f]{7,40}`", text)  # of a clean tree
    assert "`learning_rate`" in text
    assert "Standard deviation" in text
    assert "## Limits" in text
    assert "arXiv 2510.11175" in text


def test_the_pictures_of_the_page_are_there(page):
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert len(links) == 2
    for link in links:
        with Image.open(page.parent / link) as picture:
            assert picture.width > 400


def test_the_card_names_no_registry_and_no_path_of_a_machine(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"https?://(?!arxiv\.org)\S+", text)
    assert not re.findall(r"(?:^|[\s'\"`(])(?:/|~/|[A-Z]:\\)\w\S*", text, re.MULTILINE)


def test_every_folder_of_pages_is_listed():
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) == list(NAMES)
