"""Training on a stream: like a split, with exact resume, and clear lines for what it cannot do."""

import io
import tarfile
from itertools import islice

import datasets
import pytest
import torch

from pico_hf import ImageTextStream
from pico_hf.training.feedback_log import logged_refinements
from tiny import tiny_rows
from tiny_trainer import BARE, tiny_trainer


def stream(images: int = 24, shards: int = 2) -> datasets.IterableDataset:
    return tiny_rows(images).to_iterable_dataset(num_shards=shards)


def taken(pairs, number: int) -> list[tuple[str, int]]:
    return [(pair["caption"], pair["image_ids"]) for pair in islice(iter(pairs), number)]


def test_a_stream_gives_one_caption_per_image_and_begins_anew():
    pairs = taken(ImageTextStream(stream(12)), 36)
    rows = tiny_rows(12)
    for place, (caption, number) in enumerate(pairs):
        assert caption in rows[place % 12]["captions"]
        assert number == pairs[place % 12][1]
    passes = [[caption for caption, _ in pairs[start : start + 12]] for start in (0, 12, 24)]
    assert passes[0] != passes[1] or passes[1] != passes[2]
    assert pairs == taken(ImageTextStream(stream(12)), 36)


def test_passes_of_a_shuffled_stream_differ_and_are_always_alike():
    def shuffled():
        return ImageTextStream(stream(24).shuffle(seed=3, buffer_size=8))

    numbers = [number for _, number in taken(shuffled(), 48)]
    assert numbers[:24] != numbers[24:]
    assert sorted(numbers[:24]) == sorted(numbers[24:])
    assert taken(shuffled(), 48) == taken(shuffled(), 48)


def test_equal_images_and_equal_names_are_one_identity():
    rows = tiny_rows(4)
    twice = datasets.concatenate_datasets([rows, rows]).to_iterable_dataset()
    numbers = [number for _, number in taken(ImageTextStream(twice), 8)]
    assert numbers[:4] == numbers[4:]
    assert len(set(numbers)) == 4
    named = rows.add_column("thing", ["one", "two", "one", None]).to_iterable_dataset()
    numbers = [n for _, n in taken(ImageTextStream(named, image_id_column="thing"), 4)]
    assert numbers[0] == numbers[2]
    assert len(set(numbers)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_on_a_stream_equals_the_unbroken_one(tmp_path, workers):
    def build(name):
        options = {"train_dataset": stream().shuffle(seed=1, buffer_size=8)}
        knobs = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
        knobs |= {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": False}
        return tiny_trainer(tmp_path / name, options, dataloader_num_workers=workers, **knobs)

    unbroken, resumed = build("one"), build("two")
    unbroken.train()  # 24 pairs: the fourth step begins a second pass
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-5")
    assert int(unbroken.model.prototypes.iteration) >= 18
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_training_on_a_stream_is_training_on_its_rows(tmp_path):
    single = tiny_rows(24).map(lambda row: {"captions": row["captions"][:1]})
    knobs = {"max_steps": 3, "per_device_train_batch_size": 24, "prototype_warmup_epochs": 0.0}
    losses = []
    for rows in (single, single.to_iterable_dataset()):
        trainer = tiny_trainer(tmp_path, {"train_dataset": rows}, **knobs, **BARE)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_warm_up_on_a_stream_is_a_tenth_of_the_run_unless_it_is_given(tmp_path):
    def warmup(**knobs):
        options = {"train_dataset": stream()}
        return tiny_trainer(tmp_path, options, max_steps=2, **knobs).args.prototype_warmup_epochs

    assert (warmup(), warmup(prototype_warmup_epochs=1.0)) == (0.1, 1.0)


def test_canonical_columns_come_from_the_first_pairs_of_a_stream(tmp_path):
    model_of = {}
    for name, rows in (("stream", stream(24)), ("split", tiny_rows(12))):
        trainer = tiny_trainer(tmp_path, {"train_dataset": rows}, max_steps=2, alignment_images=12)
        trainer.construct_prototypes()
        model_of[name] = trainer.pico_model
    weights = [model.column_weights for model in model_of.values()]
    assert weights[0].std() > 0
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-4)


def test_style_prototypes_are_refined_on_a_stream(tmp_path):
    from tiny_trainer import tiny_model

    options = {"train_dataset": stream(), "model": tiny_model(estimators=["style"], probe_size=64)}
    knobs = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    trainer = tiny_trainer(tmp_path, options, **knobs)
    trainer.train()
    assert trainer.pico_model.config.probe_size == 24
    assert [e["step"] for e in logged_refinements(trainer.state.log_history)] == [2, 4]


def test_webdataset_archives_are_streamed(tmp_path):
    with tarfile.open(tmp_path / "pairs.tar", "w") as archive:
        for number, row in enumerate(tiny_rows(16)):
            file = io.BytesIO()
            row["image"].save(file, "PNG")
            parts = {"png": file.getvalue(), "txt": row["captions"][0].encode()}
            for kind, content in parts.items():
                member = tarfile.TarInfo(f"{number:04}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    rows = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "pairs.tar"), split="train", streaming=True
    )
    pairs = taken(ImageTextStream(rows), 16)
    assert [caption for caption, _ in pairs] == [row["captions"][0] for row in tiny_rows(16)]
    trainer = tiny_trainer(tmp_path, {"train_dataset": rows}, max_steps=2, **BARE)
    assert trainer.train().global_step == 2


@pytest.mark.parametrize(
    ("options", "knobs", "message"),
    [
        ({"train_dataset": stream()}, {}, "`max_steps` must be given for a stream"),
        (
            {"train_dataset": stream()},
            {"max_steps": 2, "freeze_encoder": True},
            "a stream has no end. Leave it out",
        ),
        ({"eval_dataset": stream()}, {}, "Ranking needs all rows of a split"),
        (
            {"train_dataset": datasets.IterableDatasetDict(train=stream())},
            {"max_steps": 2},
            r"got a IterableDatasetDict of train. Pass one of them, such as `data\['train",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_said_when_the_trainer_is_built(
    tmp_path, options, knobs, message
):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, options, **knobs)


def test_a_missing_column_and_an_empty_stream_are_refused():
    with pytest.raises(ValueError, match="Did you mean `captions`"):
        ImageTextStream(stream(), caption_column="caption")
    with pytest.raises(ValueError, match="The stream has no rows"):
        ImageTextStream(stream().take(0))


def test_a_row_without_an_image_is_named():
    rows = [{"image": None, "caption": "a"}, {"image": None, "caption": "b"}]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    empty = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    with pytest.raises(ValueError, match="Row 0 of the stream has no image"):
        taken(ImageTextStream(empty), 1)
