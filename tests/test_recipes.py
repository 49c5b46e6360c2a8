"""Recipes are settings that models and runs take, and they train."""

import pytest
import torch

from pico_hf import PicoModel, PicoTrainer, recipe
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


def test_a_changed_recipe_leaves_the_next_one_alone():
    recipe("new_heads").model["loss"] = "hinge"
    assert recipe("new_heads").model["loss"] == "infonce"


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="`kind` must be one of new_heads, got 'old'"):
        recipe("old")
