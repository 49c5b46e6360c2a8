"""Checks the splits of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import datasets
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.negatives import Negatives
from pico_hf.data.stream import ImageTextStream
from pico_hf.training.dev_split import dev_metric, metric_names
from pico_hf.training_args import SCHEDULERS_BY_METRIC, PicoTrainingArguments

logger = logging.getLogger(__name__)

MIN_DEV_IMAGES = 10
STREAM_WARMUP = 0.1  # of the run, since a stream has no epochs


def as_pairs(rows: Any, seed: int) -> ImageTextDataset:
    """Makes a retrieval split of rows with image and caption columns, unless they are one."""
    return rows if isinstance(rows, ImageTextDataset) else ImageTextDataset(rows, seed=seed)


def train_split(rows: Any, args: PicoTrainingArguments) -> ImageTextDataset | ImageTextStream:
    """The training split or stream, checked.

    Args:
        rows: One split or stream: rows with image and caption columns, or a split as it is.
        args: The run's knobs.

    Raises:
        ValueError: If there are several splits, too few rows for a batch, or a stream and no number
            of steps.
    """
    if isinstance(rows, Mapping):
        raise ValueError(
            f"`train_dataset` must be one split, got a {type(rows).__name__} of "
            f"{', '.join(map(str, rows)) or 'nothing'}. Pass one of them, such as "
            f"`data[{next(iter(rows), 'train')!r}]`."
        )
    if isinstance(rows, datasets.IterableDataset | ImageTextStream):
        _check_stream(args)
        return rows if isinstance(rows, ImageTextStream) else ImageTextStream(rows, args.seed)
    split = as_pairs(rows, args.seed)
    check_train_split(split, args)
    return split


def _check_stream(args: PicoTrainingArguments) -> None:
    if args.max_steps <= 0:
        raise ValueError(
            "`max_steps` must be given for a stream, which has no length. Pass the number of "
            "optimizer steps of the run."
        )
    if args.freeze_encoder:
        raise ValueError(
            "`freeze_encoder` caches features of a whole split, and a stream has no end. Leave it "
            "out, or load the data without `streaming`."
        )


def dev_splits(rows: Any, args: PicoTrainingArguments) -> Any:
    """The dev split or a dict of them, checked; None if there is none.

    Args:
        rows: One split or a dict of splits.
        args: The run's knobs.

    Raises:
        ValueError: If a dict holds no split, or if a split is too small.
    """
    if isinstance(rows, Mapping) and not rows:
        raise ValueError("`eval_dataset` must hold a split, got an empty dict. Pass None instead.")
    return each(lambda split: check_dev_split(as_pairs(split, args.seed)), rows)


def each(function: Callable[[Any], Any], splits: Any) -> Any:
    """Applies a function to one split, to each of a dict of splits, or to none."""
    if isinstance(splits, Mapping):
        return {name: function(split) for name, split in splits.items()}
    return None if splits is None else function(splits)


def fit_to_splits(args: PicoTrainingArguments, train: Any, dev: Any) -> PicoTrainingArguments:
    """Arguments whose defaults fit a stream, and no dev split or a dict of them.

    Args:
        args: What the user gave; it is not changed.
        train: The training split or stream.
        dev: The dev split or splits.

    Returns:
        The same object if nothing has to change.
    """
    changed: dict[str, Any] = {}
    if isinstance(train, ImageTextStream):
        changed |= _stream_defaults(args)
    if dev is None and not args.evaluation_given:
        changed |= {"eval_strategy": IntervalStrategy.NO, "load_best_model_at_end": False}
    elif isinstance(dev, Mapping) and args.metric_for_best_model is not None:
        changed["metric_for_best_model"] = dev_metric(args.metric_for_best_model, dev)
    if all(getattr(args, name) == value for name, value in changed.items()):
        return args
    fitted = copy(args)
    for name, value in changed.items():
        setattr(fitted, name, value)
    return fitted


def _stream_defaults(args: PicoTrainingArguments) -> dict[str, Any]:
    """What fits a stream, of what was not given."""
    changed: dict[str, Any] = {}
    if not args.warmup_given:
        changed["prototype_warmup_epochs"] = STREAM_WARMUP
    if args.accelerator_config.dispatch_batches is None:
        # One process could not join the batches of all of them, which are padded differently.
        changed["accelerator_config"] = copy(args.accelerator_config)
        changed["accelerator_config"].dispatch_batches = False
    return changed


def check_best_metric(args: PicoTrainingArguments, dev: Any) -> None:
    """Refuses a metric that no evaluation gives, before anything is trained for it."""
    scheduled = args.lr_scheduler_type in SCHEDULERS_BY_METRIC
    if dev is None and scheduled:
        raise ValueError(
            f"`lr_scheduler_type={args.lr_scheduler_type.value!r}` follows a metric of the dev "
            "split. Pass `eval_dataset`, or choose another `lr_scheduler_type`."
        )
    best = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    if dev is None or not (best or scheduled):
        return
    names = list(dev) if isinstance(dev, Mapping) else []
    prefixes = [f"eval_{name}_" for name in names] or ["eval_"]
    known = [prefix + metric for prefix in prefixes for metric in metric_names()]
    if dev_metric(args.metric_for_best_model, dev) not in known:
        raise ValueError(
            f"`metric_for_best_model` must be a metric of `eval_dataset`, got "
            f"{args.metric_for_best_model!r}. Pass one of {', '.join(known)}."
        )


def check_dev_split(split: ImageTextDataset) -> ImageTextDataset:
    """Refuses a dev split that is too small to measure anything; warns of small galleries."""
    if len(split) < MIN_DEV_IMAGES:
        raise ValueError(
            f"`eval_dataset` must have at least {MIN_DEV_IMAGES} images, got {len(split)}: with "
            "fewer, R@10 is 100 % by chance and feedback is noise. Take more pairs as dev split."
        )
    typical = int(split.gallery.bincount().median())
    if typical < MIN_DEV_IMAGES:
        logger.warning(
            "Half of the galleries of `eval_dataset` have no more than %d images: in them R@10 is "
            "100 %% by chance, and feedback is noise. Rank more images together.",
            typical,
        )
    return split


def check_train_split(split: ImageTextDataset, args: PicoTrainingArguments) -> None:
    """Refuses a split that gives no batch, or none with a negative, or mined ones that are lost."""
    if len(split) < 2:
        raise ValueError(
            f"`train_dataset` must have at least 2 images, got {len(split)}: the other pairs of a "
            "batch are its negatives."
        )
    batch = args.per_device_train_batch_size * args.world_size
    if len(split) < batch and args.dataloader_drop_last:
        shared = f" for {args.world_size} processes" if args.world_size > 1 else ""
        raise ValueError(
            f"`train_dataset` must have at least one batch of {batch} images{shared}, got "
            f"{len(split)}. Lower `per_device_train_batch_size`."
        )
    if split.negatives is not None:
        _check_negatives(split.negatives, args)


def _check_negatives(negatives: Negatives, args: PicoTrainingArguments) -> None:
    if negatives.are_missing:
        raise ValueError(
            "`train_dataset` has a column `negatives` that names none of its images. Mine them of "
            "these rows with `mine_hard_negatives`, or remove the column."
        )
    if args.world_size > 1 and not args.dataloader_drop_last:
        raise ValueError(
            "`dataloader_drop_last` must be True for mined negatives in several processes, which "
            "would repeat pairs to fill up the last batch. Leave it out."
        )
