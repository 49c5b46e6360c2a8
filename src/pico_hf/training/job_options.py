"""What a training job is made of, as options: which model, and which data."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.vision_text_dual_encoder import VisionTextDualEncoderProcessor

from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.loading import load_image_text
from pico_hf.hub.adapter_rules import import_peft
from pico_hf.hub.errors import plain_errors
from pico_hf.lora import pico_lora_config
from pico_hf.modeling_pico import PicoModel

HELD_OUT = 0.1  # of the images, where no dev split is named


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
    estimator: str | None = field(default=None, metadata={"help": "canonical or paper."})
    feedback_temperature: float | None = field(
        default=None, metadata={"help": "How much a gain in rSum counts in the fusion, > 0."}
    )
    column_dropout: float | None = field(
        default=None, metadata={"help": "Share of the image tower's columns left out in training."}
    )
    loss: str | None = field(default=None, metadata={"help": "hinge, infonce or sigmoid."})
    margin: float | None = field(default=None, metadata={"help": "Margin of the hinge loss, > 0."})
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
        default=None,
        metadata={"help": "Likewise, dev split; default: a tenth of the training images."},
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
    "estimator",
    "feedback_temperature",
    "column_dropout",
    "loss",
    "margin",
)


def load_job_model(
    args: ModelArguments, otherwise: Callable[..., tuple[Any, Any]] | None = None
) -> tuple[Any, Any]:
    """The model that is named, with its processor.

    Args:
        args: Name it.
        otherwise: What is loaded if nothing is named, with the fields of `PicoConfig` that are
            given; None raises.

    Raises:
        OSError: If model or processor cannot be loaded.
        ValueError: If nothing is named, or only one of two towers is.
    """
    given = {name: getattr(args, name) for name in KNOBS}
    knobs = {name: value for name, value in given.items() if value is not None}
    if args.model_name_or_path:
        model = PicoModel.from_pretrained(args.model_name_or_path, **knobs)
        with plain_errors(args.model_name_or_path):
            return model, AutoProcessor.from_pretrained(args.model_name_or_path)
    if args.vision_model and args.text_model:
        processor = VisionTextDualEncoderProcessor(
            AutoImageProcessor.from_pretrained(args.vision_model),
            AutoTokenizer.from_pretrained(args.text_model),
        )
        pair = PicoModel.from_vision_text_pretrained(args.vision_model, args.text_model, **knobs)
        return pair, processor
    if args.vision_model or args.text_model:
        raise ValueError("Give both `vision_model` and `text_model`, or neither.")
    if otherwise is None:
        raise ValueError("`model_name_or_path` must name what is trained, got nothing.")
    return otherwise(**knobs)


def adapt(model: PicoModel, args: ModelArguments) -> Any:
    """The model with a LoRA adapter on its towers, which alone is trained and saved."""
    config = pico_lora_config(
        model, r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout
    )
    return import_peft().get_peft_model(model, config)


def load_job_splits(
    args: DataArguments, seed: int
) -> tuple[ImageTextDataset, dict[str, ImageTextDataset]]:
    """The training split and the dev split of the named files or data set.

    Where training files are named and no others, a tenth of the images is held out as dev split.
    """
    columns = {
        name: getattr(args, name)
        for name in ("image_column", "caption_column", "image_id_column", "gallery_column")
    }
    train = load_split(args, args.train_file, "train", columns, args.max_train_samples)
    if args.train_file and not args.validation_file:
        train, dev = hold_out(train, HELD_OUT, seed)
        if args.max_eval_samples is not None:
            dev = dev.select(range(min(args.max_eval_samples, len(dev))))
    else:
        dev = load_split(args, args.validation_file, "validation", columns, args.max_eval_samples)
    return ImageTextDataset(train, seed), {"dev": ImageTextDataset(dev, seed)}


def load_split(
    args: DataArguments, files: list[str] | None, split: str, columns: Any, limit: int | None
) -> Any:
    """One split from the files if there are any, else from the named data set."""
    source = {"files": files} if files else {"dataset_name": args.dataset_name, "split": split}
    return load_image_text(
        **source, **columns, max_samples=limit, skip_bad_images=args.skip_bad_images
    )


def hold_out(rows: Any, share: float, seed: int = 0) -> tuple[Any, Any]:
    """Splits pairs in two; images of one identity stay together.

    Args:
        rows: What `load_image_text` gives.
        share: Of the identities that are held out, in (0, 1).
        seed: Decides which.

    Returns:
        (the rest, what is held out).
    """
    known = rows["image_id"]
    names = sorted(set(known))
    random.Random(seed).shuffle(names)
    apart = set(names[: max(1, round(share * len(names)))])
    rest = [row for row, name in enumerate(known) if name not in apart]
    return rows.select(rest), rows.select([r for r, name in enumerate(known) if name in apart])
