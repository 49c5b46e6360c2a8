"""Checks what a folder or repository holds before any model is built from it."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pico_hf.configuration_pico import PicoConfig
from pico_hf.hub.errors import plain_errors
from pico_hf.hub.files import HUB_OPTIONS, check_model_files


def check_source(path: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """Checks a folder or repository before anything is built from it.

    Args:
        path: Folder or repository.
        options: The caller's keywords.

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
    remote = options.get("trust_remote_code") and "auto_map" in config
    if model_type not in CONFIG_MAPPING and not remote:
        raise ValueError(
            f"config.json of '{os.fspath(path)}' has model_type {model_type!r}, which is not known "
            "here. Import the module that registers it with `AutoConfig.register`, upgrade "
            "transformers, or pass `trust_remote_code=True` if you trust the repository's own code."
        )
    if options.get("use_safetensors") is False:
        raise ValueError(
            "`use_safetensors` must not be False: pickle files can run code and are never read "
            "here. Convert them once with `AutoModel.from_pretrained(…).save_pretrained(folder)`."
        )
    shapes = check_model_files(path, options, config.get("transformers_weights"))
    if model_type == PicoConfig.model_type:
        _check_prototypes({**config, **options}, shapes)
    return config


def _check_prototypes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    expected = (config.get("num_prototypes"), config.get("probe_size"))
    for name in ("prototypes.vision", "prototypes.text"):
        if None not in expected and shapes.get(name, expected) != expected:
            raise ValueError(
                f"`{name}` in the weights has the shape {shapes[name]}, but (`num_prototypes`, "
                f"`probe_size`) are {expected}. Load the model with the values it was saved with."
            )
    if "prototypes.image_basis" in shapes and config.get("estimator", "canonical") != "canonical":
        raise ValueError(
            f"`estimator` is {config['estimator']!r}, but the weights were saved with "
            "'canonical': their columns are not the encoder columns. Load the model with that."
        )


def safe_options(options: dict[str, Any]) -> dict[str, Any]:
    """Adds to the caller's options: no pickle, and no remote code unless it was asked for.

    Args:
        options: The caller's keywords.
    """
    # False is said outright, since transformers would ask on the terminal instead of failing.
    return {"trust_remote_code": False, **options, "use_safetensors": True}


def _raw_config(path: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    given = {key: options[key] for key in HUB_OPTIONS if key in options}
    with plain_errors(path):
        return PreTrainedConfig.get_config_dict(os.fspath(path), **given)[0]
