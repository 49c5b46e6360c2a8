"""The encoder's own pooled features in the score: exactly its own, chosen by what they bring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from pico_hf import PicoModel, PicoRetriever
from pico_hf.core.alignment import align_columns
from pico_hf.core.pooled_share import SHARES, choose_share
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.similarity import pooled_similarity, weighted_score
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.token_store import TokenStore
from pico_hf.encoders.table import encoder_spec
from pico_hf.encoders.tokens import image_output, text_output
from pico_hf.training.evaluation import share_metrics, split_scores
from test_canonical import random_moments
from tiny import BUILDERS, tiny_encoder, tiny_inputs, tiny_processor, tiny_refined, tiny_rows

TEXTS = ("input_ids", "attention_mask")


def sides(name: str, model: PicoModel) -> tuple[dict, dict]:
    inputs = tiny_inputs(encoder=name)
    texts = {key: inputs.pop(key) for key in TEXTS}
    if encoder_spec(model.encoder).text.pad_is_special:
        del texts["attention_mask"]
    return inputs, texts


@pytest.mark.parametrize("name", list(BUILDERS))
@torch.no_grad()
def test_pooled_features_are_those_of_the_encoder(name):
    encoder = tiny_encoder(name)
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:  # norms of a fresh model are identities on normed vectors
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model = PicoModel.from_encoder(encoder, num_prototypes=3, probe_size=3)
    images, texts = sides(name, model)
    image, text = image_output(encoder, **images), text_output(encoder, **texts)
    own = image.pooler_output, text.pooler_output
    if own[0].ndim == 3:  # FLAVA projects every token, BLIP-2 every query
        own = own[0][:, 0] if name == "flava" else own[0].mean(dim=1), own[1]
    if own[1].ndim == 3:
        own = own[0], own[1][:, 0]
    found = model.encode_images(**images).pooled, model.encode_texts(**texts).pooled
    for mine, theirs in zip(found, own, strict=True):
        torch.testing.assert_close(mine, normalize(theirs, dim=-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["clip", "siglip", "vit+bert"])
@torch.no_grad()
def test_a_wrapped_encoder_that_trusts_its_pooled_features_gives_its_own_logits(name):
    encoder = tiny_encoder(name)
    model = PicoModel.from_encoder(encoder, pooled_share=1.0)
    images, texts = sides(name, model)
    own = encoder(**images, **texts).logits_per_image
    torch.testing.assert_close(model(**images, **texts).logits_per_image, own, atol=1e-5, rtol=1e-5)


def test_the_score_is_what_its_shares_say():
    model, inputs = tiny_refined(), tiny_inputs()
    with torch.no_grad():
        images = model.encode_images(inputs["pixel_values"])
        texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
    weights = model.column_weights
    pairs = (images.pooled[:, None] * texts.pooled[None] * weights).sum(dim=-1)
    lengths = [(side.pooled.square() * weights).sum(dim=-1).sqrt() for side in (images, texts)]
    cosine = pairs / torch.outer(*lengths)
    torch.testing.assert_close(pooled_similarity(images, texts, weights), cosine)
    tokens = model.score(images, texts)
    for share in SHARES:
        expected = (1 - share) * tokens + share * cosine
        torch.testing.assert_close(model.score(images, texts, pooled_share=share), expected)
    model.prototypes.share_score(0.25)
    torch.testing.assert_close(model.score(images, texts), 0.75 * tokens + 0.25 * cosine)


def test_tokens_alone_have_no_pooled_score():
    tokens = TokenFeatures(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`images` must have pooled vectors, got tokens alone"):
        weighted_score(tokens, tokens, None, 0.5)


def test_training_computes_no_pooled_features_that_it_does_not_score():
    model, inputs = tiny_refined(), tiny_inputs()
    assert model.train().encode_images(inputs["pixel_values"]).pooled is None
    model.prototypes.share_score(0.5)
    assert model.encode_images(inputs["pixel_values"]).pooled is not None
    assert model.eval()(**inputs).loss is not None


def test_a_share_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"`pooled_share` must be in \[0, 1\], got 1.5"):
        tiny_refined().prototypes.share_score(1.5)


def test_the_share_is_saved_and_loaded(tmp_path: Path):
    model, inputs = tiny_refined(pooled_share=0.25), tiny_inputs()
    assert model.pooled_share == 0.25
    model.save_pretrained(tmp_path)
    again = PicoModel.from_pretrained(tmp_path)
    assert again.pooled_share == 0.25
    with torch.no_grad():
        own = model(**inputs).logits_per_image
        assert torch.equal(again(**inputs).logits_per_image, own)


@pytest.mark.parametrize("name", ["clip", "siglip", "swin+bert", "flava"])
@torch.no_grad()
def test_cached_states_are_pooled_as_the_encoder_pools(name, make_trainer):
    rows = tiny_rows(12)
    model = PicoModel.from_encoder(tiny_encoder(name), num_prototypes=3, pooled_share=1.0)
    trainer = make_trainer(name, model=model, freeze_encoder=True)
    cached = trainer.split_encoder.split(trainer.eval_dataset)
    live = PicoRetriever(model, tiny_processor(name), show_progress=False)
    order, captions = cached.rows_of_images(), cached.rows_of_captions()
    texts = [text for row in rows["captions"] for text in row]
    expected = live.score(list(rows["image"]), texts)[order][:, captions]
    torch.testing.assert_close(split_scores(model, cached), expected, atol=2e-3, rtol=0)  # float16


def test_a_store_keeps_the_state_of_the_pooled_token(tmp_path: Path):
    mask = torch.tensor([[True, True], [True, False]])
    states = TokenFeatures(torch.randn(2, 2, 4), mask, torch.randn(2, 4))
    TokenStore.write(tmp_path / "store", iter([states]))
    row = TokenStore(tmp_path / "store", "text_hidden_states")[1]
    assert row["text_hidden_states"].shape == (1, 4)
    torch.testing.assert_close(
        row["text_pooled_state"].float(), states.pooled[1], atol=2e-3, rtol=0
    )


# ---- feedback ------------------------------------------------------------------------------------


def prototypes(share: float = 0.0) -> StylePrototypes:
    module = StylePrototypes(4, 2, 3, canonical=True)
    module.share_score(share)
    return module


def test_the_share_that_brings_most_is_found():
    module = prototypes()
    reports = choose_share(module, lambda m: 100 - 60 * abs(m - 0.5))
    assert module.score_share == pytest.approx(0.5, abs=0.17)
    assert [report.source for report in reports] == ["pooled"] * len(SHARES)
    best = max(reports, key=lambda report: report.gain)
    assert SHARES[best.iteration - 1] == 0.5
    assert best.gain == pytest.approx(30.0)


def test_of_two_ways_that_are_good_and_far_apart_the_better_one_is_taken():
    module = prototypes()
    choose_share(module, lambda m: 90.0 if m == 1.0 else 80.0 * (m == 0.0))
    assert module.score_share == 1.0


@pytest.mark.parametrize("own", [0.0, 0.4, 1.0])
def test_a_share_that_nothing_beats_stays(own):
    module = prototypes(own)
    choose_share(module, lambda m: 100.0 if m == own else 50.0)
    assert module.score_share == pytest.approx(own)


def test_shares_that_give_no_number_are_left_out():
    module = prototypes(0.2)
    choose_share(module, lambda m: 100.0 if m < 0.5 else float("nan"))
    assert module.score_share < 0.5


def test_a_share_stays_where_its_own_score_is_no_number():
    module = prototypes(0.2)
    reports = choose_share(module, lambda m: 100.0 if m == 1.0 else float("nan"))
    assert module.score_share == pytest.approx(0.2)
    assert {(report.gain, report.fused_weight) for report in reports} == {(0.0, 0.0)}


def test_pooled_features_that_are_no_numbers_leave_the_share_as_it_is(make_trainer, monkeypatch):
    trainer = make_trainer(estimator="canonical")
    score = type(trainer.pico_model).score

    def broken(self, images, texts, weights=None, share=None):
        scores = score(self, images, texts, weights, share)
        return scores * float("nan") if share == 1.0 else scores

    monkeypatch.setattr(type(trainer.pico_model), "score", broken)
    trainer.construct_prototypes()
    assert trainer.pico_model.pooled_share == 0.0


def test_a_run_trains_tokens_even_if_pooled_features_were_all_of_the_score():
    module = prototypes(1.0)
    module.restart(3)
    assert module.score_share == 0.5


def test_what_feedback_found_is_forgotten_when_a_run_starts_afresh():
    module = prototypes()
    align_columns(module, random_moments())
    choose_share(module, lambda m: 50.0 + 10 * (m == 0.5))
    assert module.score_share > 0
    module.restart(3)
    assert module.score_share == 0.0


def test_metrics_of_shares_are_those_of_models_with_that_share(make_trainer):
    trainer = make_trainer()
    model, split = trainer.pico_model, trainer.split_encoder.split(trainer.eval_dataset)
    metrics = share_metrics(model, split)
    for share in (0.0, 0.3, 1.0):
        model.prototypes.share_score(share)
        evaluated = trainer.evaluate()
        assert evaluated["eval_rsum"] == pytest.approx(metrics(share)["rsum"])
