"""Back to a plain encoder: what comes out is what went in; folding is exact where it says so."""

import pytest
import torch

from command_line import done, refused
from pico_hf import PicoModel
from pico_hf.encoders.check import load_encoder
from pico_hf.encoders.tokens import (
    image_hidden_states,
    image_output,
    project,
    text_hidden_states,
    text_output,
)
from pico_hf.export import _folded, export_encoder, last_linears
from tiny import tiny_encoder, tiny_inputs, tiny_processor, tiny_refined
from tiny_encoders import BUILDERS

ALL = list(BUILDERS)
UNFOLDABLE = {  # name: the side, and what it ends in
    "siglip": "image side .* ends in SiglipMultiheadAttentionPoolingHead",
    "siglip2": "image side .* ends in Siglip2MultiheadAttentionPoolingHead",
    "align": "image side .* ends in the tower itself",
    "tipsv2": "image side .* ends in the tower itself",
}
FOLDABLE = [name for name in ALL if name not in UNFOLDABLE]


def weighted(name: str) -> PicoModel:
    """A model whose column weights differ from each other."""
    model = PicoModel.from_encoder(
        tiny_encoder(name), num_prototypes=3, probe_size=3, pooled_share=0.0
    )
    columns = model.column_weights.numel()
    model.prototypes.semantic_probability.copy_(torch.linspace(0.0, 1.0, columns))
    return model.eval()


def sides(name: str) -> tuple[dict, dict]:
    inputs = tiny_inputs(encoder=name)
    texts = {key: inputs.pop(key) for key in ("input_ids", "attention_mask")}
    return inputs, texts


def tokens(encoder, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Projected tokens of both sides, not normalised."""
    images, texts = sides(name)
    patches = project(encoder, "image", image_hidden_states(encoder, **images))
    words = project(encoder, "text", text_hidden_states(encoder, **texts))
    return patches.features, words.features


def pooled(encoder, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, texts = sides(name)
    return image_output(encoder, **images).pooler_output, text_output(
        encoder, **texts
    ).pooler_output


def plain(folder):
    from transformers import AutoConfig

    return load_encoder(folder, AutoConfig.from_pretrained(folder).to_dict())


def products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one.flatten(0, -2) @ other.flatten(0, -2).t()


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_an_exported_encoder_is_the_plain_one(name, tmp_path):
    bare = tiny_encoder(name)
    export_encoder(weighted(name), tmp_path)
    again = plain(tmp_path)
    assert type(again) is type(bare)
    assert bare.state_dict().keys() == again.state_dict().keys()
    for key, value in bare.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    for one, other in zip(pooled(bare, name), pooled(again, name), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FOLDABLE)
@torch.no_grad()
def test_folded_dot_products_are_the_weighted_ones(name, tmp_path):
    model = weighted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_encoder(model, tmp_path, fold=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    folded, w = plain(tmp_path), model.column_weights
    for features in (tokens, pooled):
        images, texts = features(model.encoder, name)
        expected = products(images * w, texts)
        got = products(*features(folded, name))
        scale = float(expected.abs().max())
        torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "swin+bert"])
@torch.no_grad()
def test_folding_canonical_columns_gives_their_weighted_dot_products(name, tmp_path):
    model = tiny_refined(name).eval()
    assert model.prototypes.form.image_basis is not None
    export_encoder(model, tmp_path, fold=True)
    images, texts = tokens(model.encoder, name)
    columns = images @ model.prototypes.image_basis, texts @ model.prototypes.text_basis
    expected = products(columns[0] * model.column_weights, columns[1])
    got = products(*tokens(plain(tmp_path), name))
    scale = float(expected.abs().max())
    torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_canonical_columns_of_a_shared_projection_are_not_folded():
    linear = torch.nn.Linear(3, 2)
    maps = [torch.eye(2), torch.eye(2).flip(0)]
    with (
        pytest.raises(ValueError, match="`fold` needs a projection per side"),
        _folded([linear], maps),
    ):
        pass


@torch.no_grad()
def test_folded_cosines_differ_from_the_weighted_scores_by_the_features_lengths(tmp_path):
    model = weighted("clip")
    export_encoder(model, tmp_path, fold=True)
    norm = torch.nn.functional.normalize
    images, texts = (side.flatten(0, 1) for side in tokens(model.encoder, "clip"))
    weighted_scores = products(norm(images, dim=-1) * model.column_weights, norm(texts, dim=-1))
    folded = [side.flatten(0, 1) for side in tokens(plain(tmp_path), "clip")]
    cosines = products(*(norm(side, dim=-1) for side in folded))
    ratio = [
        new.norm(dim=-1) / old.norm(dim=-1)
        for new, old in zip(folded, (images, texts), strict=True)
    ]
    expected = cosines * ratio[0].unsqueeze(1) * ratio[1].unsqueeze(0)
    torch.testing.assert_close(expected, weighted_scores, rtol=1e-5, atol=1e-6)
    assert float((cosines - weighted_scores).abs().max()) > 1e-3


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_sides_that_end_in_no_projection_are_not_folded(name, tmp_path):
    with pytest.raises(ValueError, match=UNFOLDABLE[name]):
        export_encoder(weighted(name), tmp_path / "out", fold=True)
    assert not (tmp_path / "out").exists()


def test_a_projection_that_both_sides_share_is_scaled_once():
    from dataclasses import replace

    from pico_hf.encoders.table import ENCODERS

    encoder, row = tiny_encoder(), ENCODERS["clip"]
    shared = replace(row, text=replace(row.text, steps=row.image.steps))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "clip", shared)
        assert last_linears(encoder) == [encoder.visual_projection]


def test_learned_projections_and_adapters_are_not_exported(tmp_path, monkeypatch):
    from pico_hf.encoders.table import ENCODERS

    peft = pytest.importorskip("peft")
    from pico_hf import pico_lora_config

    model = weighted("clip")
    peft.get_peft_model(model, pico_lora_config(model))
    with pytest.raises(ValueError, match="Merge it first"):
        export_encoder(model, tmp_path)
    monkeypatch.delitem(ENCODERS, "clip")
    learned = PicoModel.from_encoder(tiny_encoder(), fallback_projection=True, probe_size=3)
    with pytest.raises(ValueError, match="Keep the Pico model"):
        export_encoder(learned, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fold", [False, True])
def test_the_command_writes_encoder_and_processor(fold, tmp_path):
    from transformers import AutoModel, AutoProcessor

    model = weighted("clip")
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    said = done("export", tmp_path / "model", tmp_path / "out", *["--fold"] * fold)
    assert "and processor" in said
    again = AutoModel.from_pretrained(tmp_path / "out")
    same = torch.equal(again.visual_projection.weight, model.encoder.visual_projection.weight)
    assert type(again) is type(model.encoder)
    assert same != fold
    AutoProcessor.from_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("prototypes*"))


def test_the_command_takes_adapters_and_answers_errors_by_one_line(tmp_path):
    peft = pytest.importorskip("peft")
    from pico_hf import pico_lora_config, save_adapter

    tiny_encoder().save_pretrained(tmp_path / "base")
    model = PicoModel.from_pretrained(tmp_path / "base", num_prototypes=3, probe_size=3)
    save_adapter(peft.get_peft_model(model, pico_lora_config(model)), tmp_path / "adapter")
    assert "no processor" in done("export", tmp_path / "adapter", tmp_path / "out")
    assert "nowhere" in refused("export", tmp_path / "nowhere", tmp_path / "out2")


@pytest.mark.parametrize(
    "target",
    ["{source}", "{source}/", "{source}/../model", "{source}/plain", "{link}", "{parent}"],
)
def test_a_target_that_is_the_source_is_refused_before_anything_is_written(tmp_path, target):
    source, link = tmp_path / "model", tmp_path / "link"
    model = tiny_refined()
    model.save_pretrained(source)
    link.symlink_to(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    place = target.format(source=source, link=link, parent=tmp_path)
    said = refused("export", source, place)
    assert "`target` must not be the folder of the source" in said
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_target_that_holds_something_else_is_refused(tmp_path):
    tiny_refined().save_pretrained(tmp_path / "model")
    other = tmp_path / "other"
    tiny_encoder("siglip").save_pretrained(other)
    said = refused("export", tmp_path / "model", other)
    assert "`target` must be a new or an empty folder" in said
    said = refused("export", tmp_path / "model", other / "config.json")
    assert "`target` must be a folder, got the file" in said
