"""`pico-hf train`, and the job behind it and behind `examples/run_pico.py`."""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Failed, Table

PANEL = "Models"
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
STOPPED = "The same command with --resume goes on from the newest checkpoint."
_CONFIGS = (".yaml", ".yml", ".json")
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
            metavar="PAIRS... [--OPTION VALUE]...",
            help="Tables of images and captions, an imagefolder, the name of a data set, or one "
            "YAML or JSON file of options.",
        ),
    ],
    encoder: Annotated[
        str | None, typer.Option(help="What is trained: a dual encoder or a Pico model.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the trained model.")] = None,
    dev: Annotated[
        str | None, typer.Option(help="Dev split; default: a tenth of the images is held out.")
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


def job_arguments(words: Sequence[str], options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Arguments of a job from a file of options, pairs and options of every name."""
    from transformers import HfArgumentParser

    from pico_hf.training.job_options import DataArguments, ModelArguments
    from pico_hf.training_args import PicoTrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise typer.BadParameter(message)

    kinds = (ModelArguments, DataArguments, PicoTrainingArguments)
    parser = Parser(kinds, allow_abbrev=False)
    parser.add_argument("pairs", nargs="*")
    spoken, unknown = parser.parse_known_args(list(words))
    if unknown:
        raise typer.BadParameter(f"no such option: {' '.join(unknown)}")
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"]
    names = [name if hasattr(spoken, name) else name.removeprefix("no_") for name in flags]
    chosen = {name: getattr(spoken, name) for name in names}
    named: dict[str, Any] = {"do_train": True, "do_eval": True, "report_to": "none"}
    if len(spoken.pairs) == 1 and spoken.pairs[0].endswith(_CONFIGS):
        named |= _config(Path(spoken.pairs[0]))
    elif spoken.pairs:
        named |= _source(spoken.pairs)
    named |= options | chosen
    if "output_dir" not in named:
        raise Failed("Name the folder of the trained model by --output.")
    try:
        return parser.parse_dict(named)
    except ValueError as error:
        raise Failed(
            str(error).replace("by the HfArgumentParser", "as options of a run")
        ) from error


def _config(file: Path) -> dict[str, Any]:
    import yaml

    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Failed(f"{str(file)!r} is no file of options ({error}).") from error
    if not isinstance(read, dict):
        raise Failed(
            f"{str(file)!r} must hold options with their values, got {type(read).__name__}."
        )
    return read


def _source(pairs: list[str]) -> dict[str, Any]:
    """Files as files; one name that is no file as a data set."""
    alone = pairs[0] if len(pairs) == 1 else ""
    if alone and not Path(alone).exists() and "/" in alone and not Path(alone).suffix:
        return {"dataset_name": alone}
    return {"train_file": pairs}


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

    Canonical columns are estimated when training is over, so that base and PICO are one network.
    Any other estimator weighs columns during training; the base is then trained beside it from the
    same start.

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

    from pico_hf.training.job_options import adapt, load_job_model, load_job_splits
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
    model, processor = (load_model or load_job_model)(model_args)
    data["processing_class"] = processor
    twin = data_args.compare_base and model.prototypes.canonical and args.refine_prototypes
    if model_args.use_lora:
        model = adapt(model, model_args)
    results: Results = {}
    if args.do_train and data_args.compare_base and not twin:
        _train_base(model, args, data, validation, results)
    trainer = PicoTrainer(model, args, **data)
    if args.do_train:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        if twin:  # trained with uniform weights up to the alignment: the base is the same network
            with uniform_weights(trainer.pico_model):
                _score(results, "base", trainer, validation)
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


def _train_base(model: Any, args: Any, data: Any, splits: Any, results: Results) -> None:
    from pico_hf.training.trainer import PicoTrainer

    base_args = copy.copy(args)
    base_args.output_dir = str(Path(args.output_dir) / "_base")
    base_args.refine_prototypes = base_args.push_to_hub = False
    base = PicoTrainer(copy.deepcopy(model), base_args, **data)
    base.train()
    _score(results, "base", base, splits)


@contextmanager
def uniform_weights(model: Any) -> Iterator[None]:
    """Takes canonical columns and their weights back within the block."""
    state = copy.deepcopy(model.prototypes.state_dict())
    model.restart_prototypes(model.config.probe_size)
    try:
        yield
    finally:
        model.prototypes.load_state_dict(state)


def _score(results: Results, name: str, trainer: Any, splits: Mapping[str, Any]) -> None:
    """Scores a trained model on every validation split."""
    for split, rows in splits.items():
        metrics = trainer.evaluate(rows, metric_key_prefix=split)
        results.setdefault(split, {})[name] = {
            key.removeprefix(f"{split}_"): value for key, value in metrics.items()
        }


def _write_card(
    trainer: Any, results: Results, model_args: Any, data_args: Any, about: dict[str, Any]
) -> None:
    """The model card of this run."""
    from pico_hf.cards.model_card import write_model_card
    from pico_hf.cards.publishing import run_facts

    model, folder = trainer.pico_model, Path(trainer.args.output_dir)
    known = run_facts(model, trainer.args, trainer.state, folder.name)
    arguments = {name: value for name, value in known.arguments.items() if name != "step"}
    about = {**about, "dataset": about["dataset"] or _dataset_name(data_args)}
    facts = replace(
        known,
        results=results,
        arguments=arguments | {"column_dropout": model.config.column_dropout},
        base_model=model_args.model_name_or_path or model.config.encoder_config.model_type,
        adapter=model_args.use_lora,
        **about,
    )
    write_model_card(folder, facts)


def _dataset_name(args: Any) -> str | None:
    """The named data set, or the folder that holds the training files."""
    from pico_hf.cards.redaction import last_part

    if not args.train_file:
        return args.dataset_name
    file = Path(args.train_file[0])
    return last_part(file if file.is_dir() else file.parent) or None


def results_table(results: Results) -> list[Any]:
    """One row per split and model, R@k in percent."""
    from pico_hf.cards.model_card import HEADINGS, METRICS

    rows = [
        (split, name, *(f"{metrics[each]:.1f}" for each in METRICS))
        for split, models in results.items()
        for name, metrics in models.items()
    ]
    return [Table(("split", "model", *(f"#{text}" for text in HEADINGS)), rows)] if rows else []
