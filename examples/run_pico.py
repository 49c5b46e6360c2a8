"""Train, evaluate and save PICO on image-text pairs.

    python examples/run_pico.py                      # embedded data and encoders, no download
    python examples/run_pico.py config.yaml          # every option in a YAML or JSON file
    python examples/run_pico.py --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name org/pairs --do_train --do_eval --output_dir outputs/mine

Without arguments it trains on emoji drawings in five styles and compares three scores on unseen
concepts, drawn in seen and in unseen styles: the encoder's own (the cosine of its pooled features),
the base (uniform column weights) and PICO. Canonical columns and the share of pooled vectors are
found when training is over. If no style prototypes were taken on the way, base and PICO are one
network; else the base is trained beside it from the same start. A pretrained encoder is also scored
before training.
"""

from __future__ import annotations

import copy
import logging
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    HfArgumentParser,
    VisionTextDualEncoderProcessor,
    set_seed,
)

from pico_hf import (
    ImageTextDataset,
    PicoModel,
    PicoTrainer,
    PicoTrainingArguments,
    load_image_text,
    pico_lora_config,
)
from pico_hf.cards.model_card import (
    ModelFacts,
    comparison_table,
    models_of_metrics,
    write_model_card,
)
from pico_hf.cards.publishing import run_facts
from pico_hf.cards.redaction import last_part
from pico_hf.core.state import SOURCES
from pico_hf.hub.adapter_rules import import_peft
from pico_hf.training.feedback_log import logged_refinements
from pico_hf.training.model_calls import MOST_POOLED

HERE = Path(__file__).resolve().parent
EMBEDDED_DATA = HERE / "data" / "emoji-styles"
logger = logging.getLogger("run_pico")


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A dual encoder or a Pico model: a folder or a repository."}
    )
    vision_model: str | None = field(
        default=None, metadata={"help": "Vision tower, to be joined with --text_model."}
    )
    text_model: str | None = field(default=None, metadata={"help": "Text tower."})
    # Fields of PicoConfig: what is not given stays as the model has it.
    num_prototypes: int | None = field(
        default=None, metadata={"help": "Style prototypes per modality, K."}
    )
    probe_size: int | None = field(
        default=None, metadata={"help": "Pairs that define the prototypes, R."}
    )
    estimators: list[str] | None = field(
        default=None, metadata={"help": "What proposes how to score: style, canonical, pooled."}
    )
    feedback_temperature: float | None = field(
        default=None, metadata={"help": "How much a gain in rSum counts in the fusion, > 0."}
    )
    column_dropout: float | None = field(
        default=None, metadata={"help": "Share of the image tower's columns left out in training."}
    )
    loss: str | None = field(default=None, metadata={"help": "hinge, infonce or sigmoid."})
    margin: float | None = field(default=None, metadata={"help": "Margin of the hinge loss, > 0."})
    projection_dim: int = field(
        default=256, metadata={"help": "Columns of the embedded pair's common space."}
    )
    image_size: int = field(default=224, metadata={"help": "Pixels of the embedded pair's images."})
    use_lora: bool = field(
        default=False, metadata={"help": "Adapt the towers by LoRA; needs peft. Saves an adapter."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "Updates are scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the matrices."})


@dataclass
class DataArguments:
    """Which data to train and evaluate on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder or Hub repository."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "parquet or jsonl files, or an imagefolder."}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Likewise, dev split."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: found by its type."})
    caption_column: str | None = field(
        default=None, metadata={"help": "One caption or a list of them; default: found by name."}
    )
    image_id_column: str | None = field(
        default=None, metadata={"help": "Rows of one value are no negatives of each other."}
    )
    gallery_column: str | None = field(
        default=None, metadata={"help": "Rows of one value are ranked among themselves."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "For a quick try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "For a quick try."})
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave unreadable images out and count them."}
    )
    compare_base: bool = field(
        default=True, metadata={"help": "Also score the same model with uniform column weights."}
    )


KNOBS = (
    "num_prototypes",
    "probe_size",
    "estimators",
    "feedback_temperature",
    "column_dropout",
    "loss",
    "margin",
)
EMBEDDED_MODEL = {"num_prototypes": 8, "column_dropout": 0.3}  # of the embedded pair of encoders
EMBEDDED_JOB = {"do_train": True, "do_eval": True}
EMBEDDED = {
    "output_dir": "outputs/emoji-styles",
    "freeze_encoder": True,
    "num_train_epochs": 12,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 128,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "report_to": "none",
}


def main() -> None:
    """Loads, trains, compares PICO with the base, saves."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model_args, data_args, args = parse_arguments(sys.argv[1:])
    if args.do_predict:
        raise SystemExit(
            "There is no test split. Leave --do_predict out, or name the split to be "
            "scored with --validation_file and pass --do_eval."
        )
    set_seed(args.seed)
    train, splits = load_splits(data_args, args.seed)
    dev = next(iter(splits.values()))  # chooses checkpoints and feeds prototypes
    data = {"train_dataset": train, "eval_dataset": dev}
    model, processor = load_model(model_args)
    trainer = PicoTrainer(model, args, **data, processing_class=processor)
    share = trainer.pico_model.pooled_share
    results: dict[str, dict[str, dict[str, float]]] = {}
    if args.do_train and args.do_eval and share == 1:
        add_results(results, "encoder, before training", trainer, splits)
    if args.do_train:
        share = min(share, MOST_POOLED)  # of the base: as much as while it is trained
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        if data_args.compare_base and not weighed_in_training(trainer):
            with uniform_weights(trainer.pico_model, share):
                add_results(results, "base", trainer, splits)
        elif data_args.compare_base:
            add_results(results, "base", trained_base(model_args, args, data), splits)
        add_results(results, "PICO", trainer, splits)
        trainer.save_metrics(
            "eval", {f"eval_{k}_rsum": v["PICO"]["rsum"] for k, v in results.items()}
        )
    if args.do_train and args.do_eval:
        write_model_card(Path(args.output_dir), facts(trainer, results, model_args, data_args))
        if args.push_to_hub:
            trainer.push_to_hub()
    if results:
        print(f"\n{comparison_table(results)}\n")
    print(f"Model, prototypes, model card and plots: {args.output_dir}")


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, PicoTrainingArguments]:
    """Options from the command line or from a YAML or JSON file; by default the embedded job."""
    parser = HfArgumentParser((ModelArguments, DataArguments, PicoTrainingArguments))
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(argv[0])
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    given = {option.split("=")[0].removeprefix("--") for option in argv if option[:2] == "--"}
    if not {"dataset_name", "train_file"} & given:
        embedded = dict(EMBEDDED)
        if not {"do_train", "do_eval"} & given:
            embedded |= EMBEDDED_JOB
        if not {"model_name_or_path", "vision_model", "text_model"} & given:
            embedded |= EMBEDDED_MODEL
        if "use_lora" in given:
            embedded.pop("freeze_encoder")  # an adapter changes what frozen towers would give
        missing = {key: value for key, value in embedded.items() if key not in given}
        argv = [*(f"--{key}={value}" for key, value in missing.items()), *argv]
    return parser.parse_args_into_dataclasses(argv)


def load_model(args: ModelArguments) -> tuple[PicoModel, Any]:
    """The named model with its processor, or the embedded pair of encoders."""
    given = {name: getattr(args, name) for name in KNOBS}
    knobs = {name: value for name, value in given.items() if value is not None}
    if args.model_name_or_path:
        processor = AutoProcessor.from_pretrained(args.model_name_or_path)
        model = PicoModel.from_pretrained(args.model_name_or_path, **knobs)
        return adapted(model, args), processor
    if args.vision_model and args.text_model:
        processor = VisionTextDualEncoderProcessor(
            AutoImageProcessor.from_pretrained(args.vision_model),
            AutoTokenizer.from_pretrained(args.text_model),
        )
        pair = PicoModel.from_vision_text_pretrained(args.vision_model, args.text_model, **knobs)
        return adapted(pair, args), processor
    if args.vision_model or args.text_model:
        raise SystemExit("Give both --vision_model and --text_model, or neither.")
    from lite_clip import load_lite_clip

    encoder, processor = load_lite_clip(args.projection_dim, image_size=args.image_size)
    # Its projections are newly drawn, so there is no pooled feature to trust yet.
    return adapted(PicoModel.from_encoder(encoder, pooled_share=0.0, **knobs), args), processor


def adapted(model: PicoModel, args: ModelArguments) -> Any:
    """The model, on request with a LoRA adapter on its towers, which alone is trained and saved."""
    if not args.use_lora:
        return model
    config = pico_lora_config(
        model, r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout
    )
    return import_peft().get_peft_model(model, config)


def load_splits(
    args: DataArguments, seed: int
) -> tuple[ImageTextDataset, dict[str, ImageTextDataset]]:
    """Training split and validation splits, the dev split first; by default the drawings."""
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    if args.dataset_name or args.train_file:
        columns |= {"image_id_column": args.image_id_column, "gallery_column": args.gallery_column}
        train = load(args, args.train_file, "train", columns, args.max_train_samples)
        dev = load(args, args.validation_file, "validation", columns, args.max_eval_samples)
        return ImageTextDataset(train, seed), {"dev": ImageTextDataset(dev, seed)}
    columns |= {"image_id_column": "concept", "gallery_column": "style"}
    train, seen, unseen = (
        load_image_text(files=EMBEDDED_DATA / f"{name}.parquet", max_samples=limit, **columns)
        for name, limit in (
            ("train", args.max_train_samples),
            ("validation_seen", args.max_eval_samples),
            ("validation_unseen", args.max_eval_samples),
        )
    )
    splits = {"seen": ImageTextDataset(seen, seed), "unseen": ImageTextDataset(unseen, seed)}
    return ImageTextDataset(train, seed), splits


def load(args: DataArguments, files: list[str] | None, split: str, columns: Any, limit: Any) -> Any:
    """One split from the files if there are any, else from the named data set."""
    source = {"files": files} if files else {"dataset_name": args.dataset_name, "split": split}
    return load_image_text(
        **source, **columns, max_samples=limit, skip_bad_images=args.skip_bad_images
    )


def weighed_in_training(trainer: PicoTrainer) -> bool:
    """Whether style prototypes weighed columns while the network was trained."""
    found = logged_refinements(trainer.state.log_history)
    return any(SOURCES[e["source"]] == "training" and e["fused_weight"] > 0 for e in found)


def trained_base(model_args: ModelArguments, args: PicoTrainingArguments, data: Any) -> PicoTrainer:
    """The same start, trained with uniform weights."""
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / "_base")
    args.refine_prototypes = args.push_to_hub = False
    set_seed(args.seed)
    model, processor = load_model(model_args)
    base = PicoTrainer(model, args, **data, processing_class=processor)
    base.train()
    return base


@contextmanager
def uniform_weights(model: PicoModel, share: float) -> Iterator[None]:
    """Takes back what feedback found within the block, but for the share in training."""
    state = copy.deepcopy(model.prototypes.state_dict())
    model.restart_prototypes(model.config.probe_size)
    model.prototypes.share_score(share)
    try:
        yield
    finally:
        model.prototypes.load_state_dict(state)


def add_results(
    results: dict[str, dict[str, dict[str, float]]], name: str, trainer: PicoTrainer, splits: Any
) -> None:
    """Scores a model on every validation split, and the encoder in it once it is trained."""
    for split, rows in splits.items():
        metrics = trainer.evaluate(rows, metric_key_prefix=split)
        found = models_of_metrics(metrics, f"{split}_", name)
        if name.startswith("encoder"):
            del found["encoder"]  # the same numbers
        results.setdefault(split, {}).update(found)


def facts(
    trainer: PicoTrainer, results: Any, model_args: ModelArguments, data_args: DataArguments
) -> ModelFacts:
    """What the model card shows of this run."""
    model = trainer.pico_model
    known = run_facts(model, trainer.args, trainer.state, Path(trainer.args.output_dir).name)
    arguments = {name: value for name, value in known.arguments.items() if name != "step"}
    return replace(
        known,
        results=results,
        arguments=arguments | {"column_dropout": model.config.column_dropout},
        command=shlex.join(["python", "examples/run_pico.py", *sys.argv[1:]]),
        commit=commit(),
        base_model=model_args.model_name_or_path or model.config.encoder_config.model_type,
        adapter=model_args.use_lora,
        dataset=dataset_name(data_args),
    )


def dataset_name(args: DataArguments) -> str | None:
    """The named data set, the folder that holds the training files, or the embedded drawings."""
    if not args.train_file:
        return args.dataset_name or "emoji-styles"
    file = Path(args.train_file[0])
    return last_part(file if file.is_dir() else file.parent) or None


def commit() -> str:
    """The checked-out commit of this script, empty outside a repository."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    try:
        main()
    except (ImportError, ValueError, OSError) as error:  # bad input is answered by one line
        sys.exit(f"run_pico: {error}")
    except KeyboardInterrupt:
        logger.error(
            "run_pico: stopped. Go on from the newest checkpoint with --resume_from_checkpoint=True"
        )
        sys.exit(130)
