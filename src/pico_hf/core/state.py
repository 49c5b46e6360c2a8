"""What each source of proposals keeps in a model: names, shapes and first values of its buffers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Share of the score that pooled features have at most while a run trains: with all of it tokens
# learn nothing; with half of it a pretrained encoder's own cosine learns nine points of rSum less.
MOST_POOLED = 0.8
When = Literal["training", "end"]
# `"training"` proposes at every evaluation of a run, `"end"` when training is over; what they
# propose stands in `pico_hf.core.estimators`.
SOURCES: dict[str, When] = {"style": "training", "canonical": "end", "pooled": "end"}


class Sizes(NamedTuple):
    """What shapes of state depend on.

    Attributes:
        columns: D.
        prototypes: K, per modality.
        instances: R, pairs of the probe set.
    """

    columns: int
    prototypes: int
    instances: int


class Buffer(NamedTuple):
    """A tensor of state and what it starts as.

    Attributes:
        shape: Of the tensor.
        start: `"zeros"`, `"ones"`, `"eye"`, or `"count"`, an integer 0.
    """

    shape: tuple[int, ...]
    start: Literal["zeros", "ones", "eye", "count"] = "zeros"


def declared_buffers(sources: Collection[str], sizes: Sizes) -> dict[str, Buffer]:
    """Every buffer of a model's prototypes but the flag `evaluated`.

    Args:
        sources: What may propose, of `SOURCES`.
        sizes: What shapes depend on.
    """
    matrix = Buffer((sizes.prototypes, sizes.instances))
    square = Buffer((sizes.columns, sizes.columns), "eye")
    buffers = {
        "semantic_probability": Buffer((sizes.columns,), "ones"),
        "pooled_share": Buffer(()),
        "iteration": Buffer((), "count"),
    }
    if "style" in sources:
        counters = {"style_iteration": Buffer((), "count"), "log_total_gain": Buffer(())}
        buffers |= {"vision": matrix, "text": matrix, **counters}
    if "canonical" in sources:
        buffers |= {"image_basis": square, "text_basis": square}
    return buffers


def started(buffer: Buffer) -> Tensor:
    """A new tensor with a buffer's first values."""
    if buffer.start == "eye":
        return torch.eye(buffer.shape[0])
    if buffer.start == "count":
        return torch.zeros(buffer.shape, dtype=torch.long)
    return torch.full(buffer.shape, float(buffer.start == "ones"))
