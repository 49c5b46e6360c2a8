"""Encoders with random weights, and new projections for architectures without a row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from pico_hf.encoders.table import FALLBACK, encoder_class


def complete_encoder(
    encoder: PreTrainedModel | None, config: PreTrainedConfig, widths: Sequence[int] | None
) -> PreTrainedModel:
    """The encoder of a model: given or built, with untrained projections if it needs them.

    Args:
        encoder: A live encoder, changed in place; None builds one.
        config: What to build.
        widths: See [`add_fallback_projections`]; None or empty adds none.
    """
    if encoder is None:
        encoder = build_encoder(config)
    if widths:
        add_fallback_projections(encoder, widths)
    return encoder


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds an encoder with random weights."""
    chosen = encoder_class(config.model_type, config.architectures)
    return (AutoModel.from_config if chosen is AutoModel else chosen._from_config)(config)


def add_fallback_projections(encoder: PreTrainedModel, widths: Sequence[int]) -> None:
    """Adds untrained projections to an encoder that has no row in the table.

    Args:
        encoder: The encoder, changed in place.
        widths: Widths of image hidden states, text hidden states and the common space.
    """
    image, text, columns = widths
    heads = {
        "image": nn.Linear(image, columns, bias=False),
        "text": nn.Linear(text, columns, bias=False),
    }
    encoder.add_module(FALLBACK, nn.ModuleDict(heads).to(encoder.device, encoder.dtype))
