"""Tells encoders apart by their projections, which decide what a column means."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel


def encoder_fingerprint(encoder: PreTrainedModel, projections: list[str]) -> dict[str, str]:
    """SHA-256 of an encoder's projections, rounded to each half-precision type it can stand for.

    Covers the architecture's name and the names, shapes and values of every parameter between the
    hidden states and the common space: those decide what a column means. It does not cover the
    towers before them, so an encoder whose towers alone were trained on has the same fingerprint.

    Args:
        encoder: The dual encoder.
        projections: Names of the parameters that come after the hidden states, or of all
            parameters and buffers that are to be told apart.

    Returns:
        Type name → digest. From fp32 there are both half types, so that the same encoder loaded in
        fp32, bf16 or fp16 shares at least one entry.
    """
    parameters = _in_force(encoder, dict(encoder.named_parameters()))
    names = sorted(
        _in_force(encoder, dict.fromkeys(projections)) or parameters
    )  # some towers end in one space
    tensors = {**_in_force(encoder, dict(encoder.named_buffers())), **parameters}
    half = (torch.bfloat16, torch.float16)
    stored = tensors[names[0]].dtype
    return {
        str(dtype).removeprefix("torch."): _digest(encoder.config.model_type, names, tensors, dtype)
        for dtype in ((stored,) if stored in half else half)
    }


def _in_force(encoder: PreTrainedModel, parameters: dict[str, Any]) -> dict[str, Any]:
    """Maps plain names to parameters; of modules that peft keeps twice, to the adapter's copy."""
    plain = {}
    for name, value in parameters.items():
        path, copied, rest = name.partition(".modules_to_save.")
        if copied:
            adapter, _, leaf = rest.partition(".")
            wrapper: Any = encoder.get_submodule(path)
            if adapter in wrapper.active_adapters:
                plain[f"{path}.{leaf}"] = value
        elif ".original_module." not in name:
            plain[name] = value
    return plain


def _digest(
    model_type: str, names: list[str], parameters: dict[str, Any], dtype: torch.dtype
) -> str:
    digest = hashlib.sha256(model_type.encode())
    for name in names:
        value = parameters[name].detach().to("cpu", dtype).contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
