"""Explanations: of every architecture, on the grid that its patches form, as arrays and figures."""

import builtins
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import read, refused
from pico_hf import PicoCollator, PicoModel, PicoRetriever, explain
from pico_hf.encoders.grid import patch_grid
from pico_hf.encoders.inputs import image_inputs, text_inputs
from pico_hf.encoders.table import ENCODERS, architecture
from pico_hf.explanation import seen_image, word_labels
from tiny import BUILDERS, tiny_encoder, tiny_inputs, tiny_processor

CAPTION = "a big red square"
GRIDS = dict.fromkeys(BUILDERS, (4, 4)) | {
    "siglip2": (4, 5),  # what the processor makes of 48 × 60 pixels
    "blip-2-itm": None,  # queries
    "groupvit": None,  # groups
    "swin+bert": (8, 8),  # patches of 2 pixels, merged once
    "swin+roberta": (8, 8),
    "swinv2+bert": (8, 8),
}


def picture() -> Image.Image:
    shades = np.add.outer(4 * np.arange(48), np.arange(60)).astype(np.uint8)
    return Image.merge("RGB", [Image.fromarray(shades), *[Image.new("L", (60, 48), 90)] * 2])


def weighted(name: str = "clip") -> PicoModel:
    model = PicoModel.from_encoder(
        tiny_encoder(name), num_prototypes=3, probe_size=3, pooled_share=0.0
    ).eval()
    columns = model.column_weights.numel()
    model.prototypes.semantic_probability.copy_(torch.linspace(0.2, 1.0, columns))
    return model


@pytest.fixture
def explanation():
    return explain(weighted(), tiny_processor(), picture(), CAPTION)


@pytest.mark.parametrize("name", list(BUILDERS))
@torch.no_grad()
def test_columns_sum_to_the_score_of_every_architecture(name):
    model, processor = weighted(name), tiny_processor(name)
    found = explain(model, processor, picture(), CAPTION)
    batch = PicoCollator(processor, config=model.config)([{"image": picture(), "caption": CAPTION}])
    images = model.encode_images(**image_inputs(batch, model.device))
    texts = model.encode_texts(**text_inputs(batch, model.device))
    score, flat = model.score(images, texts), torch.ones_like(model.column_weights)
    assert float(found.weighted.columns.sum()) == pytest.approx(float(score), abs=1e-5)
    unweighted = float(model.score(images, texts, flat))
    assert float(found.unweighted.columns.sum()) == pytest.approx(unweighted, abs=1e-5)
    assert found.score == pytest.approx(float(score), abs=1e-5)
    assert unweighted != pytest.approx(found.score, abs=1e-5)


@pytest.mark.parametrize("share", [1 / 3, 1.0])
@torch.no_grad()
def test_columns_sum_to_the_score_that_pooled_vectors_are_part_of(share):
    model, processor = weighted("clip"), tiny_processor()
    tokens = explain(model, processor, picture(), CAPTION)
    model.prototypes.share_score(share)
    found = explain(model, processor, picture(), CAPTION)
    score = PicoRetriever(model, processor).score([picture()], [CAPTION])
    assert found.score == pytest.approx(float(score), abs=1e-5)
    assert float(found.weighted.columns.sum()) == pytest.approx(float(score), abs=1e-5)
    rest = found.score - found.weighted.pooled
    assert rest == pytest.approx((1 - share) * tokens.score, abs=1e-5)
    assert found.weighted.pooled != 0.0


@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_architecture_has_the_grid_that_its_patches_form(name):
    found = explain(weighted(name), tiny_processor(name), picture(), CAPTION)
    assert found.grid == GRIDS[name]
    patches, words = found.weighted.products.shape
    assert found.word_maps().shape == (words, *(found.grid or (1, patches)))
    assert found.patch_maps().shape == (*(found.grid or (1, patches)), words)


def test_maps_hold_the_products_row_by_row(explanation):
    for weighted_ in (True, False):
        parts = explanation.weighted if weighted_ else explanation.unweighted
        words = explanation.word_maps(weighted=weighted_)
        patches = explanation.patch_maps(weighted=weighted_)
        assert words[2, 1, 3] == parts.products[4 + 3, 2] == patches[1, 3, 2]


def test_a_bright_patch_is_found_where_it_is():
    """An encoder whose patches see only themselves: the map changes in one cell."""
    model = weighted()
    for layer in model.encoder.vision_model.encoder.layers:
        layer.self_attn.out_proj.weight.data.zero_()
    dark, bright = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32))
    bright.paste((255, 255, 255), (24, 8, 32, 16))  # second row, last column
    maps = [
        explain(model, tiny_processor(), image, CAPTION).word_maps() for image in (dark, bright)
    ]
    changed = ((maps[1] - maps[0]).abs().amax(dim=0) > 1e-6).nonzero().tolist()
    assert changed == [[1, 3]]


def test_explaining_changes_nothing_and_meets_no_dropout():
    model = weighted().train()
    model.config.column_dropout = 0.5
    first, second = (explain(model, tiny_processor(), picture(), CAPTION) for _ in range(2))
    assert model.training
    assert torch.equal(first.weighted.products, second.weighted.products)


def test_a_calibrated_model_is_explained_as_it_scores():
    model, plain = weighted(), tiny_inputs()
    before = explain(model, tiny_processor(), picture(), CAPTION).score
    images = {"pixel_values": plain["pixel_values"]}
    model.calibrate([images], [{"pixel_values": images["pixel_values"] * 3 + 1}])
    assert explain(model, tiny_processor(), picture(), CAPTION).score != pytest.approx(before)


# ---- grids ---------------------------------------------------------------------------------------


def pixels(height: int, width: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.zeros(1, 3, height, width)}


def test_grids_need_not_be_square():
    assert patch_grid(tiny_encoder(), pixels(24, 48), 18) == (3, 6)
    assert patch_grid(tiny_encoder("swin+bert"), pixels(16, 32), 4 * 8) == (4, 8)
    assert patch_grid(tiny_encoder("align"), pixels(32, 64), 8 * 16) == (8, 16)
    naflex = {"pixel_values": torch.zeros(1, 20, 192), "spatial_shapes": torch.tensor([[3, 5]])}
    assert patch_grid(tiny_encoder("siglip2"), naflex, 15) == (3, 5)


def test_no_grid_is_invented_for_another_number_of_tokens():
    assert patch_grid(tiny_encoder(), pixels(32, 32), 15) is None
    assert patch_grid(tiny_encoder(), pixels(32, 32), 9) is None  # square, but not these pixels'
    assert patch_grid(tiny_encoder("align"), pixels(32, 64), 9) is None
    assert patch_grid(tiny_encoder("align"), pixels(30, 32), 16) is None


def test_learned_projections_of_an_unknown_architecture_have_no_grid(monkeypatch):
    encoder = tiny_encoder()
    monkeypatch.delitem(ENCODERS, architecture(encoder))
    model = PicoModel.from_encoder(encoder, fallback_projection=True, probe_size=3)
    found = explain(model, tiny_processor(), picture(), CAPTION)
    assert found.grid is None
    assert found.word_maps().shape == (4, 1, 17)  # with CLS


# ---- labels and the picture ----------------------------------------------------------------------


def test_words_are_the_parts_of_the_caption(explanation):
    assert explanation.words == ("a", "big", "red", "square")


def test_an_unknown_word_is_shown_as_it_was_written():
    found = explain(weighted(), tiny_processor(), picture(), "a Zebra on red")
    assert found.words == ("a", "Zebra", "on", "red")


def test_words_that_were_cut_off_are_not_labelled():
    words = "red green blue white " * 8
    found = explain(weighted(), tiny_processor(), picture(), words)
    assert len(found.words) == found.weighted.products.shape[1] == 14  # of 16 tokens, BOS and EOS
    assert found.words == tuple(words.split()[:14])


def test_a_tokenizer_without_offsets_names_its_tokens(monkeypatch):
    processor = tiny_processor()
    collate = PicoCollator(processor)
    batch = collate([{"caption": CAPTION}])
    monkeypatch.setattr(type(processor.tokenizer), "is_fast", False)
    labels = word_labels(collate, CAPTION, batch["input_ids"][0], batch["word_mask"][0])
    assert labels == ("a", "big", "red", "square")


def test_the_picture_is_what_the_tower_saw(explanation):
    seen = np.asarray(picture().resize((32, 32), Image.Resampling.BILINEAR)) / 255
    assert explanation.image.shape == (32, 32, 3)
    np.testing.assert_allclose(explanation.image, seen, atol=0.01)


def test_a_naflex_picture_is_put_together_from_its_patches():
    found = explain(weighted("siglip2"), tiny_processor("siglip2"), picture(), CAPTION)
    seen = np.asarray(picture().resize((40, 32), Image.Resampling.BILINEAR)) / 255
    assert found.image.shape == (32, 40, 3)
    np.testing.assert_allclose(found.image, seen, atol=0.02)


def test_pixels_of_an_unknown_normalisation_are_stretched():
    values = torch.tensor([-3.0, 5.0]).repeat(1, 3, 2, 1)
    assert set(seen_image({"pixel_values": values}, None).flatten()) == {0.0, 1.0}


# ---- figures and the command ---------------------------------------------------------------------


def titles(figure) -> list[str]:
    return [part.get_suptitle() for part in figure.subfigs]


def test_a_figure_shows_words_patches_and_columns_with_and_without_weights(explanation):
    figure = explanation.figure()
    score, flat = explanation.score, explanation.unweighted.score
    assert titles(figure) == [
        f"with the column weights: S = {score:.3f}",
        f"without column weights: S = {flat:.3f}",
    ]
    maps, products, columns = figure.subfigs[0].subfigs
    assert [panel.get_title() for panel in maps.axes[1:5]] == list(explanation.words)
    np.testing.assert_allclose(
        maps.axes[3].images[1].get_array(), explanation.word_maps()[2], rtol=1e-6
    )
    np.testing.assert_allclose(
        products.axes[0].images[0].get_array(), explanation.weighted.products.T, rtol=1e-6
    )
    bars = [bar.get_height() for bar in columns.axes[0].patches]
    np.testing.assert_allclose(bars, sorted(explanation.weighted.columns.tolist(), reverse=True))


def test_equal_weights_are_drawn_once():
    model = PicoModel.from_encoder(tiny_encoder(), probe_size=3, pooled_share=0.0)
    figure = explain(model, tiny_processor(), picture(), CAPTION).figure()
    assert len(titles(figure)) == 1
    assert titles(figure)[0].startswith("all column weights equal: S = ")


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_a_figure_is_saved_in_the_format_of_its_ending(explanation, tmp_path, ending):
    explanation.save(tmp_path / "new" / f"why.{ending}")
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert (tmp_path / "new" / f"why.{ending}").read_bytes().startswith(starts[ending])
    assert len(list((tmp_path / "new").iterdir())) == 1  # nothing is left beside it


def test_an_ending_that_is_no_format_is_refused(explanation, tmp_path):
    for name in ("why.docx", "why"):
        with pytest.raises(ValueError, match=r"must end in one of .*\.png.*, got .*why"):
            explanation.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_queries_and_signs_of_formulas_can_be_drawn(tmp_path):
    found = explain(weighted("blip-2-itm"), tiny_processor(), picture(), "$5 or $ _x^ % a")
    found.save(tmp_path / "why.png")
    assert (tmp_path / "why.png").stat().st_size > 10_000


def test_a_notebook_shows_the_figure(explanation):
    assert explanation._repr_png_().startswith(b"\x89PNG")


def test_arrays_do_not_need_matplotlib(explanation, monkeypatch):
    stock = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert explanation.word_maps().shape == (4, 4, 4)
    with pytest.raises(ImportError, match=r'matplotlib.*pip install "pico-hf\[plots\]"'):
        explanation.figure()


def test_several_captions_are_refused():
    with pytest.raises(ValueError, match="`caption` must be one text, got list"):
        explain(weighted(), tiny_processor(), picture(), ["a", "b"])


def test_the_command_draws_and_gives_the_parts_of_the_words(tmp_path):
    model, processor = weighted(), tiny_processor()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    picture().save(tmp_path / "cat.png")
    expected = explain(model, processor, picture(), CAPTION)
    paths = [str(tmp_path / name) for name in ("model", "cat.png")]
    found = read("explain", *paths, CAPTION, "--output", tmp_path / "why.png", "--columns", 999)
    assert [part["word"] for part in found["words"]] == list(expected.words)
    assert found["score"] == pytest.approx(expected.score, abs=1e-5)
    parts = [part["part"] for part in found["words"]]
    assert sum(parts) + found["patches"] + found["pooled"] == pytest.approx(
        found["score"], abs=1e-5
    )
    columns = [column["part"] for column in found["columns"]]
    assert len(columns) == model.column_weights.numel()
    assert columns == sorted(columns, reverse=True)
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
    assert "none.png" in refused("explain", paths[0], tmp_path / "none.png", CAPTION)


def test_an_explanation_cannot_be_changed(explanation):
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.grid = (1, 16)
