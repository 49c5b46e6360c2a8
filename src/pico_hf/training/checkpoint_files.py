"""Checks the weights of a checkpoint before a live model takes them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from pico_hf.hub.adapter_files import WEIGHTS_FILE
from pico_hf.hub.adapter_loading import check_weights
from pico_hf.hub.adapter_rules import names_of
from pico_hf.hub.tensors import checked_tensors
from pico_hf.hub.weights import read_model_files


def check_checkpoint(folder: str, model: nn.Module, *, adapted: bool) -> None:
    """Refuses a checkpoint that is damaged or does not hold all weights of a live model.

    Stock code loads what fits, and leaves what is missing as it is.

    Args:
        folder: Of the checkpoint.
        model: The live model.
        adapted: True if it is an adapter on its base.

    Raises:
        OSError: If there are no safetensors of that kind of model.
        ValueError: If a file is damaged, or lacks weights.
    """
    if adapted:
        file = Path(folder) / WEIGHTS_FILE
        if not file.is_file():
            raise OSError(
                f"'{folder}' has no {WEIGHTS_FILE}, so it is no checkpoint of an adapter. Resume "
                "from one of this run, or train the model without the adapter."
            )
        check_weights(model, checked_tensors(file))
        return
    stored = read_model_files(folder, {})
    if lost := _lost(model, stored.shapes.keys()):
        raise ValueError(
            f"'{folder}' does not fit the model: {stored.file} lacks {names_of(lost)}. Resume from "
            "a checkpoint of this run."
        )


def _lost(model: nn.Module, stored: Collection[str]) -> list[str]:
    """Names of the state that are not stored, under none of the names that tied weights have."""
    state = model.state_dict(keep_vars=True)
    kept = {id(value) for name, value in state.items() if name in stored}
    return [name for name, value in state.items() if id(value) not in kept]
