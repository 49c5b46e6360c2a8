"""Every argument of transformers is honoured, refused by name, or listed as meaningless."""

import dataclasses
import inspect
import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import Trainer, TrainingArguments

from pico_hf import PicoTrainer, PicoTrainingArguments
from pico_hf.training.refusals import REFUSED, check_arguments
from tiny import tiny_encoder, tiny_processor, tiny_rows
from tiny_trainer import BARE, tiny_args, tiny_model, tiny_trainer

TABLE = Path(__file__).parents[1] / "docs" / "training_arguments.md"
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", re.MULTILINE)
METHODS = ("__init__", "train", "evaluate", "predict")
# A value of each refused argument that somebody may set.
WRONG = {
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "batch_eval_metrics": True,
    "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": "all",
    "train_sampling_strategy": "group_by_length",
    "remove_unused_columns": True,
    "parallelism_config": object(),
}


def sections() -> dict[str, dict[str, tuple[str, str]]]:
    """Heading → argument → (what happens, why)."""
    parts = re.split(r"^## (.*)$", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        heading: {name: (status, why) for name, status, why in ROW.findall(body)}
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def here(row: tuple[str, str]) -> bool:
    """Whether the transformers that is installed is new enough to have the row's argument."""
    since = re.match(r"since transformers ([\d.]+);", row[1])
    return since is None or Version(transformers.__version__) >= Version(since.group(1))


def parameters(method: str) -> set[str]:
    return set(inspect.signature(getattr(Trainer, method)).parameters) - {"self"}


def test_the_table_lists_every_field_of_the_arguments_and_no_other():
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name for field in dataclasses.fields(PicoTrainingArguments)} - stock
    assert {name for name, row in sections()["TrainingArguments"].items() if here(row)} == stock
    assert set(sections()["PicoTrainingArguments adds"]) == ours


@pytest.mark.parametrize("method", METHODS)
def test_the_table_lists_every_parameter_of_the_trainer_and_no_other(method):
    heading = "PicoTrainer(…)" if method == "__init__" else f"PicoTrainer.{method}(…)"
    assert set(sections()[heading]) == parameters(method)


def test_every_row_says_one_of_three_things_and_the_refused_ones_say_why():
    rows = [row for section in sections().values() for row in section.items()]
    assert {status for _, (status, _) in rows} == {"honoured", "refused", "meaningless"}
    refused = {name: why for name, (status, why) in rows if status == "refused"}
    assert refused == {name: refusal.reason for name, refusal in REFUSED.items()}
    assert all(why for _, (status, why) in rows if status == "meaningless")


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_argument_is_named_with_the_reason_of_the_table(tmp_path, name):
    args = tiny_args(tmp_path)
    setattr(args, name, WRONG[name])
    with pytest.raises(ValueError, match=re.escape(REFUSED[name].reason)) as error:
        tiny_trainer(tmp_path, {"args": args})
    assert str(error.value).startswith(f"`{name}` cannot be ")


def test_no_argument_of_the_defaults_is_refused(tmp_path):
    args = PicoTrainingArguments(str(tmp_path), use_cpu=True)
    check_arguments(args)
    assert [args.eval_strategy, args.save_strategy] == ["epoch", "epoch"]


# ---- refusals that depend on more than one argument ---------------------------------------


@pytest.mark.parametrize(
    ("options", "knobs", "message"),
    [
        (
            {"args": TrainingArguments("o", use_cpu=True)},
            {},
            "`args` must be PicoTrainingArguments",
        ),
        ({"model": tiny_encoder()}, {}, "`model` must be a PicoModel, got CLIPModel"),
        ({"model": None}, {}, "Pass either `model` or `model_init`"),
        ({"model_init": tiny_model, "model": tiny_model()}, {}, "and not both"),
        ({"model_init": tiny_model}, {"freeze_encoder": True}, "Pass `model`, or leave"),
        (
            {"train_dataset": datasets.DatasetDict(train=tiny_rows(8), test=tiny_rows(8))},
            {},
            r"one split, got a DatasetDict of train, test. Pass one of them, such as `data\['train",
        ),
        ({"eval_dataset": {}}, {}, "`eval_dataset` must hold a split, got an empty dict"),
        ({"train_dataset": tiny_rows(1)}, {"dataloader_drop_last": False}, "at least 2 images"),
        ({"data_collator": list}, {"freeze_encoder": True}, "type has no `fingerprint`"),
        ({}, {"freeze_encoder": True, "neftune_noise_alpha": 5.0}, "does not run"),
        ({}, {"metric_for_best_model": "eval_loss"}, "Pass one of eval_i2t_r1, "),
        ({}, {"metric_for_best_model": "accuracy"}, "must be a metric of `eval_dataset`, got 'acc"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_when_the_trainer_is_built(
    tmp_path, options, knobs, message
):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, options, **knobs)


def test_several_gpus_in_one_process_are_refused_with_the_command_that_starts_several(tmp_path):
    args = tiny_args(tmp_path)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"sees 2 GPUs. .*torchrun --nproc_per_node 2 "):
        tiny_trainer(tmp_path, {"args": args})


def test_a_model_spread_over_several_gpus_is_not_taken_for_several_copies(tmp_path):
    args, model = tiny_args(tmp_path), tiny_model()
    args._n_gpu = 2
    model.hf_device_map = {"encoder": "cpu", "prototypes": "disk"}
    with pytest.raises(ValueError, match="sees 2 GPUs"):
        tiny_trainer(tmp_path, {"args": args, "model": model})


def test_an_optimizer_of_ones_own_has_its_own_rates(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`tower_learning_rate` does not reach an optimizer of"):
        tiny_trainer(
            tmp_path,
            {"model": model, "optimizers": (optimizer, None)},
            tower_learning_rate=1e-3,
        )


# ---- defaults that fit each other ---------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("epoch", "epoch", True)),
        ({"eval_strategy": "no"}, ("no", "epoch", False)),
        ({"save_strategy": "no"}, ("epoch", "no", False)),
        ({"save_strategy": "best"}, ("epoch", "best", True)),
        ({"eval_strategy": "steps", "eval_steps": 30}, ("steps", "steps", True)),
        ({"save_strategy": "steps", "save_steps": 30}, ("steps", "steps", True)),
        (
            {"save_strategy": "steps", "save_steps": 30, "load_best_model_at_end": False},
            ("epoch", "steps", False),
        ),
        ({"eval_strategy": "epoch", "save_strategy": "steps"}, ("epoch", "steps", False)),
        (
            {"eval_strategy": "steps", "eval_steps": 30, "save_steps": 40},
            ("steps", "steps", False),
        ),
    ],
)
def test_evaluation_saving_and_the_best_model_fit_what_was_given(tmp_path, given, expected):
    args = tiny_args(tmp_path, **given)
    assert (args.eval_strategy, args.save_strategy, args.load_best_model_at_end) == expected
    if expected[:2] == ("steps", "steps") and args.load_best_model_at_end:
        assert args.eval_steps == args.save_steps == 30


@pytest.mark.parametrize(
    ("name", "greater"), [("eval_rsum", True), ("i2t_median_rank", False), ("loss", False)]
)
def test_what_is_better_follows_from_the_metric(tmp_path, name, greater):
    assert tiny_args(tmp_path, metric_for_best_model=name).greater_is_better is greater
    chosen = tiny_args(tmp_path, metric_for_best_model=name, greater_is_better=not greater)
    assert chosen.greater_is_better is not greater


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_scheduler_that_follows_a_metric_knows_what_is_better(tmp_path, name):
    def mode(**knobs):
        return tiny_args(tmp_path, lr_scheduler_type=name, **knobs).lr_scheduler_kwargs["mode"]

    assert mode() == mode(metric_for_best_model=None) == "max"
    assert mode(metric_for_best_model="i2t_median_rank") == "min"
    assert mode(lr_scheduler_kwargs={"mode": "min"}) == "min"
    splits = {"seen": tiny_rows(12), "unseen": tiny_rows(16)}
    tiny_trainer(tmp_path, {"eval_dataset": splits}, lr_scheduler_type=name).train()
    with pytest.raises(ValueError, match="follows a metric of the dev split"):
        tiny_trainer(tmp_path, {"eval_dataset": None}, lr_scheduler_type=name)


def test_without_a_dev_split_the_defaults_train_without_evaluation(tmp_path):
    trainer = tiny_trainer(tmp_path, {"eval_dataset": None})
    assert (trainer.args.eval_strategy, trainer.args.load_best_model_at_end) == ("no", False)
    assert trainer.train().global_step == 3
    with pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
        tiny_trainer(tmp_path, {"eval_dataset": None}, eval_strategy="epoch")


def test_a_dict_of_dev_splits_is_chosen_by_its_first_split_and_the_arguments_stay(tmp_path):
    args = tiny_args(tmp_path, num_train_epochs=2)
    splits = {"seen": tiny_rows(12), "unseen": tiny_rows(16)}
    trainer = tiny_trainer(tmp_path, {"args": args, "eval_dataset": splits})
    assert trainer.args.metric_for_best_model == "eval_seen_rsum"
    assert args.metric_for_best_model == "eval_rsum"
    trainer.train()
    seen = [e["eval_seen_rsum"] for e in trainer.state.log_history if "eval_seen_rsum" in e]
    assert trainer.state.best_metric == max(seen[:2])
    assert trainer.state.best_model_checkpoint is not None


def test_a_metric_of_another_split_may_choose(tmp_path):
    splits = datasets.DatasetDict(seen=tiny_rows(12), unseen=tiny_rows(16))
    knobs = {"metric_for_best_model": "eval_unseen_i2t_r1"}
    trainer = tiny_trainer(tmp_path, {"eval_dataset": splits}, **knobs)
    trainer.train()
    unseen = [
        e["eval_unseen_i2t_r1"] for e in trainer.state.log_history if "eval_unseen_i2t_r1" in e
    ]
    assert trainer.state.best_metric == unseen[0]
    with pytest.raises(ValueError, match="Pass one of eval_seen_i2t_r1"):
        tiny_trainer(tmp_path, {"eval_dataset": splits}, metric_for_best_model="eval_other_rsum")


def test_a_learning_rate_of_nought_for_towers_is_a_choice(tmp_path):
    trainer = tiny_trainer(tmp_path, tower_learning_rate=0.0)
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {0.0, 1e-2}
    with pytest.raises(ValueError, match="`tower_learning_rate` must be >= 0, got -1"):
        tiny_args(tmp_path, tower_learning_rate=-1)


# ---- arguments that are honoured ----------------------------------------------------------


def test_an_optimizer_class_with_keywords_is_taken_with_its_own_rate(tmp_path):
    options = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})}
    trainer = tiny_trainer(tmp_path, options, **BARE)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.05}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert trainer.optimizer_cls_and_kwargs is options["optimizer_cls_and_kwargs"]


@pytest.mark.parametrize("name", ["adafactor", "sgd", "rmsprop", "adamw_torch"])
def test_any_optimizer_of_transformers_trains(tmp_path, name):
    knobs = {"max_steps": 1, "prototype_warmup_epochs": 0.0, "weight_decay": 0.0}
    trainer = tiny_trainer(tmp_path, optim=name, **knobs, **BARE)
    before = trainer.model.encoder.text_projection.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.encoder.text_projection.weight, before)


def test_a_last_batch_of_one_pair_has_a_loss_of_nought(tmp_path):
    options = {"train_dataset": tiny_rows(9), "eval_dataset": None}
    knobs = {"dataloader_drop_last": False, "prototype_warmup_epochs": 0.0}
    trainer = tiny_trainer(tmp_path, options, **knobs)
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[1] == 0.0 < losses[0]
    assert trainer.state.global_step == 2
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_batch_that_is_not_of_pairs_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    batch["input_ids"], batch["attention_mask"] = (
        batch["input_ids"][:1],
        batch["attention_mask"][:1],
    )
    batch["word_mask"] = batch["word_mask"][:1]
    with pytest.raises(ValueError, match="got 2 images and 1 texts"):
        trainer.compute_loss(trainer.model, batch)


def test_a_batch_size_is_found_that_fits(tmp_path):
    trainer = tiny_trainer(tmp_path, auto_find_batch_size=True, **BARE)
    sizes = limit_memory(trainer, pairs=4)
    trainer.train()
    assert sizes[0] == 8
    assert 2 <= sizes[-1] <= 4
    assert trainer.state.train_batch_size == sizes[-1]


def test_no_batch_size_without_negatives_is_found(tmp_path):
    trainer = tiny_trainer(tmp_path, auto_find_batch_size=True, **BARE)
    limit_memory(trainer, pairs=1)
    with pytest.raises(ValueError, match="`auto_find_batch_size` came down to one pair"):
        trainer.train()


def limit_memory(trainer, pairs: int) -> list[int]:
    """Makes batches of more pairs run out of memory; gives the sizes that were tried."""
    sizes = []

    def count(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > pairs:
            raise RuntimeError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    return sizes


def test_persistent_workers_do_not_score_the_first_split_again(tmp_path):
    trainer = tiny_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    other = tiny_rows(20).select(range(8, 20))
    assert len(trainer.get_eval_dataloader().dataset) == 12
    assert trainer.get_eval_dataloader(other).dataset[0]["caption"] in other[0]["captions"]


def test_features_of_an_evaluation_may_wait_in_the_memory_of_the_host(tmp_path):
    here = tiny_trainer(tmp_path, per_device_eval_batch_size=5)
    away = tiny_trainer(tmp_path, per_device_eval_batch_size=5, eval_accumulation_steps=1)
    assert (here.split_encoder.offload, away.split_encoder.offload) == (False, True)
    assert here.evaluate()["eval_rsum"] == away.evaluate()["eval_rsum"]


def test_noise_reaches_the_word_embeddings(tmp_path):
    knobs = {**BARE, "max_steps": 1, "prototype_warmup_epochs": 0.0}
    plain = tiny_trainer(tmp_path, **knobs)
    noisy = tiny_trainer(tmp_path, neftune_noise_alpha=50.0, **knobs)
    for trainer in (plain, noisy):
        trainer.train()
    assert plain.state.log_history[0]["grad_norm"] != noisy.state.log_history[0]["grad_norm"]


def test_a_compiled_model_trains_and_is_saved_as_the_plain_one(tmp_path):
    knobs = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    compiled = tiny_trainer(tmp_path, **knobs, **BARE)
    plain = tiny_trainer(tmp_path, max_steps=2, **BARE)
    for trainer in (plain, compiled):
        trainer.train()
    for name, value in plain.pico_model.state_dict().items():
        torch.testing.assert_close(compiled.pico_model.state_dict()[name], value, msg=name)


def test_a_loss_of_ones_own_is_a_mean_over_accumulated_batches(tmp_path):
    seen = []

    def constant(outputs, labels, num_items_in_batch=None):
        seen.append((labels, num_items_in_batch))
        return outputs.logits_per_image.sum() * 0 + 1.0

    knobs = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = tiny_trainer(tmp_path, {"compute_loss_func": constant}, **knobs, **BARE)
    trainer.train()
    assert seen == [(None, None)] * 2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "model_init", [tiny_model, lambda: tiny_model(), lambda trial: tiny_model()]
)
def test_a_model_is_made_when_it_is_needed(tmp_path, model_init):
    made = tiny_trainer(tmp_path, {"model_init": model_init})
    given = tiny_trainer(tmp_path)
    for trainer in (made, given):
        trainer.train()
    for name, value in given.model.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], value), name


def test_no_arguments_are_the_defaults_of_this_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = PicoTrainer(tiny_model(), processing_class=tiny_processor())
    assert trainer.args.per_device_train_batch_size == 128


def test_processes_look_for_parameters_that_no_loss_reaches(tmp_path):
    def handler(**knobs):
        trainer = tiny_trainer(tmp_path, gradient_checkpointing=True, **knobs)
        assert trainer.args.ddp_find_unused_parameters is knobs.get("ddp_find_unused_parameters")
        return trainer._build_accelerator_args()["kwargs_handlers"][0]

    assert handler().find_unused_parameters is True
    assert handler(ddp_find_unused_parameters=False).find_unused_parameters is False
