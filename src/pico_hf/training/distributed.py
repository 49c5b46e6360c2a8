"""Training steps of several processes as if one process held the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

from accelerate.data_loader import SkipBatchSampler
from accelerate.state import GradientState
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pico_hf.core.processes import Processes
from pico_hf.core.whole_batch import WholeBatch

# Entry of a batch: how many pairs of all processes count, and how many rows each process has. It
# never reaches the model.
PAIRS = "pairs_that_count"


def mark_repeated_pairs(
    batches: Sequence[Any], loader: GradientState, processes: Processes
) -> None:
    """Notes in the last batch of an epoch how many pairs of all processes are no repetitions.

    accelerate fills what the last batch lacks with pairs of the first one, so that all processes
    take the same number of steps.

    Args:
        batches: Just taken from the loader; the last one may change.
        loader: What accelerate knows of it.
        processes: If there is only one, nothing is repeated.
    """
    if not processes.several:
        return
    if batches and loader.end_of_dataloader:
        total, remainder = _last_batch(loader, processes)
        if remainder > 0:
            batches[-1][PAIRS] = remainder, total // processes.count


def _last_batch(loader: GradientState, processes: Processes) -> tuple[int, int]:
    """Pairs of a whole batch of all processes, and of the last one; 0 if it is whole, too.

    accelerate does not know them in an epoch that a resumed run goes on with: the sampler that
    skips its first batches has no size.
    """
    current = loader.active_dataloader
    skipping = getattr(current, "batch_sampler", None)
    if not isinstance(skipping, SkipBatchSampler):
        return (current.total_batch_size, loader.remainder) if loader.remainder > 0 else (0, 0)
    sampler = skipping.batch_sampler
    split = getattr(sampler, "split_batches", False)
    total = sampler.batch_size * (1 if split else processes.count)
    return total, 0 if sampler.drop_last else len(current.dataset) % total


def whole_batch_inputs(
    inputs: dict[str, Any], model: PreTrainedModel, processes: Processes
) -> dict[str, Any]:
    """Inputs of a forward pass that scores the pairs of all processes.

    Args:
        inputs: The part of the batch that this process has.
        model: The [`PicoModel`].
        processes: If there is only one, the inputs stay as they are.

    Raises:
        ValueError: If the last batch of an epoch holds repeated rows that became several pairs.
    """
    if not processes.several:
        return inputs
    inputs = dict(inputs)
    counted, rows = inputs.pop(PAIRS, (None, None))
    pairs = len(next(iter(inputs.values())))
    if rows not in (None, pairs):
        raise ValueError(
            f"The last batch of an epoch repeats rows, and of {rows} rows `data_collator` made "
            f"{pairs} pairs, so that it is not known which of them. Make one pair of each row, or "
            "pass `dataloader_drop_last=True`."
        )
    batch = WholeBatch(processes, counted)
    if inputs.get("image_ids") is not None:
        inputs["image_ids"] = batch.identities(inputs["image_ids"])
    return {**inputs, "scorer": partial(batch.scores, model.score)}


@contextmanager
def looking_for_unused_parameters(trainer: Trainer) -> Iterator[None]:
    """Gives a trainer arguments that look for parameters without gradient, unless it has a choice.

    A pooler after the tokens or the scale of a hinge loss gets no gradient, and stock code looks
    for such parameters only without gradient checkpointing.

    Args:
        trainer: Gets its own arguments back in the end.
    """
    given = trainer.args
    if given.ddp_find_unused_parameters is None:
        trainer.args = copy(given)
        trainer.args.ddp_find_unused_parameters = True
    try:
        yield
    finally:
        trainer.args = given


class BatchStatisticsCallback(TrainerCallback):
    """Averages running statistics over processes after every step.

    So all of them evaluate, refine and save one model.

    Args:
        processes: Of the run.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Comes before the evaluation and the checkpoint of this step."""
        if model is not None:
            self.processes.average_batch_statistics(model)
