"""Which values the tensors of prototypes may have, wherever they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pico_hf.hub.tensors import checked_tensors

WEIGHTS_FILE = "prototypes.safetensors"


def check_values(buffers: Mapping[str, Tensor], file: str) -> None:
    """Raises ValueError unless the values of prototypes' tensors can be right.

    Args:
        buffers: Name → tensor; all but those of prototypes pass.
        file: Where they were found, for the message.
    """
    for name, value in buffers.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"`{name}` in {file} must be finite.")
    for name in buffers.keys() & {"image_basis", "text_basis"}:
        basis = buffers[name].double()
        square = basis.ndim == 2 and basis.shape[0] == basis.shape[1]
        if not square or not torch.allclose(
            basis.t() @ basis, torch.eye(len(basis)).double(), atol=1e-3
        ):
            raise ValueError(f"`{name}` in {file} must be orthonormal.")
    probability = buffers.get("semantic_probability")
    if probability is not None and (
        not bool(((probability >= 0) & (probability <= 1)).all()) or not bool(probability.any())
    ):
        raise ValueError(f"`semantic_probability` in {file} must be in [0, 1], not all 0.")
    share = buffers.get("pooled_share")
    if share is not None and not 0.0 <= float(share.sum()) <= 1.0:
        raise ValueError(f"`pooled_share` in {file} must be in [0, 1].")
    for name in ("iteration", "style_iteration"):
        if int(buffers.get(name, torch.zeros(())).sum()) < 0:
            raise ValueError(f"`{name}` in {file} must not be negative.")


def refuse_stale(found: Path | None, own: Mapping[str, Tensor], file: str) -> None:
    """Refuses prototypes beside a model or adapter that are not those inside of it.

    Args:
        found: The file beside a model or adapter, if there is one.
        own: Name → tensor of the prototypes inside.
        file: Where those are, for the message.

    Raises:
        ValueError: If the two differ: one is left over from an earlier save.
    """
    beside = dict(checked_tensors(found)) if found and own else {}
    for name, value in beside.items():
        if name not in own or not torch.equal(own[name], value):
            raise ValueError(
                f"`{name}` in {WEIGHTS_FILE} is not that of {file}: one of "
                "them is left over from an earlier save. Delete that file, save the model again, "
                f"or choose those of {WEIGHTS_FILE} by `prototypes=` with this path."
            )
