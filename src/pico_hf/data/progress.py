"""Progress bars of everything that takes long, and who switches them off."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from pico_hf.core.processes import Processes

BRIEF = 2.0
"""Seconds that what is often over at once takes before it shows a bar."""

_chosen: bool | None = None


def progress_bar(
    values: Iterable[Any] | None,
    description: str,
    *,
    hidden: bool = False,
    total: int | None = None,
    delay: float = 0.0,
) -> tqdm:
    """A bar over values, or one that is updated by hand.

    It is shown by the first process of a machine alone, and not where bars are switched off: by
    `transformers.utils.logging.disable_progress_bar()`, by that of `huggingface_hub`, or by
    `HF_HUB_DISABLE_PROGRESS_BARS=1` in the environment.

    Args:
        values: What to go through; None: the bar is updated by hand.
        description: What is being done.
        hidden: True shows nothing, as `disable_tqdm` of a run says.
        total: How many values there are, if they do not know.
        delay: Seconds before it is shown.
    """
    return tqdm(
        values,
        desc=description,
        total=total,
        disable=hidden or not bars_are_shown(),
        leave=False,
        delay=delay,
    )


def bars_are_shown() -> bool:
    """Whether this process shows bars at all."""
    rank = int(os.environ.get("LOCAL_RANK", Processes.all().rank))
    if rank > 0:
        return False
    if _chosen is not None:
        return _chosen
    return transformers_logging.is_progress_bar_enabled() and not are_progress_bars_disabled()


def choose_bars(shown: bool | None) -> None:
    """From now on shows bars, or none, whatever transformers is told.

    Args:
        shown: None goes by the switches of transformers and `huggingface_hub` again.
    """
    global _chosen
    _chosen = shown
