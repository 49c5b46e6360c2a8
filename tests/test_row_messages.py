"""One clear line for each thing that is wrong with rows."""

import io

import datasets
import pytest
from PIL import Image

from pico_hf.data.dataset import ImageTextDataset
from tiny import tiny_rows


def rows(captions: list, images: list | None = None) -> datasets.Dataset:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return datasets.Dataset.from_dict(
        {"image": images or [buffer.getvalue()] * len(captions), "caption": captions}
    )


def message(*args, **kwargs) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        ImageTextDataset(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_an_empty_split_is_said_to_be_empty():
    assert "must have at least one row, got an empty split" in message(tiny_rows(2).select([]))


def test_numbers_as_captions_are_named_with_their_type():
    text = message(rows([1, 2]))
    assert "Column `caption` has a usual name but holds int64" in text
    assert "Convert it with `datasets.Dataset.map`" in text


def test_captions_nested_twice_are_said_to_be_nested():
    assert "Column `caption` has a usual name but holds lists of lists" in message(rows([[["a"]]]))
    text = message(rows([[["a"]]]), caption_column="caption")
    assert "Row 0 has a caption of type list" in text
    assert "not nested deeper" in text


def test_base64_text_is_answered_with_its_length_and_what_to_do():
    text = message(rows(["x"], ["A" * 100_000]))
    assert "Row 0 has an image" in text
    assert "a text of 100000 characters is no path" in text
    assert "`base64.b64decode`" in text


def test_a_long_path_is_cut_in_the_message():
    assert "…" in message(rows(["x"], ["A" * 3000]))


def test_every_image_bad_is_said_in_one_line():
    text = message(rows(["x", "y"], [b"no", b"none"]), skip_bad_images=True)
    assert "Row 0 has an image" in text
    assert "so has every other row" in text


def test_a_dict_of_training_splits_is_refused(make_trainer, monkeypatch):
    import tiny

    plain = tiny.tiny_rows
    monkeypatch.setattr(
        "conftest.tiny_rows", lambda images: datasets.DatasetDict(train=plain(images))
    )
    with pytest.raises(
        ValueError, match=r"`train_dataset` must be one split, got a DatasetDict of train"
    ):
        make_trainer(dev=None)
