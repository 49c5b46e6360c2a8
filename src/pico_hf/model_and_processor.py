"""A model and its processor, both live or both from one path."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoProcessor

from pico_hf.hub.errors import plain_errors
from pico_hf.modeling_pico import PicoModel


def model_and_processor(
    model: PicoModel | str | os.PathLike, processor: Any = None, **options: Any
) -> tuple[Any, Any]:
    """Loads what is given as a path.

    Args:
        model: A model, which is returned as it is; or a folder or Hub repository of a Pico model,
            of an adapter or of any supported dual encoder.
        processor: What `AutoProcessor` gives, or a path of one; None takes that of the model's
            path.
        options: Of `PicoModel.from_pretrained`, for a path.

    Returns:
        The model, and the processor. A model that was loaded is in eval mode and on a GPU if there
        is one.

    Raises:
        OSError: If a path holds no model or no processor.
        ValueError: If there is a live model and no processor.
    """
    if isinstance(model, str | os.PathLike):
        processor = model if processor is None else processor
        loaded: Any = PicoModel.from_pretrained(model, **options).eval()
        model = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    if processor is None:
        raise ValueError(
            "`processor` must be given with a live model, got None. Load it with "
            "AutoProcessor.from_pretrained(…)."
        )
    if isinstance(processor, str | os.PathLike):
        with plain_errors(processor):
            processor = AutoProcessor.from_pretrained(processor)
    return model, processor
