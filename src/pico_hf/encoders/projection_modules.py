"""What comes after an encoder's hidden states: its modules, their parameters, its columns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from pico_hf.encoders.spec import Step, tower_config
from pico_hf.encoders.table import encoder_spec


def steps_of(encoder: PreTrainedModel) -> tuple[Step, ...]:
    """Modules that are applied to the hidden states of either side."""
    spec = encoder_spec(encoder)
    return (*spec.image.steps, *spec.text.steps)


def projection_modules(encoder: PreTrainedModel) -> list[str]:
    """Dotted paths of the encoder's modules that are applied after the hidden states."""
    return sorted({step.path for step in steps_of(encoder)})


def projection_parameters(encoder: PreTrainedModel) -> list[str]:
    """Names of the encoder's parameters that are applied after the hidden states."""
    modules = tuple(f"{path}." for path in projection_modules(encoder))
    return [name for name, _ in encoder.named_parameters() if name.startswith(modules)]


def linear_heads(encoder: PreTrainedModel) -> dict[str, tuple[Sequence[Step], nn.Linear]]:
    """The linear module that each side ends in, and the steps before it, by side.

    Raises:
        ValueError: If a side has none, or both have the same one.
    """
    spec, heads = encoder_spec(encoder), {}
    for side, row in (("image", spec.image), ("text", spec.text)):
        last = encoder.get_submodule(row.steps[-1].path) if row.steps else None
        if not isinstance(last, nn.Linear):
            raise ValueError(
                f'`projection_start="closed_form"` needs a linear projection at the end of the '
                f"{side} side, got {'none' if last is None else type(last).__name__} in "
                f'{type(encoder).__name__}. Leave it at "as_is".'
            )
        heads[side] = (row.steps[:-1], last)
    if heads["image"][1] is heads["text"][1]:
        raise ValueError(
            '`projection_start="closed_form"` needs a projection per side, got one for both in '
            f'{type(encoder).__name__}. Leave it at "as_is".'
        )
    return heads


def embedding_dim(encoder: PreTrainedModel) -> int:
    """D, the number of columns of the common space."""
    row = encoder_spec(encoder).text
    if not row.steps:
        return tower_config(encoder, row, "text").hidden_size
    last = encoder.get_submodule(row.steps[-1].path)
    linears = [module for module in last.modules() if isinstance(module, nn.Linear)]
    return linears[-1].out_features
