"""Recipes are settings that models and runs take, and they train."""

import pytest
import torch

from pico_hf import PicoModel, PicoTrainer, pico_lora_config, recipe
from tiny import tiny_encoder, tiny_processor, tiny_rows
from tiny_trainer import tiny_args


def test_new_heads_train_by_their_recipe(tmp_path):
    torch.manual_seed(0)
    heads = recipe("new_heads")
    knobs = {**heads.training, "num_train_epochs": 1, "feature_cache_dir": str(tmp_path / "cache")}
    model = PicoModel.from_encoder(tiny_encoder(), num_prototypes=3, probe_size=8, **heads.model)
    args = tiny_args(tmp_path, **knobs)
    trainer = PicoTrainer(model, args, tiny_rows(24), tiny_rows(12), tiny_processor())
    before = trainer.evaluate()["eval_rsum"]
    trainer.train()
    assert trainer.evaluate()["eval_rsum"] > before


@pytest.mark.parametrize("kind", ["fine_tuning", "lora"])
def test_a_pretrained_encoder_is_tuned_by_its_recipe(tmp_path, kind):
    torch.manual_seed(0)
    tuning = recipe(kind)
    model = PicoModel.from_encoder(tiny_encoder("clip"), **tuning.model, num_prototypes=3)
    assert model.pooled_share == 1  # ranks as it came
    if kind == "lora":
        model = pytest.importorskip("peft").get_peft_model(model, pico_lora_config(model))
    args = tiny_args(tmp_path, **{**tuning.training, "num_train_epochs": 1})
    trainer = PicoTrainer(model, args, tiny_rows(24), tiny_rows(12), tiny_processor())
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    trainer.train()
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert sum(changed) > len(changed) / 2
    optimizer = trainer.create_optimizer()
    rates = {group["initial_lr"] for group in optimizer.param_groups}
    assert rates == {tuning.training["learning_rate"]}  # towers learn as fast as projections


def test_a_changed_recipe_leaves_the_next_one_alone():
    recipe("new_heads").model["loss"] = "hinge"
    assert recipe("new_heads").model["loss"] == "infonce"


def test_an_unknown_kind_is_refused():
    with pytest.raises(
        ValueError, match="`kind` must be one of new_heads, fine_tuning, lora, got 'old'"
    ):
        recipe("old")
