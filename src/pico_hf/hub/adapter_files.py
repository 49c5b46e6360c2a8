"""Reads the files of an adapter and refuses those that cannot be right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from torch import Tensor

from pico_hf.configuration_pico import PROTOTYPE_FIELDS, PicoConfig, own_fields
from pico_hf.hub.files import (
    checked_tensors,
    find_file,
    read_json,
    refuse_pickle,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Modules that every adapter carries whole: buffers and bare numbers have no low rank.
CARRIED = ("prototypes", "pair_logits")
# Fields that import modules by name or change what the base is, with what peft itself writes there.
_UNSET = {
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "task_type": None,
    "loftq_config": None,
    "runtime_config": None,
}
_PROTOTYPES = "base_model.model.prototypes.vision"


@dataclass(frozen=True)
class Adapter:
    """The checked contents of an adapter's files.

    Attributes:
        lora: Fields of `peft.LoraConfig`.
        weights: Name → tensor, as peft names them.
        knobs: Fields of [`PicoConfig`] but the encoder's.
        encoder_type: `model_type` of the encoder.
    """

    lora: dict[str, Any]
    weights: dict[str, Tensor]
    knobs: dict[str, Any]
    encoder_type: str | None


def import_peft() -> Any:
    """Imports peft, which takes seconds and is an extra.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        # Not an import statement: transformers would ask for it wherever this module travels along.
        return import_module("peft")
    except ImportError as error:
        raise ImportError(
            "LoRA needs peft. Install it with `pip install pico-hf[lora]`."
        ) from error


def base_model(model: Any) -> Any:
    """The [`PicoModel`] inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def live_module(module: Any) -> Any:
    """The copy of a module that an adapter trains and saves, or the module itself."""
    if hasattr(module, "modules_to_save"):
        return module.modules_to_save[module.active_adapters[0]]
    return module


def has_adapter(path: str | os.PathLike, options: Mapping[str, Any]) -> bool:
    """True for a folder or repository with an adapter's configuration."""
    return find_file(path, CONFIG_FILE, dict(options)) is not None


def read_adapter(
    path: str | os.PathLike, options: dict[str, Any], changed: Mapping[str, Any] | None = None
) -> Adapter:
    """Reads an adapter's files and refuses what cannot be right.

    Args:
        path: Folder or repository.
        options: The caller's keywords.
        changed: Fields of [`PicoConfig`] to be taken instead of the stored ones.

    Raises:
        OSError: If a file is missing.
        ValueError: If a file is damaged, or if it is no LoRA adapter of a Pico model.
    """
    found = find_file(path, CONFIG_FILE, options, required=True)
    if found is None:
        raise OSError(f"'{os.fspath(path)}' has no {CONFIG_FILE}, so it holds no adapter.")
    lora = _lora_fields(read_json(found))
    pico = find_file(path, "config.json", options)
    if pico is None:
        raise OSError(
            f"'{os.fspath(path)}' has no config.json beside its adapter, so it is not known what "
            "its prototypes are. Save adapters with `PicoTrainer` or `save_adapter`."
        )
    raw = read_json(pico)
    knobs = _pico_fields(raw) | dict(changed or {})
    weights_file = find_file(path, WEIGHTS_FILE, options) or refuse_pickle(path, WEIGHTS_FILE)
    weights = dict(checked_tensors(weights_file))
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    _check_shapes(shapes, knobs, lora["r"])
    encoder = raw.get("encoder_config")
    kind = encoder.get("model_type") if isinstance(encoder, dict) else None
    return Adapter(lora, weights, knobs, kind)


def _lora_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Checks that this is a plain LoRA adapter: other fields change the base or import modules."""
    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f"{CONFIG_FILE} must have the `peft_type` 'LORA', got {raw.get('peft_type')!r}. Load "
            "other adapters with peft itself."
        )
    known = {field.name for field in fields(import_peft().LoraConfig)}
    for name, harmless in _UNSET.items():
        if raw.get(name) not in (None, {}, harmless):
            raise ValueError(f"`{name}` in {CONFIG_FILE} must not be set, got {raw[name]!r}.")
    known -= _UNSET.keys()
    if not isinstance(raw.get("init_lora_weights", True), bool):
        raise ValueError(
            f"`init_lora_weights` in {CONFIG_FILE} must be true or false, got "
            f"{raw['init_lora_weights']!r}: that would change the base. Save the adapter converted."
        )
    if not isinstance(raw.get("r"), int) or raw["r"] < 1:
        raise ValueError(
            f"`r` in {CONFIG_FILE} must be a rank of at least 1, got {raw.get('r')!r}."
        )
    return {name: value for name, value in raw.items() if name in known and name != "peft_type"}


def _pico_fields(raw: dict[str, Any]) -> dict[str, Any]:
    if raw.get("model_type") != PicoConfig.model_type:
        raise ValueError(
            f"config.json beside an adapter must have the model_type {PicoConfig.model_type!r}, "
            f"got {raw.get('model_type')!r}: it was not trained on a Pico model."
        )
    own = set(own_fields()) - {"encoder_config"}
    knobs = {name: value for name, value in raw.items() if name in own}
    try:
        PicoConfig(**knobs)
    except Exception as error:  # strict fields raise a class of their own
        raise ValueError(f"config.json is not valid: {' '.join(str(error).split())}") from error
    if lost := sorted(set(PROTOTYPE_FIELDS) - knobs.keys()):
        raise ValueError(f"config.json lacks {', '.join(lost)}. Save the adapter again.")
    return knobs


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], knobs: Mapping[str, Any], rank: int
) -> None:
    expected = (knobs["num_prototypes"], knobs["probe_size"])
    if shapes.get(_PROTOTYPES) != expected:
        raise ValueError(
            f"{WEIGHTS_FILE} must hold prototypes of the shape {expected} that config.json names "
            f"(`num_prototypes`, `probe_size`), got {shapes.get(_PROTOTYPES)}."
        )
    for name in shapes:
        other = name.replace(".lora_A.", ".lora_B.")
        if other == name:
            continue
        if other not in shapes:
            raise ValueError(f"{WEIGHTS_FILE} has `{name}` but lacks `{other}`. Save it again.")
        if not (shapes[name][0] == shapes[other][1] == rank):  # patterns of ranks are not ours
            raise ValueError(
                f"`{name}` in {WEIGHTS_FILE} must have the rank {rank} of {CONFIG_FILE}, got "
                f"{shapes[name]} and {shapes[other]}."
            )
