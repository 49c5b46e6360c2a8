"""The encoder's own pooled features in the score: exactly its own, chosen by what they bring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from pico_hf import PicoModel, PicoRetriever
from pico_hf.core.pooled_share import SHARES
from pico_hf.core.similarity import pooled_similarity, weighted_score
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.token_store import TokenStore
from pico_hf.encoders.table import encoder_spec
from pico_hf.encoders.tokens import image_output, text_output
from pico_hf.training.encoding import encode_batch, encoder_columns
from pico_hf.training.evaluation import split_scores
from pico_hf.training.trials import DevTrials
from tiny import (
    BUILDERS,
    refine,
    tiny_encoder,
    tiny_inputs,
    tiny_processor,
    tiny_refined,
    tiny_rows,
)

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


def test_pooled_features_that_are_no_numbers_leave_the_share_as_it_is(make_trainer, monkeypatch):
    trainer = make_trainer(estimators=["canonical", "pooled"])
    score = type(trainer.pico_model).score

    def broken(self, images, texts, weights=None, share=None):
        scores = score(self, images, texts, weights, share)
        return scores * float("nan") if share == 1.0 else scores

    monkeypatch.setattr(type(trainer.pico_model), "score", broken)
    trainer.construct_prototypes()
    assert trainer.pico_model.pooled_share == 0.0


def test_a_trial_gives_what_a_model_with_that_form_scores(make_trainer):
    trainer = make_trainer(estimators=["canonical", "pooled"])
    model = trainer.pico_model
    encode = trainer.split_encoder.split
    trial = DevTrials(model, encode(trainer.eval_dataset, encode=encoder_columns))
    for share in (0.0, 0.3, 1.0):
        model.prototypes.share_score(share)
        assert trial(model.prototypes.form) == pytest.approx(trainer.evaluate()["eval_rsum"])
    refine(model, *encode_batch(model, tiny_inputs()))
    assert model.prototypes.form.image_basis is not None
    for share in (0.3, 0.0):  # other columns: nothing that was kept is taken for theirs
        model.prototypes.share_score(share)
        assert trial(model.prototypes.form) == pytest.approx(trainer.evaluate()["eval_rsum"])
