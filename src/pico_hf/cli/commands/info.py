"""`pico-hf info`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Failed, Table
from pico_hf.cli.options import Base

PANEL = "Models"


def command(
    source: Annotated[
        str,
        typer.Argument(help="Model (a folder or repository) or index (a folder or an address)."),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Of an index: read every byte and find any damage.")
    ] = False,
    base: Base = None,
) -> Answer:
    """Tell what a model or an index is: encoder, columns, weights, fingerprint, sizes."""
    from pico_hf.cli.index_facts import index_facts
    from pico_hf.cli.indexes import noted_model
    from pico_hf.search.qdrant_places import is_there, is_url

    if is_url(source) or is_there(source):
        try:
            model = noted_model(source)
        except Failed:  # what else it is can be told
            model = None
        values = index_facts(source, model, verify)
    elif os.path.isdir(source) and not any(
        Path(source, name).is_file() for name in ("config.json", "adapter_config.json")
    ):
        raise Failed(f"{source!r} holds neither a model (config.json) nor an index (index.json).")
    else:
        values = model_facts(source, base)
    told = {name: value for name, value in values.items() if value is not None}
    rows = [(name.replace("_", " "), _cell(value, name)) for name, value in told.items()]
    return Answer(values, [Table(("", source), rows)])


def _cell(value: Any, name: str = "") -> str:
    if name == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, dict):
        between = "\n" if name == "fingerprint" else ", "
        return between.join(f"{key} {_cell(own)}" for key, own in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "yes" if value is True else "no" if value is False else str(value)


def model_facts(source: str, base: str | None = None) -> dict[str, Any]:
    """What a model is.

    Args:
        source: Folder or repository.
        base: For an adapter that does not name its base.
    """
    from pico_hf.cli.index_facts import folder_bytes
    from pico_hf.encoders.projection_modules import projection_parameters
    from pico_hf.hub.fingerprint import encoder_fingerprint
    from pico_hf.modeling_pico import PicoModel

    model: Any = PicoModel.from_pretrained(source, **({} if base is None else {"base": base}))
    weights, prototypes = model.column_weights, model.prototypes
    return {
        "kind": "model",
        "encoder": model.encoder.config.model_type,
        "columns": len(weights),
        "estimators": ", ".join(prototypes.estimators),
        "rotated": prototypes.form.image_basis is not None,
        "proposals": int(prototypes.iteration),
        "column_weights": {
            "min": float(weights.min()),
            "median": float(weights.median()),
            "max": float(weights.max()),
            "std": float(weights.std(correction=0)),
        },
        "pooled_share": model.pooled_share,
        "loss": model.config.loss,
        "parameters": sum(part.numel() for part in model.parameters()),
        "type": str(model.dtype).removeprefix("torch."),
        "bytes": folder_bytes(source) if os.path.isdir(source) else None,
        "fingerprint": encoder_fingerprint(model.encoder, projection_parameters(model.encoder)),
    }
