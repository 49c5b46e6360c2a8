"""Rows to batches, and clear answers to bad data."""

import io
import json
import logging

import datasets
import pytest
import torch
from PIL import Image

from pico_hf import PicoModel
from pico_hf.data.collator import PicoCollator
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.images import as_rgb
from pico_hf.data.loading import COLUMNS, load_image_text
from tiny import tiny_encoder, tiny_processor, tiny_rows


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
    several = ImageTextDataset(raw_rows([png(), png("blue")], [["one", "two"], ["three"]]))
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


def test_the_probe_is_made_of_the_same_pairs_in_every_epoch_and_order_of_rows():
    rows = tiny_rows(6)
    split = ImageTextDataset(rows)
    split.set_epoch(5)
    probe = split.probe(4)
    assert len(probe) == 4
    captions = [probe[row]["caption"] for row in range(4)]
    images = [as_rgb(probe[row]["image"]).tobytes() for row in range(4)]
    other = ImageTextDataset(rows.select([3, 5, 0, 1, 4, 2])).probe(4)
    assert [other[row]["caption"] for row in range(4)] == captions
    owner = {row["image"].tobytes(): row["captions"] for row in rows}
    for image, caption in zip(images, captions, strict=True):
        assert caption in owner[image]
    assert len(set(images)) == 4


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


def test_an_image_may_be_a_picture_a_path_bytes_or_both(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    forms = [Image.open(path), str(path), path, png()]
    forms += [{"bytes": png(), "path": "elsewhere"}, {"bytes": None, "path": str(path)}]
    for image in forms:
        assert as_rgb(image).size == (8, 8)
        assert as_rgb(image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, r"must be a PIL image, a path or bytes.* got int"),
        (None, r"must be a PIL image, a path or bytes.* got NoneType"),
        ({"url": "a"}, r"must be a PIL image.* got a dict with 'url'"),
        ("https://x.org/a.png", r"got the URL 'https://x\.org/a\.png'.* download it first"),
        ({"bytes": None, "path": "s3://b/a.png"}, r"got the URL 's3://b/a\.png'"),
        (b"no image", r"`image` cannot be read"),
        ("missing.png", r"`image` cannot be read .*missing\.png"),
    ],
)
def test_what_is_no_image_is_answered_with_what_came(image, message):
    with pytest.raises(ValueError, match=message):
        as_rgb(image)


def test_a_photo_is_the_right_way_up_however_it_comes():
    photo, buffer = Image.new("RGB", (8, 4), "red"), io.BytesIO()
    exif = photo.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    photo.save(buffer, "JPEG", exif=exif)
    decoded = ImageTextDataset(raw_rows([buffer.getvalue()], ["x"])).images()[0]["image"]
    assert as_rgb(buffer.getvalue()).size == as_rgb(decoded).size == (4, 8)


def test_several_captions_become_pairs_of_one_image():
    rows = [
        {"image": Image.new("RGB", (8, 8), colour), "captions": captions}
        for colour, captions in (("red", ["a red disc", "red"]), ("blue", ["blue square"]))
    ]
    batch = PicoCollator(tiny_processor())(rows)
    assert batch["image_ids"].tolist() == [0, 0, 1]
    assert len(batch["input_ids"]) == len(batch["pixel_values"]) == 3
    torch.testing.assert_close(batch["pixel_values"][0], batch["pixel_values"][1])
    assert batch["word_mask"].sum(dim=1).tolist() == [3, 1, 2]
    model = PicoModel.from_encoder(tiny_encoder(), num_prototypes=2)
    assert torch.isfinite(model(**batch).loss)


def test_captions_of_one_thing_stay_no_negatives_of_each_other():
    rows = [{"caption": ["red", "big"], "image_ids": 7}, {"caption": ["disc"], "image_ids": 7}]
    assert PicoCollator(tiny_processor())(rows)["image_ids"].tolist() == [7, 7, 7]


def test_lists_of_one_caption_are_plain_pairs():
    batch = PicoCollator(tiny_processor())([{"caption": ["red"]}, {"caption": ["big disc"]}])
    assert "image_ids" not in batch
    assert len(batch["input_ids"]) == 2


def test_checked_rows_can_be_collated_as_they_are(tmp_path):
    tiny_rows(3).to_parquet(tmp_path / "rows.parquet")
    table = load_image_text(files=tmp_path / "rows.parquet")
    batch = PicoCollator(tiny_processor())([table[n] for n in range(3)])
    assert batch["image_ids"].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("names", [("img", "text"), ("photo", "sentences"), ("jpg", "txt")])
def test_a_batch_finds_columns_under_their_usual_names(names):
    image, caption = names
    row = {image: Image.new("RGB", (8, 8)), caption: "red", "id": 3, "label": 0}
    batch = PicoCollator(tiny_processor())([row, row])
    assert {"pixel_values", "input_ids", "word_mask"} <= batch.keys()


def test_a_batch_takes_the_columns_it_is_told_to():
    row = {"image": png("blue"), "left": png(), "text": "a red disc", "title": "red"}
    collate = PicoCollator(tiny_processor(), image_column="left", caption_column="title")
    batch = collate([row])
    assert batch["word_mask"].sum() == 1
    expected = PicoCollator(tiny_processor())([{"image": png()}])["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)


def test_a_batch_without_its_column_is_answered_with_the_columns_there_are():
    collate = PicoCollator(tiny_processor(), image_column="pictures")
    with pytest.raises(ValueError, match=r"there are: picture, text\. Did you mean `picture`"):
        collate([{"picture": png(), "text": "red"}])


def test_a_batch_of_other_columns_names_them():
    with pytest.raises(ValueError, match=r"neither an image nor a caption, only: id, label\."):
        PicoCollator(tiny_processor())([{"id": 3, "label": 0}])


@pytest.mark.parametrize("caption", [{"raw": "red"}, [{"raw": "red"}], ["red", 3]])
def test_a_batch_names_the_row_whose_caption_is_no_text(caption):
    rows = [{"caption": "red"}, {"caption": caption}]
    with pytest.raises(ValueError, match=r"Row 1 has a caption of type (dict|int)"):
        PicoCollator(tiny_processor())(rows)


def test_a_batch_names_the_row_without_captions():
    with pytest.raises(ValueError, match="Row 1 has an empty caption"):
        PicoCollator(tiny_processor())([{"caption": ["red"]}, {"caption": []}])


@pytest.mark.parametrize(
    ("encoder", "tokens"), [("clip", 5), ("siglip", 64), ("siglip2", 64), ("vit+bert", 5)]
)
def test_the_configuration_decides_how_texts_are_padded(encoder, tokens):
    model = PicoModel.from_encoder(tiny_encoder(encoder), num_prototypes=2)
    collate = PicoCollator(tiny_processor(encoder), config=model.config)
    batch = collate([{"caption": "red"}, {"caption": "a red disc"}])
    assert batch["input_ids"].shape == (2, tokens)
    assert ("attention_mask" in batch) == (tokens == 5)
    assert batch["word_mask"].sum(dim=1).tolist() == [1, 3]
    bare = PicoCollator(tiny_processor(encoder), config=model.encoder.config)
    assert bare.max_length == collate.max_length


def test_texts_are_cut_to_the_positions_of_the_tower():
    processor = tiny_processor()
    processor.tokenizer.model_max_length = int(1e30)  # what a tokenizer without a limit says
    config = tiny_encoder().config
    batch = PicoCollator(processor, config=config)([{"caption": "red " * 100}])
    assert batch["input_ids"].shape == (1, config.text_config.max_position_embeddings)


def test_naflex_batches_carry_shapes_and_mask_to_the_model():
    model = PicoModel.from_encoder(tiny_encoder("siglip2"), num_prototypes=2)
    processor = tiny_processor("siglip2")
    sizes = [(32, 32), (24, 40)]
    rows = [{"image": Image.new("RGB", size, "red"), "caption": "red disc"} for size in sizes]
    batch = PicoCollator(processor, config=model.config)(rows)
    expected = processor.image_processor([row["image"] for row in rows], return_tensors="pt")
    for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes"):
        torch.testing.assert_close(batch[name], expected[name])
    features = model(**batch).image_features
    assert features.mask.sum(dim=1).tolist() == batch["spatial_shapes"].prod(dim=1).tolist()
    twice = PicoCollator(processor)([{**rows[0], "caption": ["red", "disc"]}, rows[1]])
    assert len(twice["spatial_shapes"]) == len(twice["pixel_attention_mask"]) == 3


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


def test_a_class_number_called_label_is_no_caption():
    rows = raw_rows([png()], ["x"]).rename_column("caption", "label")
    assert ImageTextDataset(rows).rows["captions"] == [["x"]]
    numbers = rows.remove_columns("label").add_column("label", [3])
    with pytest.raises(ValueError, match=r"`caption_column` could not be found\. .* photo, label"):
        ImageTextDataset(numbers)
    with pytest.raises(ValueError, match="Row 0 has a caption of type int"):
        ImageTextDataset(numbers, caption_column="label")


def test_captions_inside_of_structures_are_refused():
    rows = raw_rows([png()], ["x"]).remove_columns("caption")
    rows = rows.add_column("sentences", [{"raw": "a red disc"}])
    with pytest.raises(ValueError, match="Row 0 has a caption of type dict"):
        ImageTextDataset(rows, caption_column="sentences")


def test_of_several_image_columns_the_one_with_the_usual_name_is_taken():
    columns = {"mask": [png()], "photo": [png("blue")], "text": ["x"]}
    rows = datasets.Dataset.from_dict(columns)
    rows = rows.cast_column("mask", datasets.Image()).cast_column("photo", datasets.Image())
    chosen = ImageTextDataset(rows).images()[0]["image"]
    assert chosen.getpixel((0, 0)) == (0, 0, 255)
    rows = rows.rename_column("photo", "crop")
    with pytest.raises(ValueError, match=r"`image_column` is one of mask, crop, and none has a"):
        ImageTextDataset(rows)
    assert len(ImageTextDataset(rows, image_column="crop")) == 1


def test_columns_of_bytes_or_paths_are_read_as_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    both = [{"bytes": png(), "path": None}]
    for images in ([png()], [str(tmp_path / "a.png")], both):
        rows = datasets.Dataset.from_dict({"image": images, "text": ["x"]})
        assert ImageTextDataset(rows).images()[0]["image"].size == (8, 8)


def test_an_address_instead_of_an_image_is_named_by_its_row(tmp_path):
    rows = datasets.Dataset.from_dict({"image": ["https://x.org/a.png"], "text": ["x"]})
    with pytest.raises(ValueError, match=r"Row 0 .* got the URL 'https://x\.org/a\.png'"):
        ImageTextDataset(rows)
    rows.to_json(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"Row 0 .* got the URL 'https://x\.org/a\.png'"):
        load_image_text(files=tmp_path / "rows.jsonl")


def test_several_splits_at_once_are_answered_with_how_to_choose_one():
    splits = datasets.DatasetDict({"dev": tiny_rows(2), "train": tiny_rows(2)})
    with pytest.raises(ValueError, match=r"a DatasetDict of dev, train\. .*`data\['dev'\]`"):
        ImageTextDataset(splits)


def test_rows_that_are_streamed_are_refused():
    with pytest.raises(ValueError, match=r"must be a `datasets.Dataset`, got IterableDataset"):
        ImageTextDataset(tiny_rows(2).to_iterable_dataset())


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
    images = [png(), b"no image", png("blue")]
    raw_rows(images, ["x", "y", "z"]).to_parquet(tmp_path / "rows.parquet")
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
