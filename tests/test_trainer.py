"""Training, feedback, evaluation, the best model, and exact resume."""

import datasets
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from pico_hf import PicoModel
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.training.encoding import SplitEncoder
from pico_hf.training.evaluation import evaluate_retrieval
from pico_hf.training.feedback_log import logged_refinements
from pico_hf.training.trials import DevTrials, trial_part
from tiny import refine, tiny_inputs, tiny_rows


def in_galleries(names: list[str], captions: int = 1) -> ImageTextDataset:
    """A picture per name, to be ranked with those of the same name."""
    same = {"image": [Image.new("RGB", (2, 2))], "captions": [["a"] * captions]}
    rows = {key: value * len(names) for key, value in same.items()}
    numbers = [str(n) for n in range(len(names))]
    return ImageTextDataset(
        datasets.Dataset.from_dict({**rows, "image_id": numbers, "gallery": names})
    )


def history(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_refinements_happen_between_an_evaluation_and_the_next_step(make_trainer):
    trainer = make_trainer()
    trainer.train()
    steps = [e["step"] for e in logged_refinements(trainer.state.log_history)]
    assert steps == [4, 8]  # after the first and second epoch, never after the last
    for key in ("feedback", "weight_std", "weight_min", "weight_max", "fused_weight"):
        assert len(history(trainer, f"pico_style_{key}")) == 2


def test_feedback_starts_from_what_the_last_evaluation_scored(make_trainer, monkeypatch):
    trainer, seen = make_trainer(), []
    call = DevTrials.__call__
    monkeypatch.setattr(DevTrials, "__call__", lambda s, f: seen.append(call(s, f)) or seen[-1])
    trainer.train()
    gains = history(trainer, "pico_style_feedback")
    for number, scored in enumerate(history(trainer, "eval_rsum")[:2]):
        there, proposed = seen[3 * number : 3 * number + 2]
        assert there == pytest.approx(scored)
        assert gains[number] == pytest.approx(proposed - there)


def test_the_base_model_keeps_uniform_weights(make_trainer):
    trainer = make_trainer(refine_prototypes=False)
    trainer.train()
    assert trainer.pico_model.semantic_probability.tolist() == [1.0] * 16
    assert logged_refinements(trainer.state.log_history) == []


def test_the_warm_up_lasts_as_long_as_it_is_told(make_trainer):
    trainer = make_trainer(prototype_warmup_epochs=2.0)
    trainer.train()
    assert [e["step"] for e in logged_refinements(trainer.state.log_history)] == [8]


def test_the_best_model_at_the_end_is_exactly_the_one_that_scored(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert trainer.state.best_metric == max(history(trainer, "eval_rsum"))
    assert trainer.evaluate()["eval_rsum"] == trainer.state.best_metric


def test_a_trained_folder_loads_as_the_model_that_was_trained(make_trainer):
    trainer = make_trainer(num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    again = PicoModel.from_pretrained(trainer.args.output_dir)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("encoder", ["clip", "vit+bert", "swin+bert"])
def test_a_resumed_run_equals_the_unbroken_one(make_trainer, encoder, freeze):
    unbroken = make_trainer(encoder, freeze_encoder=freeze, load_best_model_at_end=False)
    unbroken.train()
    resumed = make_trainer(encoder, freeze_encoder=freeze, load_best_model_at_end=False)
    folder = f"{unbroken.args.output_dir}/checkpoint-8"
    resumed.train(resume_from_checkpoint=folder)
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_run_resumed_in_the_middle_of_an_epoch_equals_the_unbroken_one(make_trainer):
    knobs = {"save_strategy": "steps", "save_steps": 6, "load_best_model_at_end": False}
    unbroken = make_trainer(**knobs)
    unbroken.train()
    resumed = make_trainer(**knobs)
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-6")
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_evaluating_another_split_changes_nothing(make_trainer):
    trainer = make_trainer()
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    metrics = trainer.evaluate(tiny_rows(16), metric_key_prefix="test")
    assert "test_rsum" in metrics
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_metrics_are_those_of_the_whole_split(make_trainer):
    trainer = make_trainer(per_device_eval_batch_size=5)
    metrics = trainer.evaluate()
    encoder = SplitEncoder(trainer.pico_model, trainer.data_collator, 12, disable_tqdm=True)
    whole = evaluate_retrieval(trainer.pico_model, encoder.split(trainer.eval_dataset))
    for name, value in whole.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value)
    assert whole["rsum"] == pytest.approx(
        sum(metrics[f"eval_{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10))
    )


def test_galleries_are_ranked_by_themselves_and_averaged(make_trainer):
    trainer = make_trainer()
    rows = ImageTextDataset(tiny_rows(12))
    encoder = SplitEncoder(trainer.pico_model, trainer.data_collator, disable_tqdm=True)
    rows.gallery = torch.arange(12) % 2
    together = evaluate_retrieval(trainer.pico_model, encoder.split(rows))
    halves = []
    for part in (0, 1):
        half = ImageTextDataset(tiny_rows(12).select(range(part, 12, 2)))
        halves.append(evaluate_retrieval(trainer.pico_model, encoder.split(half))["rsum"])
    assert together["rsum"] == pytest.approx(sum(halves) / 2)


def test_several_dev_splits_are_told_apart_and_the_first_gives_feedback(make_trainer):
    trainer = make_trainer(load_best_model_at_end=False, metric_for_best_model=None)
    trainer.eval_dataset = {
        "seen": trainer.eval_dataset,
        "unseen": ImageTextDataset(tiny_rows(16)),
    }
    trainer.train()
    assert trainer.feedback.metric == "eval_seen_rsum"
    assert len(history(trainer, "eval_unseen_rsum")) == 3
    assert len(history(trainer, "pico_style_feedback")) == 2


def test_frozen_towers_are_run_once_and_give_the_same_scores(make_trainer):
    frozen = make_trainer(freeze_encoder=True)
    live = make_trainer(folder="other")
    assert "text_hidden_states" in frozen.train_dataset[0]
    assert frozen.evaluate()["eval_rsum"] == pytest.approx(live.evaluate()["eval_rsum"], abs=9)
    calls = []
    frozen.pico_model.encoder.vision_model.register_forward_hook(lambda *_: calls.append(1))
    frozen.train()
    assert not calls


def test_a_second_run_finds_the_cached_features(make_trainer):
    first = make_trainer(freeze_encoder=True)
    folder = first.train_dataset.folder
    stamp = (folder / "images" / "tokens.f16").stat().st_mtime_ns
    assert make_trainer(freeze_encoder=True).train_dataset.folder == folder
    assert (folder / "images" / "tokens.f16").stat().st_mtime_ns == stamp


def test_gradient_accumulation_leaves_the_loss_a_mean(make_trainer):
    one = make_trainer(max_steps=1, prototype_warmup_epochs=0.0)
    two = make_trainer(
        max_steps=1,
        prototype_warmup_epochs=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        folder="other",
    )
    for trainer in (one, two):
        assert trainer.model_accepts_loss_kwargs is False
        trainer.train()
    assert history(two, "loss")[0] < 1.5 * history(one, "loss")[0]


def test_towers_learn_more_slowly_than_heads(make_trainer):
    trainer = make_trainer(learning_rate=1e-2)
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"]
    named = dict(trainer.model.named_parameters())
    assert rates[id(named["encoder.visual_projection.weight"])] == 1e-2
    tower = next(p for n, p in named.items() if "vision_model.encoder.layers" in n)
    assert rates[id(tower)] == pytest.approx(1e-3)


def test_canonical_columns_are_aligned_once_when_training_is_over(make_trainer):
    trainer = make_trainer(estimators=["canonical", "pooled"])
    trainer.train()
    found = logged_refinements(trainer.state.log_history)
    assert history(trainer, "pico_canonical_iteration") == list(range(1, 19))
    assert len(history(trainer, "pico_pooled_iteration")) == 2 * 7  # before them and after them
    assert {entry["step"] for entry in found} == {12}
    gains = history(trainer, "pico_canonical_feedback")
    assert trainer.pico_model.column_weights.std() > 0 or max(gains) < 0


def test_training_with_canonical_columns_is_that_of_the_base_until_then(make_trainer):
    aligned = make_trainer(estimators=["canonical", "pooled"], load_best_model_at_end=False)
    base = make_trainer(refine_prototypes=False, load_best_model_at_end=False, folder="base")
    for trainer in (aligned, base):
        trainer.train()
    for name, value in base.pico_model.encoder.state_dict().items():
        assert torch.equal(value, aligned.pico_model.encoder.state_dict()[name]), name


def test_the_aligned_model_is_scored_and_never_below_its_own_columns(make_trainer):
    trainer = make_trainer(estimators=["canonical", "pooled"])
    trainer.train()
    scores = history(trainer, "eval_rsum")
    assert len(scores) == 4  # three epochs, then the aligned model
    assert scores[-1] >= trainer.state.best_metric - 1e-6
    assert trainer.evaluate()["eval_rsum"] == pytest.approx(scores[-1])


def test_the_page_of_an_aligned_run_tells_the_aligned_scores(make_trainer):
    from pico_hf.cards.publishing import run_facts

    trainer = make_trainer(estimators=["canonical", "pooled"])
    trainer.train()
    facts = run_facts(trainer.pico_model, trainer.args, trainer.state, "run", best=True)
    assert facts.results["dev"]["PICO"]["rsum"] == history(trainer, "eval_rsum")[-1]
    assert facts.arguments["step"] == trainer.state.best_global_step
    assert len(facts.refinements) == 18 + 2 * 7


def test_a_resumed_run_is_aligned_as_the_unbroken_one(make_trainer):
    knobs = {"estimators": ["canonical", "pooled"], "load_best_model_at_end": False}
    unbroken, resumed = make_trainer(**knobs), make_trainer(**knobs)
    unbroken.train()
    resumed.train(resume_from_checkpoint=f"{unbroken.args.output_dir}/checkpoint-8")
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_an_encoder_is_aligned_as_it_is_without_any_training(make_trainer):
    trainer = make_trainer(
        estimators=["canonical", "pooled"], freeze_encoder=True, alignment_images=20
    )
    before = trainer.evaluate()["eval_rsum"]
    encoder = {k: v.clone() for k, v in trainer.pico_model.encoder.state_dict().items()}
    trainer.construct_prototypes()
    assert trainer.evaluate()["eval_rsum"] >= before
    for name, value in trainer.pico_model.encoder.state_dict().items():
        assert torch.equal(value, encoder[name]), name


def test_trials_rank_so_many_images_as_have_a_million_and_a_quarter_pairs():
    assert len(trial_part(in_galleries(["one"] * 1200))) == 1118  # 1118² = 1.25 million
    assert len(trial_part(in_galleries(["one", "two", "three", "four"] * 600))) == 2236  # 4 · 559²
    assert len(trial_part(in_galleries(["one"] * 1000, captions=5))) == 500
    small = in_galleries([str(n) for n in range(50)] * 10)
    assert trial_part(small) is small


def test_a_part_drawn_from_styles_that_take_turns_has_all_of_them():
    part = in_galleries([str(n % 5) for n in range(100)]).sample(20)
    assert len(part.gallery.unique()) == 5


def test_galleries_too_small_to_tell_anything_are_warned_of(make_trainer, caplog):
    make_trainer(dev=in_galleries(["one", "two", "three", "four"] * 3))
    assert "Half of the galleries of `eval_dataset` have no more than 3 images" in caplog.text


def test_without_pairs_there_are_no_canonical_columns(make_trainer):
    trainer = make_trainer(estimators=["canonical", "pooled"])
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="Pass `train_dataset`"):
        trainer.construct_prototypes()


def test_a_run_without_a_dev_split_keeps_uniform_weights_and_says_so(make_trainer, caplog):
    no_dev = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trainer = make_trainer(estimators=["canonical", "pooled"], dev=None, **no_dev)
    trainer.train()
    assert "no `eval_dataset` to tell what canonical columns bring" in caplog.text
    assert trainer.pico_model.column_weights.tolist() == [1.0] * 16
    trainer.construct_prototypes()  # asked for by name: every candidate counts alike
    assert trainer.pico_model.column_weights.std() > 0


def test_a_trainer_of_few_pairs_leaves_an_aligned_model_as_it_is(make_trainer):
    model = make_trainer(estimators=["canonical", "pooled"]).pico_model
    model.config.probe_size = 1024  # more than there are pairs
    inputs = tiny_inputs()
    with torch.no_grad():
        images = model.encode_images(inputs["pixel_values"])
        texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
    refine(model, images, texts)
    weights = model.column_weights.clone()
    make_trainer(estimators=["canonical", "pooled"], model=model)
    assert weights.std() > 0
    assert torch.equal(model.column_weights, weights)


def test_other_callbacks_find_the_model_aligned_when_training_ends(make_trainer):
    seen = []

    class Uploads(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            seen.append(int(model.prototypes.iteration))

    trainer = make_trainer(estimators=["canonical", "pooled"], callbacks=[Uploads()])
    trainer.train()
    assert seen[0] > 0


def test_constructing_again_is_never_worse(make_trainer):
    trainer = make_trainer(estimators=["style", "canonical", "pooled"])
    scores = [trainer.evaluate()["eval_rsum"]]
    for _ in range(2):
        trainer.construct_prototypes()
        scores.append(trainer.evaluate()["eval_rsum"])
    assert scores == sorted(scores)


def test_style_is_refined_on_the_way_and_columns_are_aligned_at_the_end(make_trainer):
    trainer = make_trainer(estimators=["style", "canonical", "pooled"])
    trainer.train()
    steps = {}
    for entry in logged_refinements(trainer.state.log_history):
        steps.setdefault(entry["source"], set()).add(entry["step"])
    assert steps == {"style": {4, 8}, "canonical": {12}, "pooled": {12}}
    assert trainer.evaluate()["eval_rsum"] >= trainer.state.best_metric - 1e-6


def test_a_number_of_images_to_align_with_is_checked(make_trainer):
    with pytest.raises(ValueError, match="`alignment_images` must be >= 2, got 1"):
        make_trainer(alignment_images=1)


def test_a_dev_split_of_fewer_than_ten_images_is_refused(make_trainer):
    with pytest.raises(ValueError, match="`eval_dataset` must have at least 10 images, got 9"):
        make_trainer(dev=9)


def test_a_batch_of_one_is_refused(make_trainer):
    with pytest.raises(ValueError, match="`per_device_train_batch_size` must be >= 2, got 1"):
        make_trainer(per_device_train_batch_size=1)


def test_a_training_split_smaller_than_a_batch_is_refused(make_trainer):
    with pytest.raises(ValueError, match="at least one batch of 8 images, got 7"):
        make_trainer(images=7)
