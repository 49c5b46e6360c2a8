"""Rows to batches, and clear answers to bad data."""

import io
import json
import logging

import datasets
import pytest
import torch
from PIL import Image

from pico_hf.data import ImageTextDataset, PicoCollator, as_rgb
from pico_hf.data_loading import COLUMNS, load_image_text
from tiny import tiny_processor, tiny_rows


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def raw_rows(images: list[bytes], captions: list) -> datasets.Dataset:
    kind = "string" if isinstance(captions[0], str) else datasets.List(datasets.Value("string"))
    caption = datasets.Value(kind) if isinstance(kind, str) else kind
    features = datasets.Features({"photo": datasets.Image(decode=False), "caption": caption})
    photos = [{"bytes": image, "path": None} for image in images]
    table = datasets.Dataset.from_dict({"photo": photos, "caption": captions}, features=features)
    return table.cast_column("photo", datasets.Image())


def test_one_caption_or_a_list_of_them_gives_the_same_columns():
    one = ImageTextDataset(raw_rows([png()], ["a red square"]))
    several = ImageTextDataset(raw_rows([png(), png()], [["one", "two"], ["three"]]))
    assert one.rows.column_names == several.rows.column_names == COLUMNS
    assert several.text_to_image.tolist() == [0, 0, 1]
    assert [row["caption"] for row in several.captions()] == ["one", "two", "three"]


def test_the_caption_of_a_row_depends_on_seed_epoch_and_row_alone():
    split = ImageTextDataset(tiny_rows(24), seed=3)
    first = [split[row]["caption"] for row in range(24)]
    split.set_epoch(1)
    second = [split[row]["caption"] for row in range(24)]
    split.set_epoch(0)
    assert [split[row]["caption"] for row in reversed(range(24))] == first[::-1]
    assert first != second
    assert len(set(first)) > 4  # both captions of an image are used


def test_the_probe_is_the_first_rows_with_their_first_captions_in_every_epoch():
    split = ImageTextDataset(tiny_rows(6))
    split.set_epoch(5)
    probe = split.probe(4)
    assert len(probe) == 4
    assert [probe[row]["caption"] for row in range(4)] == [
        texts[0] for texts in tiny_rows(6)["captions"][:4]
    ]


def test_rows_of_one_identity_share_a_number(tmp_path):
    rows = tiny_rows(3, captions=1).add_column("concept", ["x", "y", "x"])
    rows.to_parquet(tmp_path / "rows.parquet")
    table = load_image_text(files=tmp_path / "rows.parquet", image_id_column="concept")
    assert [ImageTextDataset(table)[row]["image_ids"] for row in range(3)] == [0, 1, 0]


def test_a_batch_masks_special_tokens_and_padding():
    rows = [{"caption": "red square"}, {"caption": "a big blue disc"}]
    batch = PicoCollator(tiny_processor())(rows)
    assert batch["word_mask"].dtype == torch.bool
    assert batch["word_mask"].sum(dim=1).tolist() == [2, 4]
    assert not batch["word_mask"][:, 0].any()


def test_cached_states_are_padded_with_a_mask():
    rows = [{"text_hidden_states": torch.ones(n, 3)} for n in (1, 2)]
    batch = PicoCollator(tiny_processor())(rows)
    assert batch["word_mask"].tolist() == [[True, False], [True, True]]
    assert batch["text_hidden_states"][0, 1].tolist() == [0, 0, 0]


def test_a_siglip_processor_pads_to_64_and_hands_its_tower_no_attention_mask():
    processor = tiny_processor()
    processor.__class__ = type("SiglipProcessor", (type(processor),), {})
    batch = PicoCollator(processor)([{"caption": "red disc"}])
    assert batch["input_ids"].shape == (1, 64)
    assert "attention_mask" not in batch
    assert batch["word_mask"].sum() == 2


def test_an_image_may_be_a_picture_a_path_or_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for image in (Image.open(tmp_path / "a.png"), str(tmp_path / "a.png"), png()):
        assert as_rgb(image).size == (8, 8)
    with pytest.raises(ValueError, match="`image` must be a PIL image, a path or bytes, got int"):
        as_rgb(3)


def test_jsonl_names_images_relative_to_the_file(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    line = json.dumps({"image": "a.png", "caption": "a red square"})
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    table = load_image_text(files=tmp_path / "rows.jsonl")
    assert table[0]["image"].size == (8, 8)
    assert table[0]["captions"] == ["a red square"]


def test_an_imagefolder_with_captions_loads(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    line = json.dumps({"file_name": "a.png", "text": "a red square"})
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    assert load_image_text(files=tmp_path)[0]["captions"] == ["a red square"]


def test_a_misspelt_column_is_answered_with_the_columns_there_are():
    with pytest.raises(ValueError, match=r"there are: photo, caption\. Did you mean `caption`"):
        ImageTextDataset(raw_rows([png()], ["x"]), caption_column="captoin")


def test_a_column_that_cannot_be_found_is_answered_with_the_columns_there_are():
    rows = raw_rows([png()], ["x"]).rename_column("caption", "zzz")
    with pytest.raises(ValueError, match=r"`caption_column` could not be found\. .* photo, zzz"):
        ImageTextDataset(rows)


def test_an_unreadable_image_is_named_by_its_row():
    with pytest.raises(ValueError, match="Row 1 has an image that cannot be read"):
        ImageTextDataset(raw_rows([png(), b"no image"], ["x", "y"]))


def test_a_truncated_image_is_named_by_its_row():
    noise = Image.effect_noise((64, 64), 50)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    with pytest.raises(ValueError, match="Row 0 has an image that cannot be read"):
        ImageTextDataset(raw_rows([buffer.getvalue()[:-500]], ["x"]))


def test_bad_images_are_skipped_and_counted_when_asked(tmp_path, caplog):
    raw_rows([png(), b"no image", png()], ["x", "y", "z"]).to_parquet(tmp_path / "rows.parquet")
    with caplog.at_level(logging.WARNING):
        table = load_image_text(files=tmp_path / "rows.parquet", skip_bad_images=True)
    assert [texts[0] for texts in table["captions"]] == ["x", "z"]
    assert "Left out 1 unreadable images, rows [1]" in caplog.text


@pytest.mark.parametrize("captions", [["x", " "], [["x"], []], [["x"], ["y", ""]]])
def test_an_empty_caption_is_named_by_its_row(captions):
    with pytest.raises(ValueError, match="Row 1 has an empty caption"):
        ImageTextDataset(raw_rows([png(), png()], captions))


def test_sources_are_either_named_or_files(tmp_path):
    with pytest.raises(ValueError, match="either `dataset_name` or `files`"):
        load_image_text()
    with pytest.raises(ValueError, match="which does not exist"):
        load_image_text(files=tmp_path / "missing.parquet")


def test_a_processor_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="must hold a tokenizer and an image processor"):
        PicoCollator(object())
