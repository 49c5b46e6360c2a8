"""Compares a configuration with the weights it came with, before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from pico_hf.configuration_pico import PicoConfig
from pico_hf.encoders.table import encoder_class
from pico_hf.hub.errors import plain_build, shortened

# Far more than any tower has; what a stranger's file says beyond that is no label or layer.
_MOST_LABELS = 100_000
_DEEPEST = 64
# What a model meets when it is called, long after it was built.
_FLAGS = ("output_hidden_states", "output_attentions", "return_dict", "use_return_dict")
_IDS = ("_token_id", "_token_index")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "_dim")
# Heads that a checkpoint lacks are small beside the towers that it has.
_SLACK, _SPARE = 2, 10_000_000
_PACKED = 16  # 2-bit numbers in 32-bit words


def check_config(
    path: str | os.PathLike,
    raw: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    try_encoder: Callable[[PreTrainedModel], None],
) -> None:
    """Refuses a configuration that no model can have, or that the weights do not bear out.

    Args:
        path: What is read, for the message.
        raw: The content of config.json.
        shapes: Name → shape of the weights.
        try_encoder: Calls the encoder, which has no numbers.

    Raises:
        ValueError: If a value has the wrong type, if the model would be far larger than what the
            files hold, or if its encoder cannot be called.
    """
    for key, value in _values(raw):
        if (key in _FLAGS and not (isinstance(value, int) or value is None)) or (
            key.endswith(_IDS) and not _is_id(value)
        ):
            raise ValueError(
                f"`{key}` in config.json of '{os.fspath(path)}' must be "
                f"{'true or false' if key in _FLAGS else 'a whole number below 2^31'}, got "
                f"{shortened(repr(value), 80)}. Save the model again."
            )
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if key.endswith(_SIZES) and value <= 0:
            raise ValueError(
                f"`{key}` in config.json of '{os.fspath(path)}' must be > 0, got {value}. Save the "
                "model again."
            )
        limit = _limit(key, shapes)
        if limit is not None and value > limit:
            raise ValueError(
                f"`{key}` in config.json of '{os.fspath(path)}' is {value}, but its weights have "
                f"room for {limit} at most. Do not trust this file, or save the model again."
            )
    with plain_build(path, "config.json"):
        encoder = _described_encoder(raw)
    needed = sum(parameter.numel() for parameter in encoder.parameters())
    held = sum(math.prod(shape) for shape in shapes.values())
    held *= _PACKED if raw.get("quantization_config") else _SLACK
    if needed > held + _SPARE:
        raise ValueError(
            f"config.json of '{os.fspath(path)}' describes a model of {needed} numbers, but its "
            f"files hold {sum(math.prod(shape) for shape in shapes.values())}. Do not trust this "
            "file, or save the model again."
        )
    with plain_build(path, "config.json"):
        try_encoder(encoder)


def _limit(key: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The largest number that a key may have: what it says is counted one by one in Python."""
    if key == "num_labels":
        return _MOST_LABELS
    if "layers" in key or key.startswith(("depth", "num_block")):
        return len(shapes)
    return None


def _described_encoder(raw: Mapping[str, Any]) -> PreTrainedModel:
    """The described encoder on the meta device: without memory for its numbers."""
    config = described(raw)
    encoder: Any = config.encoder_config if isinstance(config, PicoConfig) else config
    chosen: Any = encoder_class(encoder.model_type, encoder.architectures)
    build = AutoModel.from_config if chosen is AutoModel else chosen._from_config
    with torch.device("meta"), no_init_weights():
        return build(encoder)


def described(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that a config.json describes; any error if there is none.

    Args:
        raw: Its content.
    """
    values = {name: value for name, value in raw.items() if name != "model_type"}
    return AutoConfig.for_model(raw["model_type"], **values)


def _is_id(value: Any) -> bool:
    return value is None or (type(value) is int and abs(value) < 2**31)


def _values(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every value of a configuration with its key, those in lists with that of the list."""
    if depth > _DEEPEST:
        raise ValueError("config.json is nested too deeply. Do not trust this file.")
    if isinstance(value, Mapping):
        if key in _FLAGS or key.endswith(_IDS):
            yield key, value
        for name, item in value.items():
            yield from _values(item, str(name), depth + 1)
    elif isinstance(value, list) and key in _FLAGS:
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, key, depth + 1)
    else:
        yield key, value
