"""Of several dev splits the first one gives the feedback and picks the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from pico_hf.core.metrics import retrieval_metrics


def first_split(splits: Any) -> Any:
    """The split that feedback and checkpoint selection use: the first one of a dict of splits."""
    return next(iter(splits.values())) if isinstance(splits, Mapping) else splits


def dev_metric(name: str, splits: Any) -> str:
    """Name of a metric of the first dev split, as a run logs it.

    Args:
        name: With or without `eval_`. A metric of a whole run's only split is that of the first
            one, if there are several.
        splits: A dev split or a dict of splits.
    """
    bare = name.removeprefix("eval_")
    if isinstance(splits, Mapping) and bare in metric_names():
        return f"eval_{next(iter(splits))}_{bare}"
    return f"eval_{bare}"


@cache
def metric_names() -> tuple[str, ...]:
    """Names of the metrics of a split."""
    return tuple(retrieval_metrics(torch.eye(2), torch.arange(2)))
