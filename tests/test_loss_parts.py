"""What the log says of the loss, part by part."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from pico_hf.core.losses import LOSSES, contrastive_parts
from pico_hf.training.loss_parts import LossParts
from tiny_trainer import BARE, tiny_model, tiny_trainer

DIRECTIONS = {"loss_image_to_text", "loss_text_to_image"}
NAMES = {
    "hinge": DIRECTIONS,
    "infonce": DIRECTIONS,
    "sigmoid": {"loss_matched", "loss_unmatched"},
}
SCORES = torch.tensor([[0.5, 0.4, -1.0], [0.0, 0.5, -1.0], [-1.0, 0.45, 0.5]])


def test_parts_of_the_hinge_loss_are_those_of_rows_and_columns():
    parts = contrastive_parts("hinge", SCORES, SCORES)
    assert parts["image_to_text"].item() == pytest.approx(0.1 + 0.15)  # hardest of each row
    assert parts["text_to_image"].item() == pytest.approx(0.15)  # both are of the second column


def test_parts_of_info_nce_are_half_of_each_direction():
    parts = contrastive_parts("infonce", SCORES, 3 * SCORES)
    rows = [-(row.log_softmax(0)[n]).item() for n, row in enumerate(3 * SCORES)]
    columns = [-(column.log_softmax(0)[n]).item() for n, column in enumerate(3 * SCORES.t())]
    assert parts["image_to_text"].item() == pytest.approx(sum(rows) / 6)
    assert parts["text_to_image"].item() == pytest.approx(sum(columns) / 6)


def test_parts_of_the_sigmoid_loss_are_matched_and_unmatched_pairs():
    parts = contrastive_parts("sigmoid", SCORES, SCORES)
    matched = sum(torch.log1p(torch.exp(-SCORES[n, n])).item() for n in range(3))
    others = [torch.log1p(torch.exp(SCORES[i, j])).item() for i in range(3) for j in range(3)]
    assert parts["matched"].item() == pytest.approx(matched / 3)
    assert parts["unmatched"].item() == pytest.approx((sum(others) - sum(others[::4])) / 3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ramp", [None, 0.3])
def test_the_loss_is_the_sum_of_its_parts_and_so_is_its_gradient(name, ramp):
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([0, 1, 1, 2, 3])
    parts = contrastive_parts(name, scores, 2 * scores, ids, ramp=ramp)
    if name == "hinge":
        loss = LOSSES[name](scores, ids, ramp=ramp)
    else:
        loss = LOSSES[name](2 * scores, ids)
    assert {f"loss_{part}" for part in parts} == NAMES[name]
    torch.testing.assert_close(sum(parts.values()), loss)
    gradients = [torch.autograd.grad(part, scores, retain_graph=True) for part in parts.values()]
    of_parts = sum(gradient for (gradient,) in gradients)
    torch.testing.assert_close(of_parts, torch.autograd.grad(loss, scores)[0])


def entries(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("loss", "knobs"),
    [
        ("hinge", {"logging_steps": 2, "prototype_warmup_epochs": 0.5}),
        ("infonce", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        # Three batches an epoch: its second step has but one of them.
        ("infonce", {"gradient_accumulation_steps": 2, "num_train_epochs": 2}),
        ("sigmoid", {"mini_batch_size": 3}),
    ],
)
def test_the_log_has_parts_that_add_up_to_the_loss(loss, knobs, tmp_path):
    seen = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    options = {"model": tiny_model(loss=loss), "callbacks": [Recorder()]}
    trainer = tiny_trainer(tmp_path, options, **BARE, **knobs)
    trainer.train()
    found = entries(trainer)
    assert len(found) >= 1
    for entry in found:
        assert {name for name in entry if name.startswith("loss_")} == NAMES[loss]
        assert sum(entry[name] for name in NAMES[loss]) == pytest.approx(entry["loss"], rel=1e-4)
    reported = [entry for entry in seen if "loss" in entry]
    assert [{name: entry[name] for name in NAMES[loss]} for entry in reported] == [
        {name: entry[name] for name in NAMES[loss]} for entry in found
    ]


def test_a_second_run_starts_with_nothing_of_the_first(tmp_path):
    trainer = tiny_trainer(tmp_path, **BARE, logging_steps=2, max_steps=3)
    trainer.train()
    assert trainer.loss_parts.steps == 1  # after the last entry
    trainer.train()
    for entry in entries(trainer):
        assert sum(entry[name] for name in DIRECTIONS) == pytest.approx(entry["loss"], rel=1e-4)


def test_a_loss_of_the_users_own_has_no_parts(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        return outputs["logits_per_image"].square().mean()

    trainer = tiny_trainer(tmp_path, {"compute_loss_func": own}, **BARE, max_steps=1)
    trainer.train()
    assert not [name for name in entries(trainer)[0] if name.startswith("loss_")]


def test_adding_up_asks_nothing_of_the_device(monkeypatch):
    """A question would stop a GPU in every step; a tensor without numbers can answer none."""
    parts = LossParts()
    for _ in range(3):
        batch = {"image_to_text": torch.ones((), device="meta")}
        parts.add(batch, share=0.5, skip_nan=True)
    assert parts.sums["image_to_text"].is_meta
    assert parts.steps == 1.5


def test_a_batch_whose_loss_is_no_number_counts_like_the_others():
    parts = LossParts()
    for value in (1.0, 3.0, torch.nan):
        batch = {"image_to_text": torch.tensor(value), "text_to_image": torch.tensor(1.0)}
        parts.add(batch, share=1.0, skip_nan=True)
    found = parts.take(lambda sums: sums)
    assert found == {"loss_image_to_text": 2.0, "loss_text_to_image": 1.0}
    parts.add({"image_to_text": torch.tensor(torch.nan)}, share=1.0, skip_nan=False)
    assert parts.take(lambda sums: sums)["loss_image_to_text"] != 2.0


def test_parts_are_means_over_processes():
    parts = LossParts()
    parts.add({"matched": torch.tensor(1.0), "unmatched": torch.tensor(4.0)}, 1.0, True)
    other = torch.tensor([[3.0, 2.0]])
    found = parts.take(lambda sums: torch.cat([sums, other]))
    assert found == {"loss_matched": 2.0, "loss_unmatched": 3.0}
