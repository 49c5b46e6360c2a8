"""Exports the plain encoder, with or without the column weights folded into its projections.

Lost in either case are the late interaction (a plain encoder compares one vector per image with one
per text) and the trained scale and bias of the scores. Without folding the column weights are lost,
too.

Folding turns the last projection of either side into the columns that are weighted, the encoder's
own or canonical ones, and multiplies row d of it, and entry d of its bias, by √w_d. The dot product
of unnormalised features, of tokens and of the pooled ones, then is the weighted one:
Σ_d (√w_d v_d)(√w_d t_d) = Σ_d w_d v_d t_d. A cosine is not: whoever normalises the folded features
divides by √(Σ_d w_d v_d²) where [`PicoModel`] divides by √(Σ_d v_d²), so that each score differs
from the weighted one by the ratio of those lengths. Ranks may change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel

from pico_hf.encoders.table import FALLBACK, table_row
from pico_hf.hub.files import find_file
from pico_hf.hub.new_folder import check_new
from pico_hf.hub.permissions import ordinary_permissions
from pico_hf.modeling_pico import PicoModel

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def export_encoder(
    model: PicoModel, folder: str | os.PathLike, *, fold: bool = False, **kwargs: Any
) -> None:
    """Saves the wrapped encoder alone, as a plain one that needs no pico_hf.

    Args:
        model: The model, which stays as it is.
        folder: Created if need be.
        fold: True folds the column weights into the last projections of both sides.
        kwargs: See `PreTrainedModel.save_pretrained`.

    Raises:
        ValueError: If the encoder's projections are not its own, if an adapter is not merged, or
            if its weights cannot be folded.
    """
    encoder = model.encoder
    if hasattr(encoder, FALLBACK):
        raise ValueError(
            f"The projections of this model are not those of {type(encoder).__name__}, which has "
            "none: a plain encoder would lose them. Keep the Pico model."
        )
    if any(".lora_" in name or ".modules_to_save." in name for name, _ in model.named_parameters()):
        raise ValueError("`model` holds an adapter. Merge it first: `merge_and_unload()`.")
    folded = _folded(last_linears(encoder), _column_maps(model)) if fold else nullcontext()
    with folded:
        encoder.save_pretrained(folder, **kwargs)
    ordinary_permissions(folder, "model*.safetensors")


def check_target(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Refuses a target that would overwrite something, before anything is written.

    Args:
        source: Folder or Hub repository that is read.
        target: Folder that is to be written.

    Raises:
        ValueError: If the target is the source, in any spelling, or lies inside of it or around it,
            or if it is a file or a folder with files.
    """
    folder = Path(target).resolve()
    if os.path.isdir(source):
        origin = Path(source).resolve()
        if origin == folder or origin in folder.parents or folder in origin.parents:
            raise ValueError(
                f"`target` must not be the folder of the source, lie inside of it or hold it, got "
                f"'{target}' for '{source}'. Choose another folder."
            )
    check_new(target)


def export_processor(source: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Copies the processor that was saved with a model.

    Args:
        source: Folder or Hub repository of the model.
        folder: Where the processor goes.

    Returns:
        False if there is none.
    """
    if not any(find_file(source, name, {}) for name in _PROCESSOR_FILES):
        return False
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return True


def last_linears(encoder: PreTrainedModel) -> list[nn.Linear]:
    """The projections whose outputs are the columns of the common space, with nothing after them.

    Args:
        encoder: An encoder with a row in the table.

    Returns:
        One of each side, or a single one if both share it.

    Raises:
        ValueError: If a side ends otherwise: in a residual sum (SigLIP's image head), or in the
            tower itself (ALIGN's images, TIPS v2). Its columns cannot be scaled by a projection.
    """
    row, found = table_row(encoder), []
    for side, steps in (("image", row.image.steps), ("text", row.text.steps)):
        module = encoder.get_submodule(steps[-1].path) if steps else None
        if isinstance(module, nn.Sequential):
            module = module[-1]
        if not isinstance(module, nn.Linear):
            end = type(module).__name__ if steps else "the tower itself"
            raise ValueError(
                f"`fold` needs a linear projection at the end of both sides; the {side} side of "
                f"{type(encoder).__name__} ends in {end}. Export it without folding."
            )
        if module not in found:
            found.append(module)
    return found


def _column_maps(model: PicoModel) -> list[Tensor]:
    """(D, D) per side: rotates encoder columns to weighted ones and multiplies each by √w_d."""
    prototypes: Any = model.prototypes
    root = model.column_weights.sqrt().diag()
    bases = prototypes.form.image_basis, prototypes.form.text_basis
    return [root if basis is None else root @ basis.t() for basis in bases]


@contextmanager
def _folded(linears: list[nn.Linear], maps: list[Tensor]) -> Iterator[None]:
    """Changes the last projections within the block and restores them afterwards."""
    if len(linears) == 1 and not torch.equal(*maps):
        raise ValueError(
            "`fold` needs a projection per side: the canonical columns of images and texts differ, "
            "and this encoder projects both by one module. Export it without folding."
        )
    tensors = [
        (tensor, columns)
        for linear, columns in zip(linears, maps, strict=False)
        for tensor in (linear.weight, linear.bias)
        if tensor is not None
    ]
    exact = [tensor.detach().clone() for tensor, _ in tensors]
    try:
        with torch.no_grad():
            for tensor, columns in tensors:
                exactly = torch.promote_types(tensor.dtype, columns.dtype)
                tensor.copy_(columns.to(tensor.device, exactly) @ tensor.to(exactly))
        yield
    finally:
        with torch.no_grad():
            for (tensor, _), before in zip(tensors, exact, strict=True):
                tensor.copy_(before)
