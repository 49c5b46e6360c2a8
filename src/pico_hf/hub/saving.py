"""Saves a Pico model, or what belongs beside an adapter, as a folder or Hub repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pico_hf.hub.adapter_files import base_model, write_fields
from pico_hf.hub.permissions import ordinary_permissions
from pico_hf.hub.prototype_files import save_prototypes
from pico_hf.hub.remote_code import write_modules
from pico_hf.hub.weights import refuse_mixture, remove_stale

HUB_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "revision",
    "create_pr",
    "tags",
)


def save_model(
    model: Any,
    save_stock: Callable[..., None],
    folder: str | os.PathLike,
    *,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Saves weights, prototypes and configuration, and the package's modules if they travel along.

    The original-format key names of some towers cannot be read back by
    `Trainer(resume_from_checkpoint=…)`, which loads with `strict=False` and would lose those
    weights in silence; so `save_original_format` is False here.

    Args:
        model: A [`PicoModel`].
        save_stock: What transformers would do: the model's `PreTrainedModel.save_pretrained`.
        folder: Created if need be.
        push_to_hub: True uploads as well, to `repo_id` or the folder's name.
        options: Of `PreTrainedModel.save_pretrained`; with `push_to_hub` also its arguments.
    """
    hub = {key: options.pop(key) for key in HUB_ARGUMENTS if push_to_hub and key in options}
    options.setdefault("save_original_format", False)
    refuse_mixture(folder, adapter=False)
    save_stock(folder, **options)
    if options.get("is_main_process", True):
        remove_stale(folder, options.get("variant"))
        ordinary_permissions(folder, "model*.safetensors")
        save_prototypes(model, folder)
        if model._auto_class is not None:
            write_modules(folder)
    if push_to_hub:  # only now: the stock method would upload before these files are written
        model.push_to_hub(hub.pop("repo_id", Path(folder).name), **hub)


def save_companions(peft_model: Any, folder: str | os.PathLike) -> None:
    """Saves what peft does not: prototypes and configuration, so that the base can be rebuilt.

    Args:
        peft_model: The adapter on its base.
        folder: Where peft has saved the adapter.
    """
    model = base_model(peft_model)
    if model is not peft_model:
        write_fields(peft_model, folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    ordinary_permissions(folder, "adapter_model*.safetensors")
    save_prototypes(model, folder)
