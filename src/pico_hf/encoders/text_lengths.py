"""How long the texts of an architecture are: padded to a length, and at most as many tokens."""

from __future__ import annotations

from transformers import PreTrainedConfig

from pico_hf.encoders.padding import text_positions
from pico_hf.encoders.table import ENCODERS


def text_lengths(config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """(tokens every text has to be padded to or None, positions that the text tower has or None).

    Args:
        config: The encoder's configuration.
    """
    names = getattr(config, "architectures", None) or ()
    keys = [f"{config.model_type}/{name}" for name in names] + [config.model_type]
    row = next((ENCODERS[key] for key in keys if key in ENCODERS), None)
    tower = getattr(config, (row.text.config if row else None) or "text_config", None)
    positions = text_positions(tower)
    return (positions if row and row.text.pad_is_special else None), positions
