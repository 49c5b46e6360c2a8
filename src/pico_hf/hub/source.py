"""Checks what a folder or repository holds before any model is built from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pico_hf.configuration_pico import PicoConfig
from pico_hf.hub.config_checks import check_config
from pico_hf.hub.errors import plain_build, plain_errors, refuse_missing, shortened
from pico_hf.hub.files import HUB_OPTIONS, find_file
from pico_hf.hub.prototype_values import WEIGHTS_FILE, check_values, refuse_stale
from pico_hf.hub.weights import Stored, read_model_files


def check_source(
    path: str | os.PathLike,
    options: dict[str, Any],
    try_encoder: Callable[[PreTrainedModel], None],
    chosen: bool = False,
) -> dict[str, Any]:
    """Checks a folder or repository before anything is built from it.

    Args:
        path: Folder or repository.
        options: The caller's keywords.
        try_encoder: Calls an encoder without numbers, as its configuration describes it.
        chosen: True if the caller says which prototypes are meant.

    Returns:
        Its raw configuration.

    Raises:
        OSError: If there is no config.json, no weights that may be read, or no access.
        ValueError: If the type is unknown and no remote code is allowed to define it, if a file is
            damaged or hostile, or if pickle files are asked for.
    """
    config = _raw_config(path, options)
    if not config:
        raise OSError(
            f"'{os.fspath(path)}' has no config.json, so it holds no model. Check the path."
        )
    model_type = config.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    remote = options.get("trust_remote_code") and "auto_map" in config
    if not known and not remote:
        raise ValueError(
            f"config.json of '{os.fspath(path)}' has model_type {shortened(repr(model_type), 80)}, "
            "which is not known here. Import the module that registers it with "
            "`AutoConfig.register` (pico-hf --import FILE.py), upgrade transformers, or pass "
            "`trust_remote_code=True` if you trust the repository's own code."
        )
    if options.get("use_safetensors") is False:
        raise ValueError(
            "`use_safetensors` must not be False: pickle files can run code and are never read "
            "here. Convert them once with `AutoModel.from_pretrained(…).save_pretrained(folder)`."
        )
    stored = read_model_files(path, options, config.get("transformers_weights"))
    if model_type == PicoConfig.model_type:
        _check_prototypes({**config, **options}, stored)
        if not chosen and os.path.isdir(path):  # a repository gets both in one commit
            beside = find_file(path, WEIGHTS_FILE, options)
            refuse_stale(beside, stored.prototypes, stored.file)
    if known:
        check_config(path, config, stored.shapes, try_encoder)
    return config


def _check_prototypes(config: dict[str, Any], stored: Stored) -> None:
    expected = (config.get("num_prototypes"), config.get("probe_size"))
    for name in ("vision", "text"):
        found = tuple(stored.prototypes[name].shape) if name in stored.prototypes else expected
        if None not in expected and found != expected:
            raise ValueError(
                f"`prototypes.{name}` in the weights has the shape {found}, but (`num_prototypes`, "
                f"`probe_size`) are {shortened(expected, 80)}. Load the model with the "
                "values it was saved with."
            )
    sources = config.get("estimators", PicoConfig.estimators)
    listed = isinstance(sources, list | tuple)  # PicoConfig says what else is wrong with it
    if "image_basis" in stored.prototypes and listed and "canonical" not in sources:
        raise ValueError(
            f"`estimators` are {shortened(', '.join(map(str, sources)), 80)}, but the weights were "
            "saved with 'canonical' among them: their columns are not the encoder columns. Load "
            "the model with that."
        )
    check_values(stored.prototypes, stored.file)


def safe_options(options: dict[str, Any]) -> dict[str, Any]:
    """Adds to the caller's options: no pickle, and no remote code unless it was asked for.

    Args:
        options: The caller's keywords.
    """
    # False is said outright, since transformers would ask on the terminal instead of failing.
    return {"trust_remote_code": False, **options, "use_safetensors": True}


def _raw_config(path: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    given = {key: options[key] for key in HUB_OPTIONS if key in options}
    refuse_missing(path)
    with plain_errors(path), plain_build(path, "config.json"):
        config = PreTrainedConfig.get_config_dict(os.fspath(path), **given)[0]
    if not isinstance(config, dict):
        raise ValueError(f"config.json of '{os.fspath(path)}' must hold a JSON object.")
    return config
