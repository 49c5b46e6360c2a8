"""`pico-hf train`, and the job behind it and behind `examples/run_pico.py`."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Failed, results_table
from pico_hf.cli.base_run import trained_base, uniform_weights, weighed_in_training
from pico_hf.cli.job_arguments import dataset_name, job_arguments

PANEL = "Models"
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
STOPPED = "The same command with --resume goes on from the newest checkpoint."
_FRIENDLY = {
    "encoder": "model_name_or_path",
    "output": "output_dir",
    "dev": "validation_file",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "freeze": "freeze_encoder",
    "lora": "use_lora",
    "push": "push_to_hub",
    "resume": "resume_from_checkpoint",
}

Results = dict[str, dict[str, dict[str, float]]]


def command(
    pairs: Annotated[
        list[str],
        typer.Argument(
            metavar="PAIRS",
            help="Tables of images and captions, an imagefolder, the name of a data set, or one "
            "YAML or JSON file of options.",
        ),
    ],
    encoder: Annotated[
        str | None, typer.Option(help="What is trained: a dual encoder or a Pico model.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the trained model.")] = None,
    dev: Annotated[
        str | None, typer.Option(help="Dev split; default: a tenth of the images, ten at least.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the pairs; default: 3.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pairs per step; default: 128.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the heads; default: 2e-4.")
    ] = None,
    freeze: Annotated[
        bool | None, typer.Option("--freeze", help="Train the projections only, which is fast.")
    ] = None,
    lora: Annotated[
        bool | None, typer.Option("--lora", help="Train an adapter of the towers; needs peft.")
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = None,
    push: Annotated[
        bool | None, typer.Option("--push", help="Upload the model to the Hub when it is done.")
    ] = None,
) -> Answer:
    """Train on your own pairs, and compare with the same network under equal column weights.

    pico-hf train pairs.csv --encoder openai/clip-vit-base-patch32 --output outputs/mine --freeze

    Every option of the Trainer and of examples/run_pico.py can be given too, by its full name, such
    as --num_train_epochs 5 --caption_column text. In a YAML or JSON file they stand under the same
    names; options of the command line come before it.
    """
    given: dict[str, Any] = {
        "encoder": encoder,
        "output": output,
        "dev": [dev] if dev else None,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "freeze": freeze,
        "lora": lora,
        "resume": resume,
        "push": push,
    }
    options = {_FRIENDLY.get(key, key): value for key, value in given.items() if value is not None}
    model_args, data_args, args = job_arguments(pairs, options)
    if not (model_args.model_name_or_path or model_args.vision_model):
        raise Failed(
            "Name what is to be trained by --encoder, such as openai/clip-vit-base-patch32."
        )
    if not (data_args.train_file or data_args.dataset_name):
        raise Failed("Name the pairs to train on: a table, a folder of images, or a data set.")
    logging.getLogger("pico_hf").setLevel(logging.INFO)
    short = [f"--{name}={value}" for name, value in options.items()]
    words = shlex.join(["pico-hf", "train", *pairs, *short])
    results = run_job(model_args, data_args, args, command=words)
    return Answer(
        {"output": args.output_dir, "results": results},
        [*results_table(results), f"Model, prototypes, model card and plots: {args.output_dir}"],
    )


# ---- the job -----------------------------------------------------------------------------------


def run_job(
    model_args: Any,
    data_args: Any,
    args: Any,
    *,
    command: str = "",
    commit: str = "",
    load_model: Callable[[Any], tuple[Any, Any]] | None = None,
    load_splits: Callable[[Any, int], tuple[Any, Mapping[str, Any]]] | None = None,
    dataset: str | None = None,
) -> Results:
    """Trains, compares PICO with the base, saves, and pushes if asked to.

    If no style prototypes were taken on the way, base and PICO are one network; else the base is
    trained beside it from the same start.

    Args:
        model_args: `ModelArguments`.
        data_args: `DataArguments`.
        args: `PicoTrainingArguments`.
        command: For the model card.
        commit: For the model card.
        load_model: From `model_args` to model and processor; None loads what they name.
        load_splits: From `data_args` and a seed to the training split and the validation splits,
            the dev split first; None loads what they name.
        dataset: Its name for the model card; None takes the named one's or that of the folder.

    Returns:
        Split → model → metrics; empty without `do_eval`.

    Raises:
        OSError: If something cannot be loaded or written.
        ValueError: If options do not fit together, or the data cannot be used.
    """
    from transformers import set_seed

    from pico_hf.cli.progress import show_short_log
    from pico_hf.core.state import MOST_POOLED
    from pico_hf.training.job_sources import load_job_model, load_job_splits
    from pico_hf.training.trainer import PicoTrainer

    if args.do_predict:
        raise ValueError(
            "There is no test split. Leave `do_predict` out, or name the split to be scored as "
            "`validation_file` with `do_eval`."
        )
    set_seed(args.seed)
    train, validation = (load_splits or load_job_splits)(data_args, args.seed)
    dev = next(iter(validation.values()))  # chooses checkpoints and feeds prototypes
    data: dict[str, Any] = {"train_dataset": train, "eval_dataset": dev}
    start = load_model or load_job_model
    model, data["processing_class"] = start(model_args)
    trainer = PicoTrainer(model, args, **data)
    show_short_log(trainer)
    share = trainer.pico_model.pooled_share
    results: Results = {}
    if args.do_train and args.do_eval and share == 1:
        _score(results, "encoder, before training", trainer, validation)
    if args.do_train:
        share = min(share, MOST_POOLED)  # of the base: as much as while it is trained
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        if data_args.compare_base and not weighed_in_training(trainer):
            with uniform_weights(trainer.pico_model, share):
                _score(results, "base", trainer, validation)
        elif data_args.compare_base:
            _score(
                results, "base", trained_base(trainer, start, model_args, args, data), validation
            )
        _score(results, "PICO", trainer, validation)
        trainer.save_metrics(
            "eval", {f"eval_{k}_rsum": v["PICO"]["rsum"] for k, v in results.items()}
        )
    if args.do_train and args.do_eval:
        about = {"command": command, "commit": commit, "dataset": dataset}
        _write_card(trainer, results, model_args, data_args, about)
        if args.push_to_hub:
            trainer.push_to_hub()
    return results


def _score(results: Results, name: str, trainer: Any, splits: Mapping[str, Any]) -> None:
    """Scores a model on every validation split, and the encoder in it once it is trained."""
    from pico_hf.cards.model_card import models_of_metrics

    for split, rows in splits.items():
        metrics = trainer.evaluate(rows, metric_key_prefix=split)
        found = models_of_metrics(metrics, f"{split}_", name)
        if name.startswith("encoder"):
            del found["encoder"]  # the same numbers
        results.setdefault(split, {}).update(found)


def _write_card(
    trainer: Any, results: Results, model_args: Any, data_args: Any, about: dict[str, Any]
) -> None:
    """The model card of this run."""
    from pico_hf.cards.model_card import write_model_card
    from pico_hf.cards.publishing import run_facts

    model, folder = trainer.pico_model, Path(trainer.args.output_dir)
    known = run_facts(model, trainer.args, trainer.state, folder.name)
    arguments = {name: value for name, value in known.arguments.items() if name != "step"}
    about = {**about, "dataset": about["dataset"] or dataset_name(data_args)}
    facts = replace(
        known,
        results=results,
        arguments=arguments | {"column_dropout": model.config.column_dropout},
        base_model=model_args.model_name_or_path or model.config.encoder_config.model_type,
        adapter=model_args.use_lora,
        **about,
    )
    write_model_card(folder, facts)
