"""The fields of a row of the encoder table, which describes one architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

# How an architecture pools, which is what the self-check compares with.
POOLED_BY = {
    "token": "one token",
    "mean": "mean of the tokens",
    "attention": "attention over the tokens",
    "every": "every token is projected",
    "mean_first": "mean of the tokens, then a non-linear step",
}


@dataclass(frozen=True)
class Step:
    """One module on the way from a hidden state to the common space.

    Attributes:
        path: Dotted path of the module inside the encoder.
        pools: True for a module that turns a sequence into one vector (a CLS pooler, an attention
            pool): it is applied to one-token sequences.
        flat: True for a module that takes vectors only (one with a BatchNorm): it is applied to all
            tokens in a row, always with the statistics it was trained with.
    """

    path: str
    pools: bool = False
    flat: bool = False


@dataclass(frozen=True)
class TokenMap:
    """One side of an architecture.

    Attributes:
        steps: Modules applied to every token, in order; none where the towers share a space.
        pooled_by: Where `pooler_output` comes from: `"token"` (one of the tokens: CLS or EOS),
            `"mean"` (of the tokens after the prefix), `"attention"` (a pooling step), `"every"`
            (there is one vector per token), `"mean_first"` (the mean of the hidden states goes
            through steps that are not linear: the steps can be checked, but the tokens do not
            average to the pooled feature).
        prefix: Tokens before the first patch or word (CLS, registers, BOS).
        suffix: Tokens after the last word (EOS, SEP); texts only.
        registers: Name of an entry of the tower's config with further prefix tokens.
        pad_is_special: The tower attends to its padding and pads with a special token (SigLIP):
            without an attention mask the words are what is not the pad token.
        config: Name of the tower's config inside the encoder's; None = `vision_config` or
            `text_config`.
        features: `(encoder, **inputs)` to an output with `last_hidden_state` and `pooler_output`;
            None = the encoder's `get_image_features` or `get_text_features`.
        real_patches: Name of the input that says which patches are no padding; None = all are.
        dummy: `(encoder)` to inputs for the self-check; None = random pixels or a few tokens.
        grid: Whether patches are cells over the image, row by row: None = if their number is what
            the config's `patch_size` makes of the pixels; True = always, square cells (a
            convolution's map); False = never (queries, groups).
    """

    steps: tuple[Step, ...]
    pooled_by: str = "token"
    prefix: int = 0
    suffix: int = 0
    registers: str | None = None
    pad_is_special: bool = False
    config: str | None = None
    features: Callable[..., Any] | None = None
    real_patches: str | None = None
    dummy: Callable[[PreTrainedModel], dict[str, Tensor]] | None = None
    grid: bool | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """One row of the table.

    Attributes:
        image: The image side.
        text: The text side.
        logit_scale: Attribute with the logarithm of the scale, None if there is none.
        logit_bias: Attribute with the bias, None if there is none.
        temperature: Attribute that similarities are divided by, None if there is none.
        joined: True if two towers are usually joined by newly drawn projections, so that such an
            encoder may never have been trained as a whole.
        label: What people call it; rows without one are not listed.
        note: What a user should know about its tokens.
    """

    image: TokenMap
    text: TokenMap
    logit_scale: str | None = "logit_scale"
    logit_bias: str | None = None
    temperature: str | None = None
    joined: bool = False
    label: str = ""
    note: str = ""


def tower_config(encoder: PreTrainedModel, row: TokenMap, side: str) -> PreTrainedConfig:
    """The config of the `"vision"` or the `"text"` tower that a row describes."""
    return getattr(encoder.config, row.config or f"{side}_config")
