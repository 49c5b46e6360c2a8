"""Writes the two graphs of a model as ONNX files, checked in onnxruntime against the model."""

from __future__ import annotations

import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pico_hf.graphs import scores
from pico_hf.graphs.modules import OUTPUTS, ImageGraph, TextGraph, example_inputs
from pico_hf.graphs.programs import evaluating, export_programs, plain_attention
from pico_hf.hub.new_folder import new_folder

IMAGE_FILE, TEXT_FILE, SCORES_FILE = "image.onnx", "text.onnx", "late_interaction.py"
TOLERANCE = 1e-3  # of the largest value; rounding is far below, a wrong graph far above
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_AXES = {0: "batch", 1: "length"}


def check_installed() -> None:
    """Refuses to go on without the packages that ONNX needs.

    Raises:
        ImportError: If one is missing; names the extra.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ImportError(
            f"ONNX files need {', '.join(missing)}. Install the extra: "
            "`pip install 'pico_hf[onnx]'`."
        )


def export_onnx(model: Any, folder: str | os.PathLike) -> None:
    """Writes `image.onnx`, `text.onnx` and the score of their outputs in numpy.

    Both graphs take any batch, and the text graph any length up to the tower's. Their inputs have
    the names that processors give, their outputs are `tokens`, `mask` and `pooled`; see
    `ImageGraph` and `TextGraph`. Their metadata hold `pooled_share`, how much of a score the pooled
    vectors are, and what makes logits of scores: `scale`, a factor, and `bias`.

    Args:
        model: A [`PicoModel`] in fp32, which stays as it is.
        folder: New or empty. Nothing is there until all is written, and checked in onnxruntime.

    Raises:
        ImportError: If the extra `onnx` is not installed.
        ValueError: If the folder holds files, if the model is not in fp32, if it has no graph
            (SigLIP 2 NaFlex), or if onnxruntime gives other features than the model.
    """
    check_installed()
    if model.encoder.dtype != torch.float32:
        raise ValueError(
            f"`model` must be in float32, got {model.encoder.dtype}. Load it with "
            "`PicoModel.from_pretrained(..., dtype=torch.float32)`."
        )
    with new_folder(folder) as new:
        with plain_attention(model):
            programs = export_programs(model)
        about = {
            "scale": str(math.exp(model.logit_scale.item())),
            "bias": str(model.logit_bias.item()),
            "pooled_share": str(model.pooled_share),
        }
        for name, program, axes in ((IMAGE_FILE, programs.image, 1), (TEXT_FILE, programs.text, 2)):
            _write(program, new / name, axes, about)
        shutil.copyfile(scores.__file__, new / SCORES_FILE)
        check_files(model, new)


def check_files(model: Any, folder: Path) -> None:
    """Compares what onnxruntime makes of both files with what the model gives.

    Batch and length are other ones than the graphs were made with, and texts are padded on the
    left where the tower allows it.

    Args:
        model: The model they were made of.
        folder: Where they are.

    Raises:
        ValueError: If a mask differs, or tokens or pooled vectors by more than rounding.
    """
    images, texts = (_three(side) for side in example_inputs(model))
    sides = ((IMAGE_FILE, ImageGraph(model), images), (TEXT_FILE, TextGraph(model), _longer(texts)))
    for name, graph, inputs in sides:
        with evaluating(model):
            expected = [output.cpu() for output in graph(**inputs)]
        worst = _difference(run_file(folder / name, inputs), expected)
        if not worst <= TOLERANCE:
            raise ValueError(
                f"The graph of {type(model.encoder).__name__} in `{name}` gives other features in "
                f"onnxruntime than the model (difference {worst:.2g} of the largest value). "
                "Use the model itself, or try other versions of torch and onnxruntime."
            )


def _difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest one of either vectors, of the largest value; infinite for other masks."""
    (tokens, mask, pooled), (found, real, found_pooled) = expected, got
    if not torch.equal(mask, real) or pooled.shape != found_pooled.shape:
        return math.inf
    worst = float((found - tokens)[mask].abs().max()) / max(1.0, float(tokens[mask].abs().max()))
    pooled_worst = float((found_pooled - pooled).abs().max())  # of unit length
    return max(worst, pooled_worst) if math.isfinite(worst + pooled_worst) else math.inf


def run_file(path: Path, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Runs one file on the CPU.

    Args:
        path: An ONNX file that `export_onnx` has written.
        inputs: By name.

    Returns:
        Tokens, mask and pooled vectors.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {name: value.detach().cpu().numpy() for name, value in inputs.items()}
    return tuple(torch.from_numpy(output) for output in session.run(list(OUTPUTS), given))


def _write(program: Any, path: Path, axes: int, about: dict[str, str]) -> None:
    names = program.module_call_graph[0].signature.in_spec.child(1).context
    names_of_axes = {axis: name for axis, name in _AXES.items() if axis < axes}
    with _quiet():
        written: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(names),
            output_names=list(OUTPUTS),
            dynamic_shapes=dict.fromkeys(names, names_of_axes),
        )
    _forget_origin(written.model)
    written.model.metadata_props.update(about)
    written.save(path)


def _forget_origin(graph: Any) -> None:
    """Takes out the source lines, and so the local paths, that the exporter notes everywhere."""
    for part in (graph, graph.graph, *graph.functions.values()):
        part.metadata_props.clear()
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages and names that do not matter here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _three(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}


def _longer(texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """One more token: padding before the text, or the last one repeated."""
    ids, mask = texts["input_ids"], texts.get("attention_mask")
    if mask is None:
        return {"input_ids": torch.cat([ids, ids[:, -1:]], dim=1)}
    padded = torch.cat([ids[:, -1:], ids], dim=1)
    return {"input_ids": padded, "attention_mask": F.pad(mask, (1, 0))}
