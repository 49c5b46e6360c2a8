"""What the vectors of an index depend on: the image side of a model and its image processor."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from pico_hf.encoders.special_tokens import kept_prefix
from pico_hf.encoders.table import encoder_spec
from pico_hf.hub.fingerprint import encoder_fingerprint

# What differs between two builds of one image processor that read images alike.
_BUILDS = ("image_processor_type", "processor_class", "_processor_class")


def image_side_fingerprint(retriever: Any) -> dict[str, Any]:
    """Tells models apart by how they encode images.

    Column weights and the columns of an alignment are no part of it, since they go into the
    queries; neither is the text tower.

    Args:
        retriever: A `PicoRetriever`.

    Returns:
        `tower` (type name → digest, see `encoder_fingerprint`), digests `processor` and
        `calibration`, and `special_tokens`, how many of them are stored beside an image's patches.
    """
    model = retriever.model
    row, keep = encoder_spec(model.encoder).image, model.config.keep_special_tokens
    names = _image_side(retriever)
    return {
        "model_type": model.encoder.config.model_type,
        "tower": encoder_fingerprint(model.encoder, names),
        "processor": _processor(retriever),
        "calibration": _calibration(model),
        "special_tokens": len(kept_prefix(model.encoder, row, keep)),
    }


def check_same_encoder(stored: dict[str, Any] | None, live: dict[str, Any] | None) -> None:
    """Raises ValueError if vectors of two image sides cannot be compared.

    Args:
        stored: Of the model that an index was made with; None: without one.
        live: Of the model that is to search; None: without one, which any index allows.
    """
    if live is None:
        return
    if stored is None:
        raise ValueError("The index holds vectors without a model. Open it without `retriever`.")
    reasons = []
    if stored["model_type"] != live["model_type"]:
        reasons.append(f"it is of type {stored['model_type']}, this one {live['model_type']}")
    elif not set(stored["tower"].items()) & set(live["tower"].items()):
        reasons.append("the weights of its image tower are others")
    if stored["processor"] != live["processor"]:
        reasons.append("its image processor has other settings")
    if stored["calibration"] != live["calibration"]:
        reasons.append("its images were calibrated in another way")
    kept, keeps = (side.get("special_tokens", 0) for side in (stored, live))
    if kept != keeps:
        reasons.append(
            f"it holds {kept} special tokens (CLS, registers) beside the patches of an image, this "
            f"one keeps {keeps} (`keep_special_tokens`)"
        )
    if reasons:
        raise ValueError(
            f"The index was made with another model: {' and '.join(reasons)}. Open it with the "
            "model it was made with, or make an index with this one. (Column weights may differ.)"
        )


def _image_side(retriever: Any) -> list[str]:
    """Names of the parameters and buffers that take part when an image is encoded."""
    import numpy as np
    from PIL import Image

    encoder: nn.Module = retriever.model.encoder
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in encoder.named_modules()
        if name
    ]
    grey = Image.fromarray(np.full((64, 64, 3), 128, dtype=np.uint8))
    try:
        retriever.encode_images([grey])
    finally:
        for hook in hooks:
            hook.remove()
    prefixes = tuple(f"{name}." for name in called)
    return [name for name in encoder.state_dict() if name.startswith(prefixes)]


def _processor(retriever: Any) -> str:
    images = retriever.collate.image_processor
    settings = {key: value for key, value in images.to_dict().items() if key not in _BUILDS}
    settings["background"] = retriever.collate.background
    return _digest(json.dumps(settings, sort_keys=True, default=str).encode())


def _calibration(model: Any) -> str | None:
    calibration = getattr(model, "_calibration", None)
    if calibration is None:
        return None
    sides = (calibration.gallery, calibration.reference)
    values = [getattr(side, name) for side in sides for name in ("mean", "std")]
    return _digest(torch.cat([value.float().cpu().flatten() for value in values]).numpy().tobytes())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
