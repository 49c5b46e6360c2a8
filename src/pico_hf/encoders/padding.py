"""Padding of texts: which tokens it is, on which side, and how many tokens a tower takes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

_NUMBERS_AFTER_PAD = "create_position_ids_from_input_ids"


def attended_tokens(
    input_ids: Tensor, tower: PreTrainedConfig, *, prefix: int, suffix: int
) -> Tensor:
    """Reads the attention mask off token ids: 0 for the padding at either end of a text.

    Padding is the pad token, or a last token that repeats: a text ends in one special token. Where
    the pad token is also the EOS, the first one after the text is the EOS.

    Args:
        input_ids: (texts, tokens).
        tower: The text tower's config, which may name a pad and an EOS token.
        prefix: Special tokens before the first word.
        suffix: Special tokens after the last word.
    """
    pad, eos = (getattr(tower, f"{name}_token_id", None) for name in ("pad", "eos"))
    last = input_ids[:, -1:]
    run = run_at_end(input_ids == last)
    length = run.sum(dim=1, keepdim=True)
    is_pad = torch.zeros_like(last, dtype=torch.bool) if pad is None else last == pad
    if pad == eos and suffix:
        is_pad = torch.zeros_like(is_pad)
    if not suffix:
        padding = run & is_pad
    else:
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = place == input_ids.shape[1] - length
        padding = run & (is_pad | ~first)
    for token in {pad, eos} - {None}:
        padding = padding | run_at_start(input_ids == token)
    if prefix:  # a text begins with one special token
        run = run_at_start(input_ids == input_ids[:, :1])
        padding = padding | (run & (run.sum(dim=1, keepdim=True) > 1))
    empty = padding.all(dim=1, keepdim=True)
    return (~padding | empty).long()


def run_at_start(found: Tensor) -> Tensor:
    """Keeps of a boolean (texts, tokens) the run of True that each row begins with."""
    return (~found).cumsum(dim=1) == 0  # a sum, since ONNX has no cumulative product


def run_at_end(found: Tensor) -> Tensor:
    """Keeps of a boolean (texts, tokens) the run of True that each row ends with."""
    return run_at_start(found.flip(1)).flip(1)


def padded_right(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Moves the padding of every text behind it, in all inputs of one entry per token.

    Towers count positions from the first token, so padding before a text would change its features.

    Args:
        inputs: `input_ids` and others; without `attention_mask` they stay as they are.

    Returns:
        The inputs, and (texts, tokens) where each token stands now; None if nothing moved.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs, None
    start = mask.bool().long().argmax(dim=1, keepdim=True)
    if not torch.compiler.is_compiling() and not start.any():
        return inputs, None
    length = mask.shape[1]
    place = torch.arange(length, device=mask.device)
    order = place + start
    order = torch.where(order < length, order, order - length)  # ONNX: no modulo of a variable
    moved = {
        name: value.gather(1, order.to(value.device))
        if isinstance(value, Tensor) and value.shape == mask.shape
        else value
        for name, value in inputs.items()
    }
    back = place - start
    return moved, torch.where(back < 0, back + length, back)


def text_positions(tower: PreTrainedConfig | None) -> int | None:
    """The most tokens that a text tower takes; None if it names no limit.

    Towers of the RoBERTa kind number positions after the pad token's id.

    Args:
        tower: The text tower's config.
    """
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    limits = [getattr(tower, name, None) for name in names]
    positions = next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
    if positions is None or not _numbers_after_pad(tower):
        return positions
    return positions - (getattr(tower, "pad_token_id", None) or 0) - 1


def _numbers_after_pad(tower: PreTrainedConfig) -> bool:
    """Whether the tower's own code derives positions from token ids."""
    module = type(tower).__module__
    if not module.startswith("transformers.models."):
        return False
    code = vars(import_module(module.replace(".configuration_", ".modeling_")))
    return _NUMBERS_AFTER_PAD in code or any(
        hasattr(value, _NUMBERS_AFTER_PAD) for value in code.values() if isinstance(value, type)
    )
