"""Programs of `torch.export` for the two halves of a model, with any batch and text length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedConfig

from pico_hf.core.modes import evaluation_mode
from pico_hf.encoders.text_lengths import text_lengths
from pico_hf.graphs.modules import ImageGraph, TextGraph, check_graphable, example_inputs


class Programs(NamedTuple):
    """Both halves of a model; each program returns (tokens, mask, pooled)."""

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
        tokens, mask, pooled = image.module()(pixel_values=pixel_values)
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
    graph(
        **inputs
    )  # what is asked once and kept, such as whether columns are rotated, is known now
    return torch.export.export(graph.eval(), (), inputs, dynamic_shapes=shapes, strict=False)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Lets a model compute without dropout and without gradients, and gives it back as it was.

    Args:
        model: A [`PicoModel`].
    """
    with evaluation_mode(model), torch.no_grad():
        yield


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Lets all towers attend by plain products and a softmax, which every exporter knows.

    Args:
        model: A [`PicoModel`], which gets its own kinds of attention back.
    """
    held = (getattr(module, "config", None) for module in model.encoder.modules())
    configs = {id(config): config for config in held if isinstance(config, PreTrainedConfig)}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
