"""Rows with a format or a transform are checked as training reads them."""

import pickle
import random

import datasets
import pytest
import torch
from PIL import Image

from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.images import as_rgb
from pico_hf.data.loading import COLUMNS, checked_rows, load_image_text
from tiny import tiny_rows

NO_EVAL = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def turned(batch):
    return {
        **batch,
        "image": [image.transpose(Image.Transpose.ROTATE_90) for image in batch["image"]],
    }


def drawn(batch):
    """Images and captions made from numbers alone."""
    return {
        "image": [Image.new("RGB", (16, 16), (8 * n, 0, 0)) for n in batch["shade"]],
        "caption": [f"red {n}" for n in batch["shade"]],
    }


def noisy(batch):
    """Other pixels each time."""
    shades = [random.randrange(256) for _ in batch["image"]]
    return {**batch, "image": [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in shades]}


def pixels(split: ImageTextDataset) -> list[bytes]:
    return [as_rgb(row["image"]).tobytes() for row in split.images()]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_a_format_changes_neither_rows_nor_pairs(kind):
    plain, formatted = (
        ImageTextDataset(tiny_rows(6)),
        ImageTextDataset(tiny_rows(6).with_format(kind)),
    )
    assert pixels(plain) == pixels(formatted)
    assert plain._texts == formatted._texts
    assert plain.fingerprint == formatted.fingerprint
    checked = ImageTextDataset(checked_rows(tiny_rows(6)).with_format(kind))
    assert pixels(checked) == pixels(plain)
    assert checked.fingerprint == plain.fingerprint


def test_a_format_that_hides_columns_hides_none_from_training():
    rows = tiny_rows(6).with_format("numpy", columns=["captions"])
    assert len(ImageTextDataset(rows)) == 6


@pytest.mark.parametrize("how", ["with_transform", "set_transform"])
def test_a_transform_is_what_training_sees(how, make_trainer):
    photos = [
        Image.linear_gradient("L").resize((32, 32)).point(lambda v, k=n: v // 2 + k)
        for n in range(16)
    ]
    rows = datasets.Dataset.from_dict(
        {"image": photos, "caption": [f"red {n}" for n in range(16)]},
        features=datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Value("string")}
        ),
    )
    expected = [as_rgb(photo.transpose(Image.Transpose.ROTATE_90)).tobytes() for photo in photos]
    rows = rows.with_transform(turned) if how == "with_transform" else rows
    if how == "set_transform":
        rows.set_transform(turned)
    split = ImageTextDataset(rows)
    assert pixels(split) == expected
    assert split._texts == [f"red {n}" for n in range(16)]
    trainer = make_trainer(dev=None, refine_prototypes=False, num_train_epochs=1, **NO_EVAL)
    trainer.train_dataset = split
    trainer.train()


def test_images_and_captions_may_be_made_from_nothing_but_numbers():
    rows = datasets.Dataset.from_dict({"shade": [1, 2, 1, 3]}).with_transform(drawn)
    split = ImageTextDataset(rows)
    assert split.rows.column_names == COLUMNS
    assert list(split.rows.with_format(None)["captions"]) == [["red 1"] * 2, ["red 2"], ["red 3"]]
    assert pixels(split) == [bytes((8 * n, 0, 0)) * 256 for n in (1, 2, 3)]
    assert split.part([1, 2])._texts == ["red 2", "red 3"]
    assert pixels(split.part([2])) == [bytes((24, 0, 0)) * 256]
    assert pixels(pickle.loads(pickle.dumps(split))) == pixels(split)


def test_images_that_change_each_time_are_known_by_what_is_stored():
    rows = datasets.concatenate_datasets([tiny_rows(6, captions=1)] * 2)
    split = ImageTextDataset(rows.with_transform(noisy))
    assert len(split) == 6
    assert split.text_to_image.tolist() == [n for n in range(6) for _ in range(2)]
    assert pixels(split) != pixels(split)
    other = ImageTextDataset(rows.shuffle(seed=0).with_transform(noisy))
    assert set(split.rows.with_format(None)["digest"]) == set(
        other.rows.with_format(None)["digest"]
    )


def test_a_transform_after_loading_keeps_identities_and_galleries(tmp_path):
    rows = tiny_rows(4, captions=1).add_column("thing", ["x", "y", "x", "z"])
    rows.add_column("style", list("aabb")).to_parquet(tmp_path / "rows.parquet")
    table = load_image_text(
        files=tmp_path / "rows.parquet", image_id_column="thing", gallery_column="style"
    )
    split = ImageTextDataset(table.with_transform(turned))
    assert split.image_ids.tolist() == [0, 1, 0, 2]
    assert split.gallery.tolist() == [0, 0, 1, 1]


def test_what_a_transform_cannot_make_is_named_by_its_row():
    def broken(batch):
        if 2 in batch["shade"]:
            raise ValueError("no such shade")
        return drawn(batch)

    rows = datasets.Dataset.from_dict({"shade": [1, 2, 3]}).with_transform(broken)
    with pytest.raises(ValueError, match=r"Row 1 has an image that cannot be read \(no such shade"):
        ImageTextDataset(rows)
    split = ImageTextDataset(rows, skip_bad_images=True)
    assert split._texts == ["red 1", "red 3"]


def test_a_transform_without_captions_is_answered_with_the_columns_it_makes():
    rows = datasets.Dataset.from_dict({"shade": [1]})
    rows = rows.with_transform(
        lambda batch: {"image": drawn(batch)["image"], "shade": batch["shade"]}
    )
    with pytest.raises(ValueError, match=r"`caption_column` could not be found\. .*image, shade\."):
        ImageTextDataset(rows)


def test_workers_read_rows_with_a_transform():
    split = ImageTextDataset(tiny_rows(8).with_transform(turned))
    loader = torch.utils.data.DataLoader(
        split, batch_size=4, num_workers=2, collate_fn=lambda rows: [r["caption"] for r in rows]
    )
    assert [c for batch in loader for c in batch] == [split[n]["caption"] for n in range(8)]
