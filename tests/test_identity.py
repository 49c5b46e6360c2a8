"""Rows of one image are one image: in checked rows, in training pairs, and in ranks."""

import io
import random

import datasets
import pytest
import torch
from PIL import Image

from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.identity import identity_codes, rows_of_images
from pico_hf.data.loading import checked_rows
from pico_hf.training.evaluation import SplitEncoder, evaluate_retrieval


def noise(number: int) -> bytes:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def table(images: list, captions: list, **columns: list) -> datasets.Dataset:
    encoded = [{"bytes": image, "path": None} for image in images]
    rows = datasets.Dataset.from_dict({"image": encoded, "caption": captions, **columns})
    return rows.cast_column("image", datasets.Image())


def contents(split: ImageTextDataset) -> set:
    """Digest and captions of every image, in whatever order."""
    return {
        (digest, tuple(sorted(captions)))
        for digest, captions in zip(split.rows["digest"], split.rows["captions"], strict=True)
    }


def test_rows_of_one_content_become_one_image_with_captions_in_order():
    rows = checked_rows(table([noise(0), noise(1), noise(0)], ["a", "b", "c"]))
    assert list(rows["captions"]) == [["a", "c"], ["b"]]
    assert len(set(rows["image_id"])) == 2
    assert len(set(rows["digest"])) == 2


def test_a_caption_that_two_rows_of_an_image_share_is_kept_twice_in_either_form():
    exploded = checked_rows(table([noise(0)] * 3, ["a", "b", "a"]))
    nested = checked_rows(table([noise(0)], [["a", "b", "a"]]))
    assert list(exploded["captions"]) == list(nested["captions"]) == [["a", "b", "a"]]


def test_files_of_equal_content_are_images_of_their_own(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(noise(0))
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "a.png", "../x/b.png")]
    paths[3] = str(tmp_path / "." / "b.png")
    rows = datasets.Dataset.from_dict({"image": paths, "caption": list("wxyz")})
    checked = checked_rows(rows)
    assert list(checked["captions"]) == [["w", "y"], ["x", "z"]]
    assert len(set(checked["digest"])) == 1


def test_images_named_alike_stay_several_images_of_one_identity():
    images = [noise(0), noise(1), noise(2), noise(0)]
    split = ImageTextDataset(
        table(images, list("wxyz"), thing=[7, 7, 8, 7]), image_id_column="thing"
    )
    assert list(split.rows["captions"]) == [["w", "z"], ["x"], ["y"]]
    assert split.image_ids.tolist() == [0, 0, 1]


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
def test_a_missing_identity_is_that_of_the_image_alone(missing):
    names = [missing, missing, missing] if missing != "" else ["", " ", ""]
    rows = table([noise(0), noise(1), noise(0)], list("abc"), thing=names)
    split = ImageTextDataset(rows, image_id_column="thing")
    assert list(split.rows["captions"]) == [["a", "c"], ["b"]]
    assert split.image_ids.tolist() == [0, 1]


def test_a_row_without_a_name_takes_that_of_its_image_in_whatever_order():
    assert rows_of_images(["x", "x", "y"], [None, "mug", None], ["", "", ""]) == [[0, 1], [2]]
    named_twice = [("b", ["b", None, "a"]), ("a", [None, "a", "b"])]
    for _, names in named_twice:
        groups = rows_of_images(["x"] * 3, names, [""] * 3)
        with_none = next(group for group in groups if names.index(None) in group)
        assert {names[row] for row in with_none} == {None, "a"}


def test_one_image_in_two_galleries_is_ranked_in_each_of_them():
    rows = table([noise(0), noise(0), noise(1)], list("abc"), fold=["1", "2", "2"])
    split = ImageTextDataset(rows, gallery_column="fold")
    assert list(split.rows["captions"]) == [["a"], ["b"], ["c"]]
    assert split.gallery.tolist() == [0, 1, 1]
    assert split.image_ids.tolist() == [0, 0, 1]


def test_codes_count_names_and_keep_what_is_missing_apart():
    codes = identity_codes(["b", None, "a", float("nan"), "b", ""])
    assert codes.tolist() == [0, 1, 2, 3, 0, 4]


@pytest.mark.parametrize("seed", range(3))
def test_training_draws_the_same_pairs_from_rows_in_any_order_and_form(seed):
    images, words = [noise(n) for n in range(6)], [[f"{n} {k}" for k in range(4)] for n in range(6)]
    nested = ImageTextDataset(table(images, words), seed=seed)
    pairs = [(images[n], text) for n, texts in enumerate(words) for text in texts]
    random.Random(seed).shuffle(pairs)
    exploded = ImageTextDataset(table(*map(list, zip(*pairs, strict=True))), seed=seed)
    assert contents(nested) == contents(exploded)
    assert nested.fingerprint == exploded.fingerprint
    seen = set()
    for epoch in range(4):
        drawn = []
        for split in (nested, exploded):
            split.set_epoch(epoch)
            rows = [split[number] for number in range(6)]
            drawn.append([(row["image"].tobytes(), row["caption"]) for row in rows])
        assert drawn[0] == drawn[1]
        seen |= set(drawn[0])
    assert len(seen) > 12  # of 24: other captions in other epochs
    parts = [contents(split.sample(3)) for split in (nested, exploded)]
    assert parts[0] == parts[1]
    assert len(parts[0]) == 3


def test_the_user_s_order_stays_that_of_images_and_captions():
    split = ImageTextDataset(table([noise(2), noise(0), noise(2)], list("abc")))
    images = [split.images()[row]["image"].tobytes() for row in range(2)]
    assert images == [Image.open(io.BytesIO(noise(n))).tobytes() for n in (2, 0)]
    assert [split.captions()[row]["caption"] for row in range(3)] == ["a", "c", "b"]
    assert split.text_to_image.tolist() == [0, 0, 1]


def test_an_encoded_split_says_where_its_rows_stood(make_trainer):
    trainer = make_trainer()
    split = ImageTextDataset(table([noise(n) for n in range(5)], [f"red {n}" for n in "abcde"]))
    encoded = SplitEncoder(trainer.pico_model, trainer.data_collator, 2, disable_tqdm=True).split(
        split
    )
    assert encoded.image_rows.tolist() == split.image_order.tolist() != list(range(5))
    given = split.text_to_image[encoded.caption_rows]
    assert torch.equal(encoded.image_rows[encoded.text_to_image], given)


def test_views_of_one_thing_do_not_compete_when_a_split_is_scored(make_trainer):
    trainer = make_trainer()
    images, captions = [noise(n) for n in range(12)], ["red disc"] * 12
    encoder = SplitEncoder(trainer.pico_model, trainer.data_collator, 4, disable_tqdm=True)
    scored = {}
    for name, things in (("own", range(12)), ("pairs", [n // 2 for n in range(12)])):
        rows = table(images, captions, thing=[str(n) for n in things])
        split = encoder.split(ImageTextDataset(rows, image_id_column="thing"))
        scored[name] = evaluate_retrieval(trainer.pico_model, split)
    # All captions are alike, so every caption ties with all that compete with it.
    assert scored["own"]["i2t_median_rank"] == 12.0
    assert scored["pairs"]["i2t_median_rank"] == 11.0


def test_workers_that_live_on_see_the_epoch_of_the_run():
    split = ImageTextDataset(table([noise(n) for n in range(8)], [list("abcdefgh")] * 8))
    loader = torch.utils.data.DataLoader(
        split,
        batch_size=4,
        num_workers=2,
        persistent_workers=True,
        collate_fn=lambda rows: [row["caption"] for row in rows],
    )
    for epoch in range(3):
        split.set_epoch(epoch)
        drawn = [caption for batch in loader for caption in batch]
        assert drawn == [split[number]["caption"] for number in range(8)]
