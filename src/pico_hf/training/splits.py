"""Checks the splits of a run, and chooses the part of the dev split that trials rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from pico_hf.data.dataset import ImageTextDataset
from pico_hf.training_args import PicoTrainingArguments

logger = logging.getLogger(__name__)

MIN_DEV_IMAGES = 10
TRIAL_PAIRS = 1_250_000  # 500 images × 2,500 captions: feedback on photos in the effect study


def as_pairs(rows: Any, seed: int) -> ImageTextDataset:
    """Makes a retrieval split of rows with image and caption columns, unless they are one."""
    return rows if isinstance(rows, ImageTextDataset) else ImageTextDataset(rows, seed=seed)


def trial_part(split: ImageTextDataset) -> ImageTextDataset:
    """Chooses the part of a split that trials rank, with at most `TRIAL_PAIRS` pairs."""
    images = split.gallery.bincount()
    captions = split.gallery[split.text_to_image].bincount()
    pairs = int(images @ captions)  # each gallery is ranked by itself
    return split.sample(int(len(split) * math.sqrt(TRIAL_PAIRS / pairs)))


def check_dev_split(split: ImageTextDataset) -> ImageTextDataset:
    """Refuses a dev split that is too small to measure anything; warns of small galleries."""
    if len(split) < MIN_DEV_IMAGES:
        raise ValueError(
            f"`eval_dataset` must have at least {MIN_DEV_IMAGES} images, got {len(split)}: with "
            "fewer, R@10 is 100 % by chance and feedback is noise."
        )
    typical = int(split.gallery.bincount().median())
    if typical < MIN_DEV_IMAGES:
        logger.warning(
            "Half of the galleries of `eval_dataset` have no more than %d images: in them R@10 is "
            "100 %% by chance, and feedback is noise. Rank more images together.",
            typical,
        )
    return split


def check_train_split(
    split: ImageTextDataset | Mapping[str, Any], args: PicoTrainingArguments
) -> None:
    """Refuses several splits at once, and a training split that is smaller than a batch."""
    if isinstance(split, Mapping):
        first = next(iter(split), "train")
        raise ValueError(
            f"`train_dataset` must be one split, got a {type(split).__name__} of "
            f"{', '.join(map(str, split))}. Choose one, as in `data[{first!r}]`."
        )
    if len(split) < args.per_device_train_batch_size and args.dataloader_drop_last:
        raise ValueError(
            f"`train_dataset` must have at least one batch of {args.per_device_train_batch_size} "
            f"images, got {len(split)}. Lower `per_device_train_batch_size`."
        )
