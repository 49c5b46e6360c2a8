"""Raw images and texts in, features and rankings out: the same numbers as by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pico_hf import Match, PicoCollator, PicoModel, PicoRetriever
from tiny import tiny_encoder, tiny_processor, tiny_refined, tiny_rows

TEXTS = ["a big red square", "green disc", "a small blue square on white", "white disc"]


@pytest.fixture
def pictures() -> list[Image.Image]:
    return list(tiny_rows(7)["image"])


def make(encoder: str = "clip", **knobs) -> PicoRetriever:
    knobs = {"show_progress": False, "batch_size": 3, **knobs}
    naflex = encoder == "siglip2"
    model = (
        PicoModel.from_encoder(tiny_encoder(encoder), pooled_share=0.0)
        if naflex
        else tiny_refined(encoder)
    )
    return PicoRetriever(model, tiny_processor(encoder), **knobs)


@pytest.mark.parametrize("encoder", ["clip", "siglip", "siglip2"])
def test_features_and_scores_are_those_of_collator_and_model(encoder: str, pictures) -> None:
    retriever = make(encoder)
    model = retriever.model
    collate = PicoCollator(retriever.processor, config=model.config)
    with torch.no_grad():
        images = model.encode_images(**collate([{"image": image} for image in pictures]))
        texts = model.encode_texts(**collate([{"caption": text} for text in TEXTS]))
        expected = model.score(images, texts)
    encoded = retriever.encode_images(pictures)
    torch.testing.assert_close(encoded.features[encoded.mask], images.features[images.mask])
    words = retriever.encode_texts(TEXTS)
    torch.testing.assert_close(words.features[words.mask], texts.features[texts.mask])
    torch.testing.assert_close(retriever.score(pictures, TEXTS), expected)
    torch.testing.assert_close(retriever.score(encoded, words), expected)


def test_paths_bytes_arrays_and_pictures_of_one_image_have_one_set_of_features(
    pictures, tmp_path: Path
) -> None:
    retriever = make()
    pictures[0].save(tmp_path / "a.png")
    forms = [
        pictures[0],
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        np.asarray(pictures[0]),
    ]
    together = retriever.encode_images(forms).features
    for number, form in enumerate(forms):
        torch.testing.assert_close(together[number], together[0], rtol=0, atol=0)
        alone = retriever.encode_images(form).features
        assert len(alone) == 1, "one image by itself is a list of one"
        torch.testing.assert_close(alone[0], together[0])


def test_a_single_string_is_one_text_and_not_its_characters() -> None:
    assert len(make().encode_texts("red disc")) == 1


def test_every_text_gets_its_best_images(pictures) -> None:
    retriever = make()
    scores = retriever.score(pictures, TEXTS)
    ranking = retriever.rank(pictures, TEXTS, top_k=3)
    assert [len(row) for row in ranking] == [3] * 4
    for text, row in enumerate(ranking):
        best = scores[:, text].sort(descending=True, stable=True)
        assert [match.index for match in row] == best.indices[:3].tolist()
        assert [match.score for match in row] == best.values[:3].tolist()
        assert all(match.item is pictures[match.index] for match in row)


def test_every_image_gets_its_best_texts(pictures) -> None:
    retriever = make()
    scores = retriever.score(pictures, TEXTS)
    ranking = retriever.rank(pictures, TEXTS, top_k=1, by="image")
    assert [row[0].item for row in ranking] == [TEXTS[n] for n in scores.argmax(dim=1).tolist()]


def test_features_rank_as_what_they_were_made_of_and_name_no_items(pictures) -> None:
    retriever = make()
    raw = retriever.rank(pictures, TEXTS)
    encoded = retriever.rank(retriever.encode_images(pictures), retriever.encode_texts(TEXTS))
    assert encoded == [[Match(m.index, pytest.approx(m.score)) for m in row] for row in raw]


def test_equal_scores_keep_the_order_of_the_items(pictures) -> None:
    (row,) = make(batch_size=5).rank([pictures[1]] * 5, "red disc")
    assert [match.index for match in row] == [0, 1, 2, 3, 4]


def test_the_model_keeps_its_mode_and_its_random_state(pictures) -> None:
    retriever = make()
    retriever.model.train()
    state = torch.get_rng_state()
    retriever.rank(pictures, TEXTS)
    assert retriever.model.training
    assert torch.equal(state, torch.get_rng_state())


def test_workers_decode_what_the_main_process_decodes(pictures) -> None:
    alone, helped = make(), make(num_workers=2)
    torch.testing.assert_close(alone.score(pictures, TEXTS), helped.score(pictures, TEXTS))


def test_a_folder_that_was_saved_is_a_retriever(pictures, tmp_path: Path) -> None:
    made = make()
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    loaded = PicoRetriever.from_pretrained(tmp_path, device="cpu", show_progress=False)
    assert isinstance(loaded.model, PicoModel)
    torch.testing.assert_close(loaded.score(pictures, TEXTS), made.score(pictures, TEXTS))


@pytest.mark.parametrize("call", ["encode_images", "encode_texts"])
def test_nothing_to_encode_is_refused(call: str) -> None:
    with pytest.raises(ValueError, match=r"must hold at least one item, got none"):
        getattr(make(), call)([])


def test_an_image_that_cannot_be_read_is_named(pictures, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"`images`\[1\] \('.*notes\.jpg'\): `image` cannot be"):
        make().encode_images([pictures[0], tmp_path / "notes.jpg"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["red", "  "], r"`texts`\[1\] is empty"),
        (["red", 3], r"`texts`\[1\] must be a string, got int"),
        (7, r"`texts` must be a list, got int"),
    ],
)
def test_what_is_no_text_is_named(texts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().encode_texts(texts)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"top_k": 0}, r"`top_k` must be an integer >= 1, got 0"),
        ({"by": "caption"}, r"`by` must be 'text' or 'image', got 'caption'"),
    ],
)
def test_rankings_name_the_argument_that_is_wrong(pictures, knobs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().rank(pictures, TEXTS, **knobs)


def test_a_batch_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`batch_size` must be an integer >= 1, got 0"):
        make(batch_size=0)
