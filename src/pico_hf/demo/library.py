"""The library that the demo page is made with."""

from __future__ import annotations

import os
from typing import Any


def gradio() -> Any:
    """The library, told to send nothing.

    Raises:
        ImportError: If it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as found
    except ImportError as error:
        raise ImportError(
            "The demo page needs gradio, which is not installed: "
            '`pip install "pico-hf[demo-page]"`.'
        ) from error
    return found
