"""The metrics of `pico_hf.core.metrics` for the library `evaluate`, found without a network."""

from __future__ import annotations

from pathlib import Path


def retrieval_metric_path() -> str:
    """Path to hand to `evaluate.load`, which needs no network for it.

    Returns:
        Path of the metric script.

    Example:
        >>> Path(retrieval_metric_path()).name
        'image_text_retrieval.py'
    """
    return str(Path(__file__).parent / "image_text_retrieval.py")
