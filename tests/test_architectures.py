"""What every supported architecture must do, one test per promise and architecture.

`make encoders` prints the outcome as a table.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from pico_hf import PicoModel
from pico_hf.encoders.check import check_encoder
from pico_hf.encoders.spec import EncoderSpec
from pico_hf.encoders.table import ENCODERS, architecture
from pico_hf.encoders.tokens import image_hidden_states, prefix_length, text_hidden_states
from tiny import BUILDERS, every, naflex_images, tiny_encoder, tiny_inputs

ALL = pytest.mark.parametrize("name", list(BUILDERS))
TEXTS = ("input_ids", "attention_mask")


def split(inputs: dict) -> tuple[dict, dict]:
    texts = {key: inputs[key] for key in TEXTS}
    return {key: inputs[key] for key in inputs if key not in TEXTS}, texts


def wrapped(name: str) -> PicoModel:
    encoder = tiny_encoder(name)
    return PicoModel.from_encoder(encoder, num_prototypes=3, probe_size=3, pooled_share=0.0)


def with_lively_norms(name: str):
    """Norms of a fresh model are identities on normed vectors: a wrong row might not show."""
    encoder = tiny_encoder(name)
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return encoder


def bare_hidden_states(encoder, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of both sides by the encoder's own public methods."""
    if not hasattr(encoder, "vision_proj") and not hasattr(encoder, "qformer"):
        images, texts = split(inputs)
        image = encoder.get_image_features(**images).last_hidden_state
        return image, encoder.get_text_features(**texts).last_hidden_state
    if hasattr(encoder, "vision_proj"):  # BLIP for retrieval
        out = encoder(**inputs, use_itm_head=False)
        return out.last_hidden_state, out.question_embeds
    seen = []
    hook = encoder.vision_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    words = encoder(**inputs).text_model_output.last_hidden_state  # BLIP-2 for retrieval
    hook.remove()
    return seen[0], words


@ALL
@torch.no_grad()
def test_wrapped_features_are_those_of_the_bare_encoder(name):
    inputs = tiny_inputs(encoder=name)
    image, text = bare_hidden_states(tiny_encoder(name), inputs)
    encoder = wrapped(name).encoder
    images, texts = split(inputs)
    patches = image_hidden_states(encoder, **images).features
    cells = image.flatten(2).transpose(1, 2) if image.ndim == 4 else image
    assert torch.equal(patches, cells[:, prefix_length(encoder) :])
    assert torch.equal(text_hidden_states(encoder, **texts).features, text)


@ALL
def test_tokens_reproduce_the_pooled_features(name):
    check_encoder(with_lively_norms(name))


@ALL
@torch.no_grad()
def test_every_kind_of_attention_gives_the_same_features(name):
    model, inputs = wrapped(name).eval(), tiny_inputs(encoder=name)
    before = model(**inputs)
    model.encoder.set_attn_implementation("eager")
    after = model(**inputs)
    for side in ("image_features", "text_features"):
        own, other = getattr(before, side), getattr(after, side)
        torch.testing.assert_close(
            other.features[other.mask], own.features[own.mask], atol=1e-5, rtol=1e-5
        )


@ALL
def test_training_lowers_the_loss(name):
    model, inputs = wrapped(name).train(), tiny_inputs(encoder=name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)  # the same dropout at every step, so that losses compare
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@ALL
@torch.no_grad()
def test_a_saved_model_scores_as_before(name, tmp_path):
    model, inputs = wrapped(name).eval(), tiny_inputs(encoder=name)
    model.prototypes.semantic_probability.copy_(
        torch.linspace(0.2, 1.0, model.column_weights.numel())
    )
    model.save_pretrained(tmp_path)
    again = PicoModel.from_pretrained(tmp_path)
    assert type(again.encoder) is type(model.encoder)
    assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip2", "blip-2-itm", "align", "flava", "groupvit"])
def test_a_resumed_run_on_cached_features_is_the_unbroken_one(name, make_trainer):
    test_a_resumed_run_is_the_unbroken_one(name, partial(make_trainer, freeze_encoder=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", every(list(BUILDERS)))
def test_a_resumed_run_is_the_unbroken_one(name, make_trainer):
    knobs = {"images": 16, "dev": 10, "num_train_epochs": 2, "load_best_model_at_end": False}
    unbroken = make_trainer(name, **knobs)
    unbroken.train()
    resumed = make_trainer(name, **knobs)
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-2")
    assert resumed.state.global_step == 4
    for key, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


@ALL
@torch.no_grad()
def test_half_precision_gives_finite_fp32_scores(name, tmp_path):
    model, inputs = wrapped(name).eval(), tiny_inputs(encoder=name)
    model.save_pretrained(tmp_path)
    half = PicoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for n, p in half.encoder.named_parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.prototypes.buffers() if b.is_floating_point()} == {torch.float32}
    logits = half(**inputs).logits_per_image
    assert logits.dtype == half.column_weights.dtype == torch.float32
    assert torch.isfinite(logits).all()
    check_encoder(half.encoder)


# ---- beyond the table ------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_row_that_lacks_a_step_is_found_out(name, side, monkeypatch):
    encoder = with_lively_norms(name)
    key = architecture(encoder)
    row = getattr(ENCODERS[key], side)
    for lost in range(len(row.steps)):
        steps = row.steps[:lost] + row.steps[lost + 1 :]
        if row.pooled_by == "attention" and lost == 0:
            continue  # its row says that the first step pools
        wrong = replace(ENCODERS[key], **{side: replace(row, steps=steps)})
        with monkeypatch.context() as patch:
            patch.setitem(ENCODERS, key, wrong)
            with pytest.raises(ValueError, match=f"{side} tokens of .* do not reproduce"):
                check_encoder(encoder)


def test_every_row_of_the_table_has_a_tiny_encoder():
    own = {key for key, row in ENCODERS.items() if row.label}  # not those of outsiders
    assert {architecture(tiny_encoder(name)) for name in BUILDERS} == own


@torch.no_grad()
def test_the_pooled_features_of_blip_for_retrieval_give_its_own_scores():
    encoder, inputs = with_lively_norms("blip-itm"), tiny_inputs()
    row = ENCODERS["blip/BlipForImageTextRetrieval"]
    assert_same_scores(encoder, row, inputs, encoder(**inputs, use_itm_head=False).itm_score)


@torch.no_grad()
def test_the_queries_of_blip_2_give_its_own_scores():
    encoder, inputs = with_lively_norms("blip-2-itm"), tiny_inputs()
    row = ENCODERS["blip-2/Blip2ForImageTextRetrieval"]
    assert_same_scores(encoder, row, inputs, encoder(**inputs).logits_per_image)


def assert_same_scores(encoder, row: EncoderSpec, inputs: dict, scores: torch.Tensor) -> None:
    images, texts = split(inputs)
    image = nn.functional.normalize(row.image.features(encoder, **images).pooler_output, dim=-1)
    text = nn.functional.normalize(row.text.features(encoder, **texts).pooler_output, dim=-1)
    image = image if image.ndim == 3 else image.unsqueeze(1)
    own = torch.einsum("iqd,td->itq", image, text).amax(dim=-1)  # the best query counts
    torch.testing.assert_close(own, scores)


@torch.no_grad()
def test_a_saved_blip_for_retrieval_is_wrapped_with_its_own_weights(tmp_path):
    bare = tiny_encoder("blip-itm")
    bare.save_pretrained(tmp_path)  # AutoModel would read it as a BlipModel of random text weights
    encoder = PicoModel.from_pretrained(tmp_path, probe_size=3).encoder
    assert type(encoder) is type(bare)
    for key, value in bare.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[key]), key


def test_a_checkpoint_without_the_projections_is_refused(tmp_path):
    bare = tiny_encoder("blip-itm")
    bare.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BlipForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"whole BlipModel, but lacks text_model.*Condit"):
        PicoModel.from_pretrained(tmp_path)


def test_a_temperature_becomes_a_scale():
    model = wrapped("align")
    model.encoder.temperature.data.fill_(0.05)
    own = PicoModel.from_encoder(model.encoder, probe_size=3, pooled_share=1.0)
    assert float(own.logit_scale.detach().exp()) == pytest.approx(20.0)
    tokens = PicoModel.from_encoder(model.encoder, probe_size=3, pooled_share=0.0)
    assert float(tokens.logit_scale.detach().exp()) == pytest.approx(20.0 / 2.0)  # two cosines


def test_scores_of_an_encoder_without_a_scale_start_at_ten_times():
    unscaled = PicoModel.from_encoder(tiny_encoder("blip-2-itm"), num_prototypes=3)
    built = PicoModel(unscaled.config)
    for model in (unscaled, built):
        assert float(model.logit_scale.detach().exp()) == pytest.approx(10.0)


def test_batch_statistics_of_projections_never_move():
    model, inputs = wrapped("groupvit").train(), tiny_inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(**inputs).loss.backward()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert math.isfinite(model.encoder.visual_projection[0].weight.grad.sum())


def test_towers_that_end_in_one_space_cannot_be_frozen():
    with pytest.raises(ValueError, match="Tipsv2Model has no projections after its towers"):
        wrapped("tipsv2").freeze_towers()


# ---- NaFlex: pictures of any grid, padded to the longest -----------------------------------------


@torch.no_grad()
def test_more_padding_patches_never_change_a_naflex_score():
    model, texts = wrapped("siglip2").eval(), split(tiny_inputs())[1]
    grids = [(4, 4), (2, 3), (5, 3)]
    tight, loose = (naflex_images(grids, 3, padding) for padding in (0, 7))
    assert loose["pixel_values"].shape[1] == tight["pixel_values"].shape[1] + 7
    logits = [model(**images, **texts).logits_per_image for images in (tight, loose)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_padding_patches_hold_never_changes_a_naflex_score():
    model, texts = wrapped("siglip2").eval(), split(tiny_inputs())[1]
    images = naflex_images([(4, 4), (2, 3), (5, 3)], 3, padding=2)
    expected = model(**images, **texts).logits_per_image
    images["pixel_values"][images["pixel_attention_mask"] == 0] = 100.0
    got = model(**images, **texts).logits_per_image
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_naflex_picture_has_as_many_patches_as_its_grid():
    model = wrapped("siglip2").eval()
    images = model.encode_images(**naflex_images([(4, 4), (2, 3), (5, 3)], 3))
    assert images.mask.sum(dim=1).tolist() == [16, 6, 15]
    alone = model.encode_images(**naflex_images([(4, 4)], 1)).features[0]
    torch.testing.assert_close(images.features[0], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cached_naflex_hidden_states_keep_their_mask():
    model, inputs = wrapped("siglip2").eval(), tiny_inputs(encoder="siglip2")
    images, texts = split(inputs)
    patches = image_hidden_states(model.encoder, **images)
    cached = model(image_hidden_states=patches.features, patch_mask=patches.mask, **texts)
    torch.testing.assert_close(cached.logits_per_image, model(**inputs).logits_per_image)
