"""Resuming is loading: what a model's folder must not hold, a checkpoint must not hold either."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.stream import ImageTextStream
from tiny import tiny_processor, tiny_rows
from tiny_trainer import BARE, tiny_model, tiny_trainer

STEPS = {**BARE, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


class MustNotRun:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle file was opened",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_trainer(folder, **STEPS).train()
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A checkpoint that may be damaged."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run" / "checkpoint-2"


def refusal(checkpoint: Path, options: dict | None = None, error=ValueError, **knobs) -> str:
    """The message, one line, of a run that must not go on, and whose model must stay as it was."""
    trainer = tiny_trainer(checkpoint.parent.parent, options, **{**STEPS, **knobs})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(error) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    message = str(caught.value)
    assert "\n" not in message
    assert "weights_only" not in message
    return message


def edit_state(checkpoint: Path, **changes) -> None:
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("beside", [True, False])
def test_pickled_weights_are_refused_unopened(checkpoint, beside):
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(MustNotRun()))
    if not beside:
        (checkpoint / "model.safetensors").unlink()
    assert "There is" in (message := refusal(checkpoint, error=OSError))
    assert "pytorch_model.bin" in message


def test_a_missing_tensor_is_refused_by_name(checkpoint):
    path = checkpoint / "model.safetensors"
    lost = "encoder.visual_projection.weight"
    rest = {name: value for name, value in load_file(path).items() if name != lost}
    save_file(rest, path, metadata={"format": "pt"})
    assert f"it lacks `{lost}`" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["prototypes.text", "more"])
def test_a_tensor_that_does_not_fit_is_refused_by_name(checkpoint, name):
    path = checkpoint / "model.safetensors"
    save_file({**load_file(path), name: torch.ones(2, 2)}, path, metadata={"format": "pt"})
    assert f"`{name}`. Resume with the model" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "..\\x.safetensors"])
def test_an_index_that_leads_out_of_the_checkpoint_is_refused(checkpoint, name):
    weights = checkpoint / "model.safetensors"
    (checkpoint.parent / "x.safetensors").write_bytes(weights.read_bytes())
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), name)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.unlink()
    manifest = checkpoint / "pico_checkpoint.json"
    facts = json.loads(manifest.read_text())
    del facts["files"]["model.safetensors"]
    manifest.write_text(json.dumps(facts))
    assert "inside the model's own folder" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["code", "cut short"])
def test_other_states_that_are_no_numbers_are_refused_unopened(checkpoint, name, damage):
    path = checkpoint / name
    if damage == "code":
        torch.save(MustNotRun(), path)
    else:
        path.write_bytes(path.read_bytes()[:200])
    assert f"{name} of the checkpoint" in refusal(checkpoint)


def test_a_best_checkpoint_outside_of_the_run_is_refused(checkpoint, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("other") / "checkpoint-9"
    shutil.copytree(checkpoint, elsewhere)
    edit_state(checkpoint, best_model_checkpoint=str(elsewhere))
    assert f"names '{elsewhere}', which is outside of the run's own" in refusal(checkpoint)
    edit_state(checkpoint, best_model_checkpoint=str(checkpoint / ".." / ".." / ".." / "x"))
    (checkpoint / ".." / ".." / ".." / "x").mkdir()
    assert "outside of the run's own folder" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["global_step", "best_global_step"])
def test_a_step_that_is_a_path_is_refused(checkpoint, name):
    edit_state(checkpoint, **{name: "1/../../x"})
    assert f"`{name}` in trainer_state.json" in refusal(checkpoint)


def test_a_state_that_is_no_json_is_refused(checkpoint):
    (checkpoint / "trainer_state.json").write_text("{")
    assert "trainer_state.json is not valid JSON" in refusal(checkpoint)


def test_another_estimator_is_refused(checkpoint):
    message = refusal(checkpoint, {"model": tiny_model(estimators=["style"])})
    assert (
        "was written with estimators=['style', 'canonical', 'pooled'], this run has ['style']"
        in message
    )


@pytest.mark.parametrize("told", [True, False])
def test_a_run_without_special_tokens_does_not_go_on_with_them(checkpoint, told):
    manifest = checkpoint / "pico_checkpoint.json"
    values = json.loads(manifest.read_text())
    assert values["keep_special_tokens"] is False
    if not told:  # as in checkpoints from before they could be kept
        del values["keep_special_tokens"]
        manifest.write_text(json.dumps(values))
    message = refusal(checkpoint, {"model": tiny_model(keep_special_tokens=True)})
    assert "was written with keep_special_tokens=False, this run has True" in message


def test_a_checkpoint_from_before_special_tokens_could_be_kept_goes_on(checkpoint):
    manifest = checkpoint / "pico_checkpoint.json"
    values = json.loads(manifest.read_text())
    del values["keep_special_tokens"]
    manifest.write_text(json.dumps(values))
    trainer = tiny_trainer(checkpoint.parents[1])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 3


def other_captions():
    rows = tiny_rows(24)
    captions = [["a red disc"], *rows["captions"][1:]]
    return rows.remove_columns("captions").add_column("captions", captions)


@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
def test_other_data_are_refused(checkpoint, split):
    message = refusal(checkpoint, {split: other_captions()})
    assert f"another `{split}`: other images or captions" in message


def test_the_same_data_in_another_order_are_the_same(checkpoint, trained):
    options = {"train_dataset": tiny_rows(24).select(range(23, -1, -1))}
    trainer = tiny_trainer(checkpoint.parent.parent, options, **STEPS)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    done = load_file(trained / "run" / "checkpoint-3" / "model.safetensors")
    for name, value in done.items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_the_identity_of_data_goes_by_content_identity_and_gallery():
    rows = tiny_rows(4)
    one = ImageTextDataset(rows).identity
    assert ImageTextDataset(rows.select([3, 1, 0, 2])).identity == one
    assert ImageTextDataset(rows.select(range(3))).identity != one
    more = rows.add_column("name", ["a", "b", "c", "c"])
    named = ImageTextDataset(more, image_id_column="name").identity
    grouped = ImageTextDataset(more, gallery_column="name").identity
    assert len({one, named, grouped}) == 3
    stream = ImageTextStream(rows.to_iterable_dataset()).identity
    assert ImageTextStream(rows.to_iterable_dataset()).identity == stream
    assert ImageTextStream(rows.select([3, 1, 0, 2]).to_iterable_dataset()).identity != stream


def test_a_checkpoint_of_the_model_alone_is_not_resumed_from(tmp_path):
    tiny_trainer(tmp_path, save_only_model=True, **STEPS).train()
    assert "`save_only_model=True`" in refusal(tmp_path / "run" / "checkpoint-2")


def test_a_checkpoint_is_no_file_and_no_repository(tmp_path):
    assert "which is no folder" in refusal(tmp_path / "run" / "org")


def test_a_damaged_best_checkpoint_is_refused_at_the_end(tmp_path):
    trainer = tiny_trainer(tmp_path, num_train_epochs=1, save_total_limit=None)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    (best / "model.safetensors").rename(best / "pytorch_model.bin")
    with pytest.raises(OSError, match="Pickle files"):
        trainer._load_best_model()


def test_a_stream_is_resumed_and_another_one_refused(tmp_path):
    def trainer(rows):
        options = {"train_dataset": rows.to_iterable_dataset()}
        options["processing_class"] = tiny_processor()
        return tiny_trainer(tmp_path, options, max_steps=3, **STEPS)

    trainer(tiny_rows(24)).train()
    trainer(tiny_rows(24)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="another `train_dataset`"):
        trainer(other_captions()).train(resume_from_checkpoint=True)
