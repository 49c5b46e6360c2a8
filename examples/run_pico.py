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

import logging
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from pico_hf import ImageTextDataset, PicoModel, PicoTrainingArguments, load_image_text, recipe
from pico_hf.cards.model_card import comparison_table
from pico_hf.cli.commands.train import run_job
from pico_hf.training.job_options import DataArguments, ModelArguments
from pico_hf.training.job_sources import load_job_model, load_job_splits

HERE = Path(__file__).resolve().parent
EMBEDDED_DATA = HERE / "data" / "emoji-styles"
logger = logging.getLogger("run_pico")


@dataclass
class EmbeddedModelArguments(ModelArguments):
    """Which model to train; without a name, the embedded pair of encoders."""

    projection_dim: int = field(
        default=256, metadata={"help": "Columns of the embedded pair's common space."}
    )
    image_size: int = field(default=224, metadata={"help": "Pixels of the embedded pair's images."})


HEADS = recipe("new_heads")  # of the embedded pair of encoders
EMBEDDED_JOB = {"do_train": True, "do_eval": True}
EMBEDDED = {
    "output_dir": "outputs/emoji-styles",
    "logging_steps": 10,
    "report_to": "none",
}


def main() -> None:
    """Loads, trains, compares PICO with the base, saves."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model_args, data_args, args = parse_arguments(sys.argv[1:])
    named = data_args.dataset_name or data_args.train_file
    results = run_job(
        model_args,
        data_args,
        args,
        command=shlex.join(["python", "examples/run_pico.py", *sys.argv[1:]]),
        commit=commit(),
        load_model=load_model,
        load_splits=load_splits,
        dataset=None if named else "emoji-styles",
    )
    if results:
        print(f"\n{comparison_table(results)}\n")
    print(f"Model, prototypes, model card and plots: {args.output_dir}")


def parse_arguments(
    argv: list[str],
) -> tuple[EmbeddedModelArguments, DataArguments, PicoTrainingArguments]:
    """Options from the command line or from a YAML or JSON file; by default the embedded job."""
    parser = HfArgumentParser((EmbeddedModelArguments, DataArguments, PicoTrainingArguments))
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
            embedded |= HEADS.model | HEADS.training
        if "use_lora" in given:  # an adapter changes towers, and the projections as they are
            embedded.pop("freeze_encoder", None)
            embedded.pop("projection_start", None)
        missing = {key: value for key, value in embedded.items() if key not in given}
        argv = [*(f"--{key}={value}" for key, value in missing.items()), *argv]
    return parser.parse_args_into_dataclasses(argv)


def load_model(args: EmbeddedModelArguments) -> tuple[PicoModel, Any]:
    """The named model with its processor, or the embedded pair of encoders."""

    def embedded(**knobs: Any) -> tuple[PicoModel, Any]:
        from lite_clip import load_lite_clip

        encoder, processor = load_lite_clip(args.projection_dim, image_size=args.image_size)
        # Its projections are newly drawn, so there is no pooled feature to trust yet.
        return PicoModel.from_encoder(encoder, **{"pooled_share": 0.0, **knobs}), processor

    return load_job_model(args, embedded)


def load_splits(
    args: DataArguments, seed: int
) -> tuple[ImageTextDataset, dict[str, ImageTextDataset]]:
    """Training split and validation splits, the dev split first; by default the drawings."""
    if args.dataset_name or args.train_file:
        return load_job_splits(args, seed)
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    columns |= {"image_id_column": "concept", "gallery_column": "style"}
    limits = {"train": args.max_train_samples}
    train, seen, unseen = (
        load_image_text(
            files=EMBEDDED_DATA / f"{name}.parquet",
            max_samples=limits.get(name, args.max_eval_samples),
            **columns,
        )
        for name in ("train", "validation_seen", "validation_unseen")
    )
    splits = {"seen": ImageTextDataset(seen, seed), "unseen": ImageTextDataset(unseen, seed)}
    return ImageTextDataset(train, seed), splits


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
