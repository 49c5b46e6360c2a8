"""What the options of a training job name: model, processor and splits."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.vision_text_dual_encoder import VisionTextDualEncoderProcessor

from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.loading import load_image_text
from pico_hf.hub.adapter_rules import import_peft
from pico_hf.hub.errors import plain_errors
from pico_hf.lora import pico_lora_config
from pico_hf.modeling_pico import PicoModel
from pico_hf.training.job_options import KNOBS, DataArguments, ModelArguments
from pico_hf.training.splits import MIN_DEV_IMAGES

HELD_OUT = 0.1  # of the images, where no dev split is named, and MIN_DEV_IMAGES at least


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
            return adapted(model, args), AutoProcessor.from_pretrained(args.model_name_or_path)
    if args.vision_model and args.text_model:
        processor = VisionTextDualEncoderProcessor(
            AutoImageProcessor.from_pretrained(args.vision_model),
            AutoTokenizer.from_pretrained(args.text_model),
        )
        pair = PicoModel.from_vision_text_pretrained(args.vision_model, args.text_model, **knobs)
        return adapted(pair, args), processor
    if args.vision_model or args.text_model:
        raise ValueError("Give both `vision_model` and `text_model`, or neither.")
    if otherwise is None:
        raise ValueError("`model_name_or_path` must name what is trained, got nothing.")
    model, processor = otherwise(**knobs)
    return adapted(model, args), processor


def adapted(model: PicoModel, args: ModelArguments) -> Any:
    """The model, if wanted with a LoRA adapter on its towers, which alone is trained and saved."""
    if not args.use_lora:
        return model
    config = pico_lora_config(
        model, r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout
    )
    return import_peft().get_peft_model(model, config)


def load_job_splits(
    args: DataArguments, seed: int
) -> tuple[ImageTextDataset, dict[str, ImageTextDataset]]:
    """The training split and the dev split of the named files or data set.

    Where training files are named and no others, a tenth of the images, and as many as a dev split
    needs, are held out as dev split.

    Raises:
        ValueError: If there are too few of them for that.
    """
    columns = {
        name: getattr(args, name)
        for name in ("image_column", "caption_column", "image_id_column", "gallery_column")
    }
    train = load_split(args, args.train_file, "train", columns, args.max_train_samples)
    if args.train_file and not args.validation_file:
        if len(train) < 2 * MIN_DEV_IMAGES:
            raise ValueError(
                f"`train_file` must have at least {2 * MIN_DEV_IMAGES} images, of which some are "
                f"held out as dev split, got {len(train)}. Take more, or name a dev split."
            )
        train, dev = hold_out(train, HELD_OUT, seed, MIN_DEV_IMAGES)
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


def hold_out(rows: Any, share: float, seed: int = 0, at_least: int = 1) -> tuple[Any, Any]:
    """Splits pairs in two; images of one identity stay together.

    Args:
        rows: What `load_image_text` gives.
        share: Of the identities that are held out, in (0, 1).
        seed: Decides which.
        at_least: So many images are held out of a few.

    Returns:
        (the rest, what is held out).
    """
    known = rows["image_id"]
    names = sorted(set(known))
    random.Random(seed).shuffle(names)
    wanted, images = max(1, round(share * len(names))), Counter(known)
    apart: set[str] = set()
    for name in names:
        if len(apart) >= wanted and sum(images[own] for own in apart) >= at_least:
            break
        apart.add(name)
    rest = [row for row, name in enumerate(known) if name not in apart]
    return rows.select(rest), rows.select([r for r, name in enumerate(known) if name in apart])
