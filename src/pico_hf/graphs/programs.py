"""Programs of `torch.export` for the two halves of a model, with any batch and text length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pico_hf.encoders.table import text_lengths
from pico_hf.graphs.modules import ImageGraph, TextGraph, check_graphable, example_inputs


class Programs(NamedTuple):
    """Both halves of a model; each program returns (tokens, mask)."""

    image: ExportedProgram
    text: ExportedProgram


def export_programs(model: Any) -> Programs:
    """Turns a model into two graphs of `torch.export`.

    Args:
        model: A [`PicoModel`], which stays as it is: calibration and adapters are in the graph,
            dropout is not.

    Returns:
        `image` takes `pixel_values`; `text` takes `input_ids` and, unless the tower attends to its
        padding (SigLIP), `attention_mask`. What they give: `ImageGraph`, `TextGraph`.

    Raises:
        ValueError: If the image tower takes images of many sizes at once (SigLIP 2 NaFlex).

    Example:
        ```python
        image, text = export_programs(model)
        tokens, mask = image.module()(pixel_values=pixel_values)
        ```
    """
    check_graphable(model)
    images, texts = example_inputs(model)
    positions = text_lengths(model.encoder.config)[1]
    batch, length = Dim("batch"), Dim("length", max=positions) if positions else Dim("length")
    with evaluating(model):
        return Programs(
            _program(ImageGraph(model), images, {0: batch}),
            _program(TextGraph(model), texts, {0: batch, 1: length}),
        )


def _program(graph: nn.Module, inputs: dict[str, Tensor], axes: dict[int, Any]) -> ExportedProgram:
    shapes = dict.fromkeys(inputs, axes)
    return torch.export.export(graph.eval(), (), inputs, dynamic_shapes=shapes, strict=False)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Lets a model compute without dropout and without gradients, and gives it back as it was.

    Args:
        model: A [`PicoModel`].
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
