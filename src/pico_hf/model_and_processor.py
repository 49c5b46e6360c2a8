"""A model and its processor, both live or both from one path."""

from __future__ import annotations

import os
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from pico_hf.data.collator import PicoCollator
from pico_hf.hub.errors import plain_build, plain_errors, shortened
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
        processor = load_processor(processor, getattr(model, "config", None))
    return model, processor


def load_processor(path: str | os.PathLike, config: Any) -> Any:
    """A processor that was tried once: settings of a wrong type are noticed where they are used.

    Args:
        path: Folder or Hub repository.
        config: The model's.

    Raises:
        OSError: If there is none.
        ValueError: If its files cannot be right.
    """
    with plain_errors(path), plain_build(path, "processor's files"):
        processor = AutoProcessor.from_pretrained(path)
        grey = Image.new("RGB", (64, 48), (128, 128, 128))
        try:
            batch = PicoCollator(processor, config=config)([{"image": grey, "caption": "a"}])
        except BaseException as error:
            # A panic of the tokenizers' Rust is no Exception; so small an image fills no memory.
            told = isinstance(error, ValueError | MemoryError)
            if not told and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"The processor's files of '{os.fspath(path)}' cannot be right "
                f"({type(error).__name__}: {shortened(error)})."
            ) from error
    for name, values in batch.items():
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"The processor's files of '{os.fspath(path)}' make `{name}` of a grey image that "
                "are not finite. Check `image_mean`, `image_std` and `rescale_factor`."
            )
    return processor
