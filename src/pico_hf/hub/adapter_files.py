"""Reads and writes the files of an adapter and refuses those that cannot be right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pico_hf.configuration_pico import PROTOTYPE_FIELDS, PicoConfig, own_fields
from pico_hf.hub.adapter_rules import (
    CONFIG_FILE,
    checked_lora,
    json_fields,
    only_adapter,
    suffix_value,
)
from pico_hf.hub.errors import shortened
from pico_hf.hub.files import find_file, read_json, refuse_pickle, write_json
from pico_hf.hub.prototype_values import WEIGHTS_FILE as PROTOTYPES_FILE
from pico_hf.hub.prototype_values import check_values, refuse_stale
from pico_hf.hub.tensors import checked_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
# Modules that every adapter carries whole: buffers and bare numbers have no low rank.
CARRIED = ("prototypes", "pair_logits")
_PREFIX = "base_model.model."
_PROTOTYPES = f"{_PREFIX}prototypes."
_FIRST = (".lora_A.", ".lora_embedding_A")  # of the two matrices of a layer, of embeddings
_INSIDE = ".base_layer"  # what lies inside of an adapted layer is adapted with it
_NAMED = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)


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

    @property
    def prototypes(self) -> dict[str, Tensor]:
        """Buffers of the prototypes that it carries, empty if it carries none."""
        return _prototypes(self.weights)


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


def writable_fields(peft_model: Any) -> dict[str, Any]:
    """What adapter_config.json is to say of a live adapter, by the rules that it is read by.

    Patterns become the names of the modules that they hold for: their order counts, which JSON
    files lose, and a name is never matched for ever.

    Args:
        peft_model: The adapter on its base.

    Raises:
        ValueError: If the adapter could not be read back.
    """
    config = only_adapter(peft_model)
    raw = json_fields(config)
    layers = {
        name: module
        for name, module in base_model(peft_model).named_modules()
        if "default" in (getattr(module, "lora_alpha", None) or {}) and _INSIDE not in name
    }
    if layers:
        raw["target_modules"] = sorted(layers)
        raw |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    for pattern, attribute in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = {name: getattr(module, attribute)["default"] for name, module in layers.items()}
        raw[pattern] = {name: v for name, v in values.items() if v != raw[attribute]}
    checked_lora(raw, "the adapter's configuration")
    return raw


def write_fields(peft_model: Any, folder: str | os.PathLike) -> None:
    """Writes adapter_config.json once more, with names instead of patterns.

    Args:
        peft_model: The adapter on its base.
        folder: Where peft has saved it.
    """
    path = Path(folder) / CONFIG_FILE
    mine, saved = writable_fields(peft_model), read_json(path)
    write_json(
        path,
        {name: mine.get(name, value) if name in _NAMED else value for name, value in saved.items()},
    )


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
    lora = checked_lora(read_json(found))
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
    _check_prototypes(shapes, knobs)
    own = _prototypes(weights)
    check_values(own, WEIGHTS_FILE)
    local = os.path.isdir(path)  # a repository gets both in one commit
    beside = find_file(path, PROTOTYPES_FILE, options) if local or not own else None
    refuse_stale(beside, own, WEIGHTS_FILE)
    if not own and beside is None:
        raise OSError(
            f"'{os.fspath(path)}' has prototypes neither in {WEIGHTS_FILE} nor in "
            f"{PROTOTYPES_FILE}. Save adapters with `PicoTrainer` or `save_adapter`."
        )
    lora = _within_ranks(lora, shapes)
    encoder = raw.get("encoder_config")
    kind = encoder.get("model_type") if isinstance(encoder, dict) else None
    return Adapter(lora, weights, knobs, kind)


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
        raise ValueError(f"config.json is not valid: {shortened(error)}") from error
    if lost := sorted(set(PROTOTYPE_FIELDS) - knobs.keys()):
        raise ValueError(f"config.json lacks {', '.join(lost)}. Save the adapter again.")
    return knobs


def _prototypes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(_PROTOTYPES): value
        for name, value in weights.items()
        if name.startswith(_PROTOTYPES)
    }


def _check_prototypes(shapes: Mapping[str, tuple[int, ...]], knobs: Mapping[str, Any]) -> None:
    """The adapter carries prototypes of the right shape, or none at all."""
    expected = (knobs["num_prototypes"], knobs["probe_size"])
    carried = any(name.startswith(_PROTOTYPES) for name in shapes)
    for side in ("vision", "text"):
        if carried and shapes.get(f"{_PROTOTYPES}{side}") != expected:
            raise ValueError(
                f"{WEIGHTS_FILE} must hold prototypes of the shape {expected} that config.json "
                f"names (`num_prototypes`, `probe_size`), got {shapes.get(f'{_PROTOTYPES}{side}')}."
            )


def _within_ranks(lora: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Checks the rank of every pair of matrices; the fields with no rank larger than those.

    A rank that no pair has would be allocated before it is noticed that its matrices are missing.
    """
    patterns, ranks = lora.get("rank_pattern") or {}, [1]
    for name, shape in shapes.items():
        first = next((mark for mark in _FIRST if mark in name), None)
        if first is None:
            continue
        other = name.replace(first, first.replace("_A", "_B"))
        if other not in shapes:
            raise ValueError(f"{WEIGHTS_FILE} has `{name}` but lacks `{other}`. Save it again.")
        module = name.removeprefix(_PREFIX).partition(first)[0].partition(_INSIDE)[0]
        rank = suffix_value(patterns, module, lora["r"])
        if not (shape[:1] == shapes[other][1:2] == (rank,)):
            raise ValueError(
                f"`{name}` in {WEIGHTS_FILE} must have the rank {rank} of {CONFIG_FILE}, got "
                f"{shape} and {shapes[other]}."
            )
        ranks.append(rank)
    narrow = {name: min(rank, max(ranks)) for name, rank in patterns.items()}
    return {**lora, "r": min(lora["r"], max(ranks)), "rank_pattern": narrow}
