"""The published model cards hold what the Hub needs, and nothing private."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image

from pico_hf.cards.model_card import METRICS, package_link
from pico_hf.cards.redaction import public_command, public_text

FOLDER = Path(__file__).resolve().parents[1] / "model_cards"
NAMES = ("emoji-styles", "flickr8k")
ROW = re.compile(r"^\| (\w+) \| (base|PICO) \| (.+) \|$", re.MULTILINE)


@pytest.fixture(params=NAMES)
def path(request):
    return FOLDER / request.param / "README.md"


def test_the_metadata_are_what_the_hub_reads(path):
    data = ModelCard.load(path).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert data.license == "apache-2.0"
    assert "pico" in data.tags
    assert data.datasets == [path.parent.name]
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert index == data.to_dict()["model-index"]


def test_the_table_has_base_beside_pico_and_agrees_with_the_metadata(path):
    card = ModelCard.load(path)
    rows = {(split, model): values.split(" | ") for split, model, values in ROW.findall(card.text)}
    splits = {split for split, _ in rows}
    assert set(rows) == {(split, model) for split in splits for model in ("base", "PICO")}
    for result in card.data.eval_results:
        shown = float(rows[result.dataset_split, "PICO"][METRICS.index(result.metric_type)])
        assert shown == pytest.approx(result.metric_value, abs=0.051)


def test_the_model_card_names_command_commit_and_arguments(path):
    text = path.read_text(encoding="utf-8")
    assert "python examples/run_pico.py" in text
    assert re.search(r"at commit `[0-9a-f]{7,40}`", text)  # of a clean tree
    assert "`learning_rate`" in text
    assert "Standard deviation" in text
    assert "## Limits" in text
    assert "arXiv 2510.11175" in text


def test_the_model_card_shows_no_path_no_registry_and_no_home_page_but_that_of_the_package(path):
    text = path.read_text(encoding="utf-8")
    command = re.search(r"```\n(python .+)\n```", text).group(1)
    assert public_command(command) == command
    lines = [line for line in text.splitlines() if not line.startswith("![")]
    assert [line for line in lines if public_text(line) != line] == []
    assert f" with {package_link()}: " in text
    assert "://" not in text.replace(package_link(), "")


def test_the_images_of_the_model_card_are_there(path):
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    assert len(links) == 2
    for link in links:
        with Image.open(path.parent / link) as image:
            assert image.width > 400


def test_every_folder_of_model_cards_is_listed():
    assert sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir()) == list(NAMES)
