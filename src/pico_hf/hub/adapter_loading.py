"""Loads an adapter onto its base, kept apart from it or merged into it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.configuration_pico import PicoConfig, split_config_kwargs
from pico_hf.hub.adapter_files import Adapter, base_model, live_module, read_adapter
from pico_hf.hub.adapter_rules import BASE_CHANGING, import_peft
from pico_hf.hub.errors import plain_build, plain_errors


def load_adapter(
    model_class: Any,
    path: str | os.PathLike,
    *,
    base: str | os.PathLike | PreTrainedModel | None = None,
    trainable: bool = False,
    adapters: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """An adapter on its base as a peft model; see `pico_hf.lora.load_adapter_model`.

    Args:
        model_class: [`PicoModel`], which comes after this module.
        path: Folder or repository of the adapter.
        base: What it was trained on; None = what it names.
        trainable: True goes on training it.
        adapters: Adapters whose base this is.
        options: Loading options.
    """
    import_peft()  # before anything is fetched
    adapters = (*adapters, _identity(path))
    if adapters[-1] in adapters[:-1]:
        raise ValueError(
            f"The adapter '{os.fspath(path)}' names itself as its base, directly or by way of "
            "another one. Pass `base=`: the model that it was trained on."
        )
    pico, options = split_config_kwargs(options)
    adapter = read_adapter(path, options, pico)
    model = _base(model_class, path, adapter, base, {**options, "adapters": adapters})
    with plain_build(path), _unchanged_on_failure(model):
        beside = type(model.prototypes).from_pretrained
        _take_prototypes(model, adapter, None if adapter.prototypes else beside(path, **options))
        attached = _attach(model, adapter, trainable)
        live_module(base_model(attached).pair_logits).check()
        return attached


def merge_adapter(model_class: Any, path: str | os.PathLike, **options: Any) -> Any:
    """An adapter merged into its base, a plain model of which every weight can be trained again.

    Args:
        model_class: [`PicoModel`].
        path: Folder or repository of the adapter.
        options: See `load_adapter`.

    Raises:
        ValueError: If a weight of the model would be no number.
    """
    model = load_adapter(model_class, path, **options).merge_and_unload()
    for name, value in model.named_parameters():
        if not value.is_meta and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"The adapter '{os.fspath(path)}' cannot be merged: `{name}` of the model would "
                "contain NaN or infinity. Do not trust its weights, or save it again."
            )
    return model.requires_grad_(True).eval()


def check_weights(peft_model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError unless the weights are exactly those of the live adapter.

    peft itself leaves what is missing as it is. It also saves the embeddings of the base where it
    takes them for changed: those may be there.

    Args:
        peft_model: The live adapter on its base.
        weights: Names and tensors of the file.
    """
    adapter_name = peft_model.active_adapters[0]
    live = import_peft().get_peft_model_state_dict(
        peft_model, adapter_name=adapter_name, save_embedding_layers=False
    )
    expected = {(name, tuple(tensor.shape)) for name, tensor in live.items()}
    found = {(name, tuple(tensor.shape)) for name, tensor in weights}
    whole = {(name, tuple(tensor.shape)) for name, tensor in peft_model.state_dict().items()}
    if wrong := (expected - found) | (found - expected - whole):
        name, shape = sorted(wrong)[0]
        lacks = "the file lacks" if (name, shape) in expected else "the model has no place for"
        raise ValueError(
            f"The adapter does not fit its base: {lacks} `{name}` of shape {shape}. Load it onto "
            "the model that it was trained on: `base=…`."
        )


def _identity(path: str | os.PathLike) -> str:
    return str(Path(path).resolve()) if os.path.isdir(path) else os.fspath(path)


def _base(
    model_class: Any,
    path: str | os.PathLike,
    adapter: Adapter,
    base: str | os.PathLike | PreTrainedModel | None,
    options: dict[str, Any],
) -> Any:
    """The Pico model that the adapter is put onto."""
    learned = bool(adapter.knobs.get("fallback_widths"))
    model: Any = base
    if isinstance(base, PreTrainedModel):
        if base.config.model_type != PicoConfig.model_type:
            model = model_class.from_encoder(base, fallback_projection=learned)
    else:
        named = base or adapter.lora.get("base_model_name_or_path")
        if not named:
            raise ValueError(
                f"The adapter '{os.fspath(path)}' does not name its base. Pass `base=`: the "
                "repository, folder or live model that it was trained on."
            )
        own = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
        revision = {} if base else {"revision": adapter.lora.get("revision") or "main"}
        with plain_errors(named):
            model = model_class.from_pretrained(
                named, fallback_projection=learned, **own, **revision
            )
    if model.encoder.config.model_type != adapter.encoder_type:
        raise ValueError(
            f"The adapter was trained on an encoder of type {adapter.encoder_type!r}, its base has "
            f"one of type {model.encoder.config.model_type!r}. Pass the right one as `base=`."
        )
    return model


def _take_prototypes(model: Any, adapter: Adapter, prototypes: Any) -> None:
    """Gives the base the adapter's knobs, and its prototypes or room for those that it carries."""
    for name, value in adapter.knobs.items():
        setattr(model.config, name, value)
    rebuilt = type(model.prototypes).for_config(model.config, model.encoder)
    if prototypes is not None:
        columns = len(prototypes.semantic_probability)
        if columns != len(rebuilt.semantic_probability):
            raise ValueError(
                f"The adapter does not fit its base: its prototypes have {columns} columns, the "
                f"base has {len(rebuilt.semantic_probability)}. Pass the right one as `base=`."
            )
        prototypes.place_beside(model.encoder)
        rebuilt = prototypes
    model.prototypes = rebuilt.to(model.device)


@contextmanager
def _unchanged_on_failure(model: Any) -> Iterator[None]:
    """Gives a live base its own knobs and prototypes back if the adapter does not fit."""
    knobs, prototypes = dict(model.config.__dict__), model.prototypes
    try:
        yield
    except Exception:
        model.config.__dict__.update(knobs)
        model.prototypes = prototypes
        raise


def _attach(model: Any, adapter: Adapter, trainable: bool) -> Any:
    peft = import_peft()
    fields = {**adapter.lora, "inference_mode": not trainable}
    changes = fields.get("init_lora_weights") in BASE_CHANGING
    # What changes the base is put onto it only when it is known to fit.
    for values in ({**fields, "init_lora_weights": True}, fields) if changes else (fields,):
        wrapped = peft.PeftModel(model, peft.LoraConfig(**values))
        try:
            check_weights(wrapped, adapter.weights.items())
        except ValueError:
            wrapped.unload()  # a live base stays what it was
            raise
        if values is not fields:
            wrapped.unload()
    peft.set_peft_model_state_dict(wrapped, adapter.weights)
    return wrapped.eval()
