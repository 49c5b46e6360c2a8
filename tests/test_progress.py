"""Every phase that takes long shows a progress bar, and every switch puts out all of them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from functools import partial

import huggingface_hub.utils
import pytest
from PIL import Image
from transformers.utils import logging as transformers_logging

from pico_hf import PicoIndex, PicoRetriever, load_image_text, mine_hard_negatives
from pico_hf.data import progress
from pico_hf.training.feedback import Feedback
from tiny import tiny_processor, tiny_refined, tiny_rows
from tiny_trainer import tiny_model, tiny_trainer

PHASES = {
    "training": {
        "Caching image features",
        "Caching text features",
        "Probe statistics",
        "Moments of images",
        "Moments of captions",
        "Feedback on style",
        "Feedback on canonical",
        "Feedback",
        "Evaluation",
        "Scoring",
    },
    "retriever": {"Encoding images", "Encoding texts", "Scoring"},
    "index": {"Indexing"},
    "mining": {"Encoding what is mined", "Mining"},
    "loading": {"Checking images"},
}


class Bars:
    """Stands for tqdm: which bars there were, and which of them were shown."""

    def __init__(self, monkeypatch) -> None:
        self.shown, self.hidden = set(), set()
        monkeypatch.setattr(progress, "tqdm", self.bar)
        monkeypatch.setattr(progress, "_chosen", None)
        monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
        monkeypatch.setattr(progress, "are_progress_bars_disabled", lambda: False)
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    def bar(self, values=None, desc="", disable=False, **options):
        (self.hidden if disable else self.shown).add(desc)
        return REAL(values, desc=desc, disable=True, **options)


REAL = progress.tqdm


@pytest.fixture
def bars(monkeypatch):
    return Bars(monkeypatch)


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (40 * number, 90, 255 - 40 * number))


def run_training(folder, disable_tqdm=False) -> None:
    trainer = tiny_trainer(
        folder,
        {"model": tiny_model(estimators=["style", "canonical"])},
        freeze_encoder=True,
        num_train_epochs=2,  # style prototypes come before the step after an evaluation
        feature_cache_dir=str(folder / "cache"),
        disable_tqdm=disable_tqdm,
        eval_strategy="epoch",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    trainer.feedback_class = partial(Feedback, guarded=False)
    trainer.train()


def retriever(**options) -> PicoRetriever:
    return PicoRetriever(tiny_refined(), tiny_processor(), batch_size=2, **options)


def run_retriever(folder, disable_tqdm=False) -> None:
    found = retriever(show_progress=not disable_tqdm)
    found.score([picture(n) for n in range(4)], ["a red disc", "a square", "a disc"])


def run_index(folder, disable_tqdm=False) -> None:
    made = PicoIndex.create(folder / "index", retriever())
    made.add([picture(n) for n in range(4)], ids=list("abcd"), show_progress=not disable_tqdm)


def run_mining(folder, disable_tqdm=False) -> None:
    mine_hard_negatives(retriever(show_progress=not disable_tqdm), tiny_rows(12), per_pair=1)


def run_loading(folder, disable_tqdm=False) -> None:
    tiny_rows(6).to_parquet(folder / "rows.parquet")
    load_image_text(files=str(folder / "rows.parquet"))


RUNS = {
    "training": run_training,
    "retriever": run_retriever,
    "index": run_index,
    "mining": run_mining,
    "loading": run_loading,
}


@pytest.mark.parametrize("name", PHASES)
def test_every_phase_shows_a_bar_of_its_name(name, bars, tmp_path):
    RUNS[name](tmp_path)
    assert bars.shown >= PHASES[name]
    # An index has a bar of its own, and mining scores single images against a few.
    assert not bars.hidden - {"Encoding images", "Encoding texts", "Scoring"}


@pytest.mark.parametrize("name", [name for name in PHASES if name != "loading"])
def test_who_asks_for_none_gets_none(name, bars, tmp_path):
    RUNS[name](tmp_path, disable_tqdm=True)
    assert not bars.shown - {"Checking images"}
    assert bars.hidden >= PHASES[name]


@pytest.mark.parametrize("switch", ["transformers", "hub", "another process"])
@pytest.mark.parametrize("name", ["retriever", "index", "loading"])
def test_every_switch_puts_out_all_bars(name, switch, bars, tmp_path, monkeypatch):
    if switch == "transformers":
        monkeypatch.setattr(transformers_logging, "_tqdm_active", False)
    elif switch == "hub":
        monkeypatch.setattr(progress, "are_progress_bars_disabled", lambda: True)
    else:
        monkeypatch.setenv("LOCAL_RANK", "1")
    RUNS[name](tmp_path)
    assert not bars.shown
    assert bars.hidden >= PHASES[name]


def test_the_switches_are_those_of_their_libraries(bars, monkeypatch):
    monkeypatch.setattr(
        progress, "are_progress_bars_disabled", huggingface_hub.utils.are_progress_bars_disabled
    )
    transformers_logging.enable_progress_bar()
    assert progress.bars_are_shown()
    transformers_logging.disable_progress_bar()
    try:
        assert not progress.bars_are_shown()
        progress.choose_bars(True)  # as the command line does, which shows no bars of loading
        assert progress.bars_are_shown()
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert not progress.bars_are_shown()
    finally:
        transformers_logging.enable_progress_bar()


def test_the_environment_switches_bars_off():
    script = "from pico_hf.data.progress import bars_are_shown; print(bars_are_shown())"
    said = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": value},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for value in ("0", "1")
    ]
    assert said == ["True", "False"]


def test_a_bar_that_is_shown_is_written(monkeypatch, bars):
    said = io.StringIO()
    monkeypatch.setattr(progress, "tqdm", partial(REAL, file=said))
    assert list(progress.progress_bar([1, 2], "Counting")) == [1, 2]
    assert "Counting" in said.getvalue()
