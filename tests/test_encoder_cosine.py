"""The encoder's own pooled cosine beside every score, and encoders that rank by it when wrapped."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import VisionTextDualEncoderModel

from pico_hf import PicoModel, evaluate_encoder, evaluate_retrieval
from pico_hf.cards.model_card import write_model_card
from pico_hf.cards.publishing import run_facts
from pico_hf.core.metrics import retrieval_metrics
from pico_hf.core.state import MOST_POOLED
from pico_hf.training.model_calls import train_tokens_too
from tiny import refine_on_tiny_inputs, tiny_encoder, tiny_inputs, tiny_rows
from tiny_trainer import BARE, tiny_model, tiny_trainer


def own_scores(encoder, trainer, rows) -> torch.Tensor:
    """The encoder's logits of all images and captions of some rows, without this package's code."""
    processor = trainer.processing_class
    captions = [text for row in rows for text in row["captions"]]
    batch = processor(
        text=captions, images=[row["image"] for row in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        return encoder.eval()(**batch).logits_per_image


# ---- what a wrapped encoder ranks by -----------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip", "groupvit"])
def test_a_wrapped_encoder_ranks_as_it_does_itself(name):
    assert PicoModel.from_encoder(tiny_encoder(name)).pooled_share == 1.0


def test_so_does_one_that_is_loaded(tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    assert PicoModel.from_pretrained(tmp_path).pooled_share == 1.0
    assert PicoModel.from_pretrained(tmp_path, pooled_share=0.25).pooled_share == 0.25


def test_towers_that_were_joined_and_never_trained_rank_by_tokens(tmp_path):
    pair = tiny_encoder("vit+bert")
    assert PicoModel.from_encoder(pair).pooled_share == 0.0
    pair.vision_model.save_pretrained(tmp_path / "vision")
    pair.text_model.save_pretrained(tmp_path / "text")
    towers = tmp_path / "vision", tmp_path / "text"
    assert PicoModel.from_vision_text_pretrained(*towers).pooled_share == 0.0
    joined = VisionTextDualEncoderModel.from_vision_text_pretrained(*towers)
    joined.save_pretrained(tmp_path / "joined")
    assert PicoModel.from_pretrained(tmp_path / "joined").pooled_share == 0.0
    assert PicoModel.from_encoder(joined.to(torch.bfloat16)).pooled_share == 0.0


def test_a_pair_that_was_trained_contrastively_ranks_as_it_does_itself():
    pair, batch = tiny_encoder("vit+bert"), tiny_inputs()
    optimizer = torch.optim.AdamW(pair.parameters(), 1e-4)
    pair(**batch, return_loss=True).loss.backward()
    optimizer.step()
    assert PicoModel.from_encoder(pair).pooled_share == 1.0


def test_a_saved_model_keeps_the_share_it_has(tmp_path):
    PicoModel.from_encoder(tiny_encoder(), probe_size=3).save_pretrained(tmp_path)
    assert PicoModel.from_pretrained(tmp_path).pooled_share == 1.0


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{}, BARE], ids=["feedback", "no feedback"])
@pytest.mark.parametrize("loss", ["hinge", "infonce"])
def test_training_an_encoder_trains_its_tokens_and_its_pooled_features(tmp_path, loss, knobs):
    model = tiny_model(pooled_share=None, loss=loss)
    seen = []
    model.register_forward_hook(
        lambda model, _, out: seen.append((model.training, model.pooled_share, out))
    )
    tiny_trainer(tmp_path, {"model": model}, **knobs).train()
    training = [(share, out.image_features) for trains, share, out in seen if trains]
    assert training
    assert {round(share, 6) for share, _ in training} == {MOST_POOLED}
    assert all(images.pooled is not None for _, images in training)


def test_the_scale_follows_the_share_as_if_the_encoder_had_been_wrapped_with_it():
    model = PicoModel.from_encoder(tiny_encoder())
    mostly = tiny_model(pooled_share=MOST_POOLED)
    train_tokens_too(model)
    assert model.pooled_share == pytest.approx(MOST_POOLED)
    assert model.logit_scale.item() == pytest.approx(mostly.logit_scale.item())
    train_tokens_too(mostly)  # nothing to do
    assert model.logit_scale.item() == pytest.approx(mostly.logit_scale.item())


def test_a_smaller_share_is_trained_as_it_is(tmp_path):
    model = tiny_model(pooled_share=0.25)
    tiny_trainer(tmp_path, {"model": model}, **BARE).train()
    assert model.pooled_share == 0.25


# ---- metrics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_evaluation_also_tells_what_the_encoder_scores_by_itself(tmp_path, share):
    model, rows = tiny_model(pooled_share=share, probe_size=3), tiny_rows(12)
    trainer = tiny_trainer(tmp_path, {"model": model})
    owner = torch.arange(12).repeat_interleave(2)
    expected = retrieval_metrics(own_scores(model.encoder, trainer, rows), owner)
    before = trainer.evaluate()
    assert (before["eval_rsum"] == expected["rsum"]) == (share == 1.0)
    refine_on_tiny_inputs(model)  # other columns and weights, the same encoder
    assert model.column_weights.std() > 0.1
    found = trainer.evaluate()
    for name, value in expected.items():
        assert found[f"eval_encoder_{name}"] == pytest.approx(value), name
    assert trainer.predict(rows).metrics["test_encoder_rsum"] == found["eval_encoder_rsum"]


def test_the_function_gives_what_the_trainer_does(make_trainer):
    trainer = make_trainer(estimators=("canonical", "pooled"))
    trainer.construct_prototypes()
    split = trainer.split_encoder.split(trainer.eval_dataset)
    own, found = evaluate_encoder(trainer.pico_model, split), trainer.evaluate()
    assert {f"eval_encoder_{name}" for name in own} <= set(found)
    assert own["rsum"] == found["eval_encoder_rsum"]
    assert evaluate_retrieval(trainer.pico_model, split)["rsum"] == found["eval_rsum"]


def test_pooled_features_that_are_no_numbers_cost_nothing_but_their_metrics(
    tmp_path, monkeypatch, caplog
):
    trainer = tiny_trainer(tmp_path)
    encode = PicoModel.encode_texts

    def broken(self, *args, **kwargs):
        texts = encode(self, *args, **kwargs)
        return type(texts)(texts.features, texts.mask, texts.pooled * math.nan)

    monkeypatch.setattr(PicoModel, "encode_texts", broken)
    found = trainer.evaluate()
    assert math.isfinite(found["eval_rsum"])
    assert not [name for name in found if "encoder" in name]
    assert "its metrics are left out" in caplog.text


@pytest.mark.parametrize("share", [0.0, 1 / 3, 1.0])
def test_a_model_card_says_how_much_of_the_score_pooled_features_are(tmp_path, share):
    trainer = tiny_trainer(tmp_path, {"model": tiny_model(pooled_share=share)})
    facts = run_facts(trainer.pico_model, trainer.args, trainer.state, "run")
    said = f"{round(100 * share)} % of the score is the cosine of the encoder's own pooled"
    assert (said in write_model_card(tmp_path, facts).read_text()) == (share > 0)


def test_a_model_card_shows_the_encoder_beside_the_model(tmp_path):
    splits = {"seen": tiny_rows(12), "encoder": tiny_rows(12)}  # a name that metrics begin with
    trainer = tiny_trainer(tmp_path, {"eval_dataset": splits})
    trainer.evaluate()
    results = run_facts(trainer.pico_model, trainer.args, trainer.state, "run").results
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert list(results) == ["seen", "encoder"]
    for split, models in results.items():
        assert list(models) == ["encoder", "PICO"]
        assert models["encoder"]["rsum"] == logged[f"eval_{split}_encoder_rsum"]
        assert models["PICO"]["rsum"] == logged[f"eval_{split}_rsum"]


@pytest.mark.parametrize("dev", [None, 12, 63])
def test_too_few_images_to_judge_by_leave_the_encoders_own_ranking(tmp_path, caplog, dev):
    rows = None if dev is None else tiny_rows(dev)
    bare = {name: value for name, value in BARE.items() if name != "refine_prototypes"}
    options = {"model": tiny_model(pooled_share=1.0), "eval_dataset": rows}
    trainer = tiny_trainer(tmp_path, options, **bare)
    trainer.construct_prototypes()
    assert trainer.pico_model.pooled_share == 1.0
    assert int(trainer.pico_model.prototypes.iteration) == 0
    assert "The encoder's own ranking stays" in caplog.text


def test_enough_images_are_listened_to(tmp_path):
    options = {"model": tiny_model(pooled_share=1.0), "eval_dataset": tiny_rows(64)}
    trainer = tiny_trainer(tmp_path, options)
    before = trainer.evaluate()["eval_encoder_rsum"]
    trainer.construct_prototypes()
    assert int(trainer.pico_model.prototypes.iteration) > 0 or before == 600
    assert trainer.evaluate()["eval_rsum"] >= before - 1e-6
