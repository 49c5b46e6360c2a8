"""Hard negatives: what is mined is confused, apart and certain; batches hold it; runs resume."""

import datasets
import pytest
import torch

from pico_hf import ImageTextDataset, ImageTextStream, PicoRetriever, load_image_text
from pico_hf.data.negatives import NEGATIVES, Negatives, image_keys
from pico_hf.training.evaluation import split_scores
from pico_hf.training.hard_negatives import DIRECTIONS, mine_hard_negatives
from tiny import tiny_processor, tiny_rows
from tiny_trainer import BARE, tiny_model, tiny_trainer

MARGIN = 0.05


def named_rows(images: int = 24) -> datasets.Dataset:
    """Two images of every identity, in two galleries."""
    rows = tiny_rows(images)
    rows = rows.add_column("thing", [f"thing {row // 4}" for row in range(images)])
    rows = rows.add_column("place", [f"place {row % 2}" for row in range(images)])
    return ImageTextDataset(rows, image_id_column="thing", gallery_column="place").rows


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """That of a trainer which has trained a little, so that some images are confused."""
    options = {"model": tiny_model(loss="infonce"), "train_dataset": named_rows()}
    trainer = tiny_trainer(
        tmp_path_factory.mktemp("miner"), options, **{**BARE, "num_train_epochs": 2}
    )
    trainer.train()
    return trainer.split_encoder


@pytest.fixture(scope="module")
def mined(encoder):
    """Rows with up to five negatives each, both directions, all candidates scored exactly."""
    return mine_hard_negatives(encoder, named_rows(), per_pair=5, margin=MARGIN)


def row_of_key(rows: datasets.Dataset) -> dict[str, int]:
    return {key: row for row, key in enumerate(image_keys(rows))}


def all_scores(encoder, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (images, captions) and the image of each caption, both as the rows list them."""
    split = ImageTextDataset(rows)
    encoded = encoder.split(split)
    scores = torch.empty(len(encoded.images), len(encoded.texts))
    images, captions = encoded.rows_of_images(), encoded.rows_of_captions()
    scores[images.unsqueeze(1), captions] = split_scores(encoder.model, encoded).cpu()
    return scores, split.text_to_image


def expected(encoder, rows, margin: float, directions) -> list[dict[int, float]]:
    """By loops over all images and captions: rows that are no suspects, and how hard each is."""
    scores, owner = all_scores(encoder, rows)
    texts = [[t for t in range(len(owner)) if owner[t] == row] for row in range(len(rows))]
    found = []
    for row in range(len(rows)):
        hardness = {}
        for other in range(len(rows)):
            if rows["image_id"][other] == rows["image_id"][row]:
                continue
            if rows["gallery"][other] != rows["gallery"][row]:
                continue
            if set(rows["captions"][other]) & set(rows["captions"][row]):
                continue
            gaps = []
            if "text_to_image" in directions:
                for t in texts[row]:
                    own = float(scores[row, t])
                    gaps.append((float(scores[other, t]) - own) / abs(own))
            if "image_to_text" in directions:
                own = max(float(scores[row, t]) for t in texts[row])
                gaps += [(float(scores[row, t]) - own) / abs(own) for t in texts[other]]
            if max(gaps) <= -margin:
                hardness[other] = max(gaps)
        found.append(hardness)
    return found


@pytest.mark.parametrize("directions", [("text_to_image",), ("image_to_text",), None])
def test_what_is_mined_is_what_loops_over_all_pairs_find(encoder, directions):
    rows = named_rows()
    given = {} if directions is None else {"directions": directions}
    found = mine_hard_negatives(encoder, rows, per_pair=4, margin=MARGIN, **given)
    numbers = row_of_key(found)
    wanted = expected(encoder, rows, MARGIN, directions or DIRECTIONS)
    assert sum(map(len, wanted)) > 40
    for own, want in zip(found[NEGATIVES], wanted, strict=True):
        values = [want[numbers[key]] for key in own]  # some are equal, in either order
        assert values == pytest.approx(sorted(want.values(), reverse=True)[:4], abs=1e-5)


def test_no_negative_has_the_identity_of_its_image_or_another_gallery(mined):
    numbers = row_of_key(mined)
    pairs = [(row, numbers[key]) for row, own in enumerate(mined[NEGATIVES]) for key in own]
    assert len(pairs) > 20
    for row, other in pairs:
        assert mined["image_id"][row] != mined["image_id"][other]
        assert mined["gallery"][row] == mined["gallery"][other]


def test_without_the_identity_the_same_images_would_be_mined(encoder, mined):
    apart = named_rows().remove_columns("image_id")
    apart = apart.add_column("image_id", [str(row) for row in range(len(apart))])
    apart = apart.select_columns(["image", "captions", "image_id", "gallery", "digest"])
    found = mine_hard_negatives(encoder, apart, per_pair=5, margin=MARGIN)
    numbers = row_of_key(found)
    same = [
        numbers[key]
        for row, own in enumerate(found[NEGATIVES])
        for key in own
        if mined["image_id"][row] == mined["image_id"][numbers[key]]
    ]
    assert same


def test_a_larger_margin_leaves_more_out(encoder):
    rows = named_rows()
    counts = [
        sum(map(len, mine_hard_negatives(encoder, rows, per_pair=9, margin=margin)[NEGATIVES]))
        for margin in (0.0, 0.2, 0.5)
    ]
    assert counts[0] > counts[1] > counts[2]


def test_mining_twice_and_from_shuffled_rows_finds_the_same(encoder, mined):
    rows = named_rows()
    again = mine_hard_negatives(encoder, rows, per_pair=5, margin=MARGIN)
    assert again[NEGATIVES][:] == mined[NEGATIVES][:]
    shuffled = mine_hard_negatives(encoder, rows.shuffle(seed=3), per_pair=5, margin=MARGIN)
    by_key = dict(zip(image_keys(shuffled), shuffled[NEGATIVES], strict=True))
    assert [by_key[key] for key in image_keys(mined)] == mined[NEGATIVES][:]


def test_mined_rows_are_mined_anew_and_a_retriever_mines_too(encoder, mined):
    retriever = PicoRetriever(encoder.model, tiny_processor(), show_progress=False)
    again = mine_hard_negatives(retriever, mined, per_pair=5, margin=MARGIN)
    assert again.column_names == mined.column_names
    assert again[NEGATIVES][:] == mined[NEGATIVES][:]


def test_a_short_list_finds_what_is_allowed_for_the_captions_of_the_image(encoder):
    """By captions alone, all entries that make an image a suspect are those of its candidates."""
    given = {"margin": 0.0, "directions": ("text_to_image",)}
    short = mine_hard_negatives(encoder, named_rows(), depth=6, **given)
    numbers, allowed = row_of_key(short), expected(encoder, named_rows(), *given.values())
    assert any(short[NEGATIVES])
    for own, wanted in zip(short[NEGATIVES], allowed, strict=True):
        assert {numbers[key] for key in own} <= wanted.keys()


def test_negatives_stay_right_if_rows_are_shuffled_left_out_or_saved(mined, tmp_path):
    mined.to_parquet(tmp_path / "mined.parquet")
    mined.save_to_disk(str(tmp_path / "folder"))
    whole = ImageTextDataset(mined)
    for rows in (
        mined.shuffle(seed=1),
        datasets.load_from_disk(str(tmp_path / "folder")),
        datasets.Dataset.from_parquet(str(tmp_path / "mined.parquet"), cache_dir=str(tmp_path)),
    ):
        split = ImageTextDataset(rows)
        assert split.negatives == whole.negatives  # both in canonical order
        assert split.identity == whole.identity
    some = mined.select(range(12))
    keys = image_keys(some)
    kept = ImageTextDataset(some).negatives
    assert 0 < sum(map(len, kept.numbers)) < sum(map(len, whole.negatives.numbers))
    for key, own in zip(kept.keys, kept.numbers, strict=True):
        names = [kept.keys[number] for number in own]
        assert names == [name for name in mined[NEGATIVES][keys.index(key)] if name in keys]


def test_a_pair_brings_the_first_of_its_negatives_that_is_not_there_yet():
    negatives = Negatives(["a", "b", "c", "d"], [[1, 2], [0, 3], [], [2]])
    for draw in map(str, range(20)):
        joined = negatives.joined([0, 1], draw)
        assert joined == [0, 1, 2, 3]
        assert negatives.joined([2], draw) == [2]
        assert negatives.joined([2, 3], draw) == [2, 3]
        assert set(negatives.joined([0], draw)) in ({0, 1}, {0, 2})
    assert len({tuple(negatives.joined([0], draw)) for draw in map(str, range(20))}) == 2


def test_images_of_one_identity_are_left_out_even_if_they_are_named(mined):
    facts = {name: mined[name][:] for name in mined.column_names if name != "image"}
    rows = mined.select_columns("image")
    for name, values in facts.items():
        if name == NEGATIVES:
            values = [image_keys(mined) for _ in values]
        rows = rows.add_column(name, values)
    split = ImageTextDataset(rows)
    names = [rows["image_id"][row] for row in split.image_order.tolist()]
    for number, own in enumerate(split.negatives.numbers):
        assert own
        assert names[number] not in [names[other] for other in own]


def batches_of(trainer) -> list[dict]:
    """Batches of one epoch."""
    return list(trainer.get_train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_a_mined_negative_of_every_pair(mined, tmp_path, workers):
    trainer = tiny_trainer(
        tmp_path,
        {"train_dataset": mined},
        per_device_train_batch_size=4,
        dataloader_num_workers=workers,
        **BARE,
    )
    seen = []
    trainer.data_collator = lambda rows: rows
    for rows in batches_of(trainer):
        split, pairs = trainer.train_dataset, rows[:4]
        ids = [row["image_ids"] for row in rows]
        assert 4 < len(rows) <= 8
        numbers = [number_of(split, row) for row in rows]
        assert len(set(numbers)) == len(numbers)
        for number, row in zip(numbers[:4], pairs, strict=True):
            own = split.negatives.numbers[number]
            assert not own or set(own) & set(numbers)
            assert row["image_ids"] not in [
                ids[place] for place, other in enumerate(numbers) if other in own
            ]
        seen += numbers[:4]
    assert sorted(seen) == list(range(24))  # an epoch is still every pair once


def number_of(split, row) -> int:
    """Which pair a row is."""
    pixels = row["image"].convert("RGB").tobytes()
    same = [n for n in range(len(split)) if split[n]["image"].convert("RGB").tobytes() == pixels]
    return same[0]


@pytest.mark.parametrize(
    ("loss", "frozen"),
    [("hinge", False), ("hinge", True), ("infonce", True), ("sigmoid", True)],
)
def test_every_loss_trains_with_negatives_and_a_resumed_run_equals_the_unbroken_one(
    mined, tmp_path, loss, frozen
):
    knobs = {**BARE, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    knobs |= {
        "save_total_limit": None,
        "freeze_encoder": frozen,
        "feature_cache_dir": str(tmp_path / "features"),
    }
    options = {"train_dataset": mined}
    model = tiny_model(loss=loss)
    whole = tiny_trainer(tmp_path, {**options, "model": model}, **knobs)
    assert whole.train().metrics["train_loss"] > 0
    after = {name: value.clone() for name, value in model.state_dict().items()}
    again = tiny_model(loss=loss)
    rest = tiny_trainer(tmp_path, {**options, "model": again}, **knobs)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in again.state_dict().items():
        assert torch.equal(value, after[name]), name
    plain = tiny_model(loss=loss)
    rows = {"train_dataset": mined.remove_columns(NEGATIVES), "model": plain}
    tiny_trainer(tmp_path / "plain", rows, **knobs).train()
    assert any(not torch.equal(value, after[name]) for name, value in plain.state_dict().items())


def test_a_run_with_other_negatives_is_not_resumed(encoder, mined, tmp_path):
    knobs = {**BARE, "save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, {"train_dataset": mined}, **knobs).train()
    other = mine_hard_negatives(encoder, mined, per_pair=1, margin=0.0)
    trainer = tiny_trainer(tmp_path, {"train_dataset": other}, **knobs)
    with pytest.raises(ValueError, match="another `train_dataset`"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"per_pair": 0}, "`per_pair` must be an integer >= 1, got 0"),
        ({"per_pair": True}, "`per_pair` must be an integer >= 1, got True"),
        ({"per_pair": 3, "depth": 2}, "`depth` must be an integer >= 3, got 2"),
        ({"margin": -0.1}, r"`margin` must be a share .* in \[0, 1\], got -0.1"),
        ({"margin": float("nan")}, r"`margin` must be a share .* in \[0, 1\], got nan"),
        ({"directions": "text_to_image"}, "`directions` must hold one or both"),
        ({"directions": ()}, "`directions` must hold one or both"),
    ],
)
def test_a_bad_argument_of_mining_is_one_clear_line(encoder, knobs, message):
    with pytest.raises(ValueError, match=message) as caught:
        mine_hard_negatives(encoder, named_rows(), **knobs)
    assert "\n" not in str(caught.value)


def test_images_with_a_caption_in_common_are_no_negatives_and_none_at_all_is_an_error(encoder):
    rows = tiny_rows(12).map(lambda row: {"captions": [*row["captions"], " A thing"]})
    with pytest.raises(ValueError, match="No image has a negative") as caught:
        mine_hard_negatives(encoder, rows, margin=0.0)
    assert "\n" not in str(caught.value)


def test_a_bare_model_cannot_mine():
    with pytest.raises(ValueError, match=r"`encoder` must be a PicoRetriever .* got PicoModel"):
        mine_hard_negatives(tiny_model(), named_rows())


def test_mined_rows_that_are_read_anew_do_not_lose_their_negatives_in_silence(mined, tmp_path):
    mined.to_parquet(tmp_path / "mined.parquet")
    with pytest.raises(ValueError, match="mined `negatives`, which are lost"):
        load_image_text(files=tmp_path / "mined.parquet")
    with pytest.raises(ValueError, match="mined `negatives`, which are lost"):
        ImageTextDataset(mined.add_column("more", [0] * len(mined)))
    with pytest.raises(ValueError, match="mined `negatives`, which are lost"):
        ImageTextStream(mined.to_iterable_dataset())


def test_a_trainer_refuses_negatives_that_name_none_of_its_rows(mined, tmp_path):
    rows = mined.remove_columns(NEGATIVES).add_column(NEGATIVES, [["gone"]] * len(mined))
    with pytest.raises(ValueError, match="names none of its images"):
        tiny_trainer(tmp_path, {"train_dataset": rows}, **BARE)
