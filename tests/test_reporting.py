"""What a run tells `report_to`."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback

from pico_hf.training import reporting
from pico_hf.training.feedback import Feedback
from tiny_trainer import BARE, tiny_model, tiny_trainer

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
ADDED = {
    "pico_images_per_second",
    "pico_peak_memory_mb",
    "pico_phase",
    "pico_pooled_share",
    *(f"pico_weight_{what}" for what in ("std", "min", "p10", "p50", "p90", "max")),
}


class Recorder(TrainerCallback):
    """Stands for a stock callback: keeps every entry, and images if it is to take any."""

    def __init__(self) -> None:
        self.entries, self.images = [], []
        self.tb_writer = self

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))

    def add_figure(self, name, figure, step, close):
        self.images.append((name, figure, step))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("reported"),
        {"model": tiny_model(estimators=["style"]), "callbacks": [recorder]},
        prototype_warmup_epochs=1.0,
        num_train_epochs=2,
        save_strategy="no",
        load_best_model_at_end=False,
    )
    # Whether or not so short a run gains by it, so that there is something to report.
    trainer.feedback_class = partial(Feedback, guarded=False)
    trainer.train()
    return trainer, recorder


def test_every_entry_tells_how_the_run_goes(run):
    _, recorder = run
    losses = [entry for entry in recorder.entries if "loss" in entry]
    assert len(losses) == 6
    assert all(entry.keys() >= ADDED for entry in losses)
    assert all(isinstance(entry[name], int | float) for entry in losses for name in ADDED)
    assert [entry["pico_phase"] for entry in losses] == [0, 0, 1, 1, 1, 2]
    assert all(entry["pico_images_per_second"] > 0 for entry in losses)
    assert all(entry["pico_peak_memory_mb"] > 50 for entry in losses)


def test_what_a_prototype_brought_is_told(run):
    _, recorder = run
    brought = [entry for entry in recorder.entries if "pico_style_feedback" in entry]
    assert brought
    assert all(isinstance(entry["pico_style_feedback"], float) for entry in brought)


def test_weights_are_told_and_a_writer_of_images_gets_the_spectrum_whenever_it_changed(run):
    trainer, recorder = run
    drawn = len(recorder.images)
    assert drawn >= 1
    trainer.log({"anything": 1.0})
    assert len(recorder.images) == drawn
    prototypes = trainer.pico_model.prototypes
    prototypes.semantic_probability.copy_(
        torch.linspace(0.1, 0.9, len(prototypes.semantic_probability))
    )
    prototypes.iteration += 1
    trainer.log({"anything": 1.0})
    assert len(recorder.images) == drawn + 1
    name, figure, step = recorder.images[-1]
    assert (name, step) == ("pico/semantic_probability", trainer.state.global_step)
    assert isinstance(figure, Figure)
    line = torch.as_tensor(figure.axes[0].lines[0].get_ydata()).float()
    torch.testing.assert_close(line, prototypes.semantic_probability.flip(0))
    weights, last = trainer.pico_model.column_weights, recorder.entries[-1]
    assert last["pico_weight_std"] == pytest.approx(float(weights.std(correction=0))) != 0
    assert last["pico_weight_max"] == pytest.approx(float(weights.max()))
    assert last["pico_weight_p50"] == pytest.approx(float(weights.quantile(0.5)))


def test_the_history_that_a_resumed_run_must_repeat_holds_no_times(run):
    trainer, _ = run
    history = {name for entry in trainer.state.log_history for name in entry}
    assert not history & {"pico_images_per_second", "pico_peak_memory_mb"}


def test_images_per_second_count_all_images_of_a_step(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(clock))
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path,
        {"callbacks": [recorder]},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
        **BARE,
    )
    trainer.train()
    speeds = [entry.get("pico_images_per_second") for entry in recorder.entries[:2]]
    assert speeds == [8.0, 8.0]


def test_the_guide_lists_every_name():
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"`(pico_\w+)`", text)) >= ADDED
