"""Loads a Pico model from a folder or Hub repository, or makes one of another encoder.

Functions take the model or its class, since the class calls them.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, VisionTextDualEncoderModel

from pico_hf.configuration_pico import PicoConfig, split_config_kwargs
from pico_hf.encoders.check import check_encoder, fallback_widths, load_encoder, try_encoder
from pico_hf.encoders.logit_scale import logit_scale, trusted_share
from pico_hf.encoders.table import ENCODERS, architecture
from pico_hf.hub.adapter_files import has_adapter, live_module
from pico_hf.hub.adapter_loading import merge_adapter
from pico_hf.hub.adapter_rules import CONFIG_FILE as ADAPTER_CONFIG
from pico_hf.hub.adapter_rules import names_of
from pico_hf.hub.errors import plain_build, plain_errors
from pico_hf.hub.files import NoSafetensorsError, converted_revision
from pico_hf.hub.prototype_files import PicoPrototypes
from pico_hf.hub.source import check_source, safe_options

logger = logging.getLogger(__name__)

SHARED_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
_ADAPTER: dict[str, Any] = {}  # stands for the configuration of weights that need a base


def load_model(
    model_class: Any,
    load_stock: Callable[..., Any],
    path: str | os.PathLike | None,
    *args: Any,
    prototypes: str | os.PathLike | PicoPrototypes | None = None,
    base: str | os.PathLike | PreTrainedModel | None = None,
    adapters: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Loads a Pico model, wraps another dual encoder, or merges an adapter, whichever is there.

    Args:
        model_class: [`PicoModel`].
        load_stock: What transformers would do: `PreTrainedModel.from_pretrained` of that class.
        path: Folder or Hub repository.
        args: Of `PreTrainedModel.from_pretrained`.
        prototypes: See `PicoModel.from_pretrained`.
        base: See `PicoModel.from_pretrained`.
        adapters: Adapters whose base this is.
        options: See `PicoModel.from_pretrained`.
    """
    path = _unwrap_auto(options) or path
    if prototypes is not None and not isinstance(prototypes, PicoPrototypes):
        shared = {key: options[key] for key in SHARED_HUB_OPTIONS if key in options}
        prototypes = PicoPrototypes.from_pretrained(prototypes, **shared)
    source = {} if path is None else _checked(path, options, prototypes is not None)
    if base is not None and source is not _ADAPTER:
        raise ValueError(f"`base` is for adapters, which '{path}' is not. Leave it out.")
    asked = options.pop("output_loading_info", False)
    with plain_errors(path or ""), plain_build(path or ""):
        if source is _ADAPTER:
            model = merge_adapter(model_class, path, base=base, adapters=adapters, **options)
            info: dict[str, Any] = {}  # its weights are exactly those of the file
        elif _is_foreign(source) and options.get("config") is None and not args:
            pico, rest = split_config_kwargs(options)
            told = {**safe_options(rest), "output_loading_info": True}
            encoder, info = load_encoder(path, source, **told)
            model = model_class.from_encoder(encoder, **pico)
        else:
            for known in ("fallback_projection", "pooled_share"):  # by a saved Pico model
                options.pop(known, None)
            told = {**safe_options(options), "output_loading_info": True}
            model, info = load_stock(path, *args, **told)
            _refuse_missing_weights(path, model, info)
    if prototypes is not None:
        model.adopt_prototypes(prototypes)
    live_module(model.pair_logits).check()
    _ = model.pooled_share  # asked here, since a compiled graph cannot
    return (model, _loading_info(info)) if asked else model


def wrap_encoder(
    model_class: Any,
    encoder: PreTrainedModel,
    fallback_projection: bool,
    pooled_share: float | None,
    fields: dict[str, Any],
) -> Any:
    """Builds a Pico model around a live encoder; see `PicoModel.from_encoder`.

    Args:
        model_class: [`PicoModel`].
        encoder: The dual encoder.
        fallback_projection: True accepts an architecture without a row in the table.
        pooled_share: See `PicoModel.from_encoder`.
        fields: Of [`PicoConfig`].
    """
    new = fallback_projection and architecture(encoder) not in ENCODERS
    if new:
        widths = fallback_widths(encoder)
        fields = {**fields, "fallback_widths": widths}
        logger.warning(
            "%s has no row in the encoder table: its common space of %d columns is untrained. "
            "Train it before you use its scores.",
            type(encoder).__name__,
            widths[-1],
        )
    else:
        check_encoder(encoder)
    model = model_class(PicoConfig(encoder_config=encoder.config.to_dict(), **fields), encoder)
    log_scale, bias = logit_scale(encoder)
    share = trusted_share(encoder) if pooled_share is None else pooled_share
    model.prototypes.share_score(share)
    with torch.no_grad():
        model.logit_scale.fill_(log_scale - math.log(2.0 - share))  # S spans twice a cosine's range
        model.logit_bias.fill_(bias or 0.0)
    model.name_or_path = encoder.name_or_path  # what an adapter says it was trained on
    model.to(dtype=encoder.dtype, device=encoder.device)
    return model.train(encoder.training)


def adopt_prototypes(model: Any, prototypes: PicoPrototypes) -> None:
    """Gives a model prototypes that were saved alone; see `PicoModel.adopt_prototypes`."""
    prototypes.check_fit(model.encoder, len(model.semantic_probability))
    prototypes.place_beside(model.encoder)
    for name, value in prototypes.config_fields.items():
        setattr(model.config, name, value)
    wrapper, share = model.prototypes, model.pooled_share
    if hasattr(wrapper, "modules_to_save"):  # an adapter's copy stands for them
        wrapper.modules_to_save[wrapper.active_adapters[0]] = prototypes.to(model.device)
    else:
        model.prototypes = prototypes.to(model.device)
    # As if the encoder had been wrapped with their share.
    live_module(model.pair_logits).follow_share(share, model.pooled_share)


def join_towers(
    vision: str | os.PathLike, text: str | os.PathLike, options: dict[str, Any]
) -> PreTrainedModel:
    """Checks a vision and a text tower and joins them into one encoder with new projections.

    Args:
        vision: Path or repository of the vision tower.
        text: Path or repository of the text tower.
        options: Of `VisionTextDualEncoderModel.from_vision_text_pretrained`.
    """
    for side, path in (("vision", vision), ("text", text)):
        own = {k.removeprefix(f"{side}_"): v for k, v in options.items() if k.startswith(side)}
        check_source(path, own, try_encoder)
    return VisionTextDualEncoderModel.from_vision_text_pretrained(
        os.fspath(vision),
        os.fspath(text),
        **{**options, "vision_use_safetensors": True, "text_use_safetensors": True},
    )


def _is_foreign(source: dict[str, Any]) -> bool:
    return source.get("model_type") not in (None, PicoConfig.model_type)


def _refuse_missing_weights(path: Any, model: Any, info: dict[str, Any]) -> None:
    """Raises ValueError for a model whose files lack weights: they would be random ones.

    Prototypes that were not saved at all are those before any refinement, and so are the bases of
    canonical columns: nothing of them is random.
    """
    own = {name for name in model.state_dict() if name.startswith("prototypes.")}
    bases = {"prototypes.image_basis", "prototypes.text_basis"}
    lost = set(info["missing_keys"])
    lost -= own if own <= lost else bases
    if lost:
        raise ValueError(
            f"'{path}' must hold a whole {type(model).__name__}, but lacks {names_of(lost)}. "
            "Download or save the model again."
        )


def _loading_info(info: dict[str, Any]) -> dict[str, Any]:
    """What `output_loading_info=True` gives, with an entry for everything."""
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {**{name: set() for name in names}, "error_msgs": [], **info}


def _unwrap_auto(options: dict[str, Any]) -> str | None:
    """Finds the adapter that `AutoModel` was asked for: it passes it on as an option of its base.

    Stock code would put the adapter onto a base whose weights it reads under other names, so that
    the base would keep random weights.
    """
    adapter = options.get("adapter_kwargs") or {}
    path = adapter.get("_adapter_model_path")
    if path is not None:
        for name in ("adapter_kwargs", "config", "_from_auto", "revision"):
            options.pop(name, None)
        options |= {key: adapter[key] for key in ("revision", "token") if adapter.get(key)}
    return path


def _checked(path: str | os.PathLike, options: dict[str, Any], chosen: bool) -> dict[str, Any]:
    """Reads the configuration; sets `revision` to the bot's conversion if there is nothing else."""
    try:
        source = check_source(path, options, try_encoder, chosen)
        if has_adapter(path, options):
            raise ValueError(  # transformers would put the one onto the other: twice, if merged
                f"'{os.fspath(path)}' holds a whole model and an adapter as well "
                f"({ADAPTER_CONFIG} beside config.json and its weights). Keep them in folders of "
                "their own."
            )
        return source
    except NoSafetensorsError:
        if has_adapter(path, options):
            return _ADAPTER
        revision = converted_revision(path, options)
        if revision is None:
            raise
        options["revision"] = revision
        return check_source(path, options, try_encoder, chosen)
