"""The base that PICO is compared with: the same start, uniform column weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def weighed_in_training(trainer: Any) -> bool:
    """Whether style prototypes weighed columns while the network was trained.

    Args:
        trainer: After its training.
    """
    from pico_hf.core.state import SOURCES
    from pico_hf.training.feedback_log import logged_refinements

    found = logged_refinements(trainer.state.log_history)
    return any(SOURCES[e["source"]] == "training" and e["fused_weight"] > 0 for e in found)


def trained_base(
    trainer: Any, start: Callable[[Any], Any], model_args: Any, args: Any, data: Any
) -> Any:
    """The trainer of the same start after a training with uniform weights.

    Args:
        trainer: Of PICO's run.
        start: From `model_args` to model and processor.
        model_args: `ModelArguments`.
        args: `PicoTrainingArguments`.
        data: The other arguments of the trainer.
    """
    from transformers import set_seed

    from pico_hf.cli.progress import show_short_log

    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / "_base")
    args.refine_prototypes = args.push_to_hub = False
    set_seed(args.seed)
    model, _ = start(model_args)
    base = type(trainer)(model, args, **data)
    show_short_log(base)
    base.train()
    return base


@contextmanager
def uniform_weights(model: Any, share: float) -> Iterator[None]:
    """Takes back what feedback found within the block, but for the share in training.

    Args:
        model: A `PicoModel`.
        share: Of pooled features while it was trained.
    """
    state = copy.deepcopy(model.prototypes.state_dict())
    model.restart_prototypes(model.config.probe_size)
    model.prototypes.share_score(share)
    try:
        yield
    finally:
        model.prototypes.load_state_dict(state)
