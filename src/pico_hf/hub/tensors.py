"""Reads safetensors files once and refuses those that cannot be right."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file that passes all checks of `checked_tensors`.

    Args:
        path: The file.
    """
    return {name: tuple(tensor.shape) for name, tensor in checked_tensors(path)}


def checked_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Reads a safetensors file once, tensor by tensor, and refuses one that cannot be right.

    The Hub's cache keeps a large file under its SHA-256, which the client never checks: it is
    computed from the same reading, so a file that differs is refused after the last tensor.

    Args:
        path: The file.

    Yields:
        Name and tensor.

    Raises:
        ValueError: If the file is cut short, holds NaN or infinity, or differs from what the Hub
            announced.
    """
    blob = path.resolve()
    announced = blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None
    digest = hashlib.sha256(_header(path) if announced else b"")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():  # in the order of the file, which has no gaps
                tensor = file.get_tensor(name)
                _refuse_not_finite(tensor, name, path.name)
                if announced:
                    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                yield name, tensor
    except SafetensorError as error:
        line = " ".join(str(error).split())[:600]  # it may repeat the header at length
        raise ValueError(
            f"{path.name} is not a whole safetensors file ({line}). Download or save it again."
        ) from error
    if announced and digest.hexdigest() != announced:
        raise ValueError(
            f"{path.name} is not what the Hub announced (SHA-256 {digest.hexdigest()[:12]}… "
            f"instead of {announced[:12]}…). Download it again with `force_download=True`."
        )


def _refuse_not_finite(tensor: Tensor, name: str, file: str) -> None:
    if not tensor.is_floating_point():
        return
    values = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # 8 bits know no such question
    if not bool(torch.isfinite(values).all()):
        what = "NaN" if bool(torch.isnan(values).any()) else "infinity"
        raise ValueError(f"`{name}` in {file} contains {what}; nothing was loaded.")


def _header(path: Path) -> bytes:
    """The bytes of a safetensors file before the first tensor: a length and that much JSON."""
    with path.open("rb") as file:
        length = file.read(8)
        size = min(int.from_bytes(length, "little"), path.stat().st_size)
        return length + file.read(size)
