"""From a dual encoder's hidden states to token features and masks.

tokens = steps(last_hidden_state), by the encoder's row in `pico_hf.encoders.table`, without special
tokens unless they are kept: see `pico_hf.encoders.special_tokens`. `pico_hf.encoders.check`
verifies a row whenever a model is wrapped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.token_features import TokenFeatures
from pico_hf.encoders.padding import attended_tokens, padded_right
from pico_hf.encoders.projection import apply_steps, mean_state, pooled_state, project_pooled
from pico_hf.encoders.spec import tower_config
from pico_hf.encoders.special_tokens import (
    kept_prefix,
    patches_alone,
    prefix_tokens,
    words_alone,
    words_and_special_tokens,
)
from pico_hf.encoders.table import encoder_spec


def image_hidden_states(
    encoder: PreTrainedModel,
    pixel_values: Tensor | None = None,
    image_hidden_states: Tensor | None = None,
    patch_mask: Tensor | None = None,
    image_pooled_state: Tensor | None = None,
    *,
    keep_special_tokens: bool = False,
    **inputs: Any,
) -> TokenFeatures:
    """The vision tower's output for every patch, before any projection.

    Args:
        encoder: The dual encoder.
        pixel_values: Images, or sequences of patches for NaFlex towers.
        image_hidden_states: (images, patches, hidden) outputs that were computed before, in the
            same setting of `keep_special_tokens`.
        patch_mask: (images, patches) True = real patch of those; None = all.
        image_pooled_state: (images, hidden) of the token that the encoder pools, if it is one.
        keep_special_tokens: True gives the prefix tokens, too, before the patches.
        inputs: What else the tower takes; None is left out.

    Returns:
        (images, patches, hidden) with the mask of real patches, and the state of the token that the
        encoder pools, if it is one.

    Raises:
        ValueError: If there are neither pixels nor outputs.
    """
    if image_hidden_states is not None:
        return _computed_before(encoder, image_hidden_states, patch_mask, image_pooled_state)
    if pixel_values is None:
        raise ValueError("Give `pixel_values` or `image_hidden_states`, got neither.")
    row, inputs = encoder_spec(encoder).image, _given(inputs)
    out = image_output(encoder, pixel_values=pixel_values.to(encoder.dtype), **inputs)
    hidden = last_hidden_state(out, encoder, "image")
    kept = len(kept_prefix(encoder, row, keep_special_tokens))
    tokens = hidden[:, prefix_length(encoder) - kept :]
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if row.real_patches and row.real_patches in inputs:
        real[:, kept:] = inputs[row.real_patches].bool().to(tokens.device)
    return TokenFeatures(tokens, real, pooled_state(encoder, row, hidden, out))


def text_hidden_states(
    encoder: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    word_mask: Tensor | None = None,
    text_hidden_states: Tensor | None = None,
    text_pooled_state: Tensor | None = None,
    *,
    keep_special_tokens: bool = False,
    **inputs: Any,
) -> TokenFeatures:
    """The text tower's output for every token, before any projection, and which are words.

    Args:
        encoder: The dual encoder.
        input_ids: (texts, tokens).
        attention_mask: (texts, tokens). None: read off the padding, except for towers that attend
            to it. Padding before a text does not move its positions.
        word_mask: (texts, tokens) True = word. None: attended tokens without the architecture's
            special tokens at either end; a text of nothing else keeps them.
        text_hidden_states: (texts, tokens, hidden) outputs that were computed before, in the same
            setting of `keep_special_tokens`; `word_mask` then is of these.
        text_pooled_state: (texts, hidden) of the token that the encoder pools, if it is one.
        keep_special_tokens: True counts the attended special tokens beside the words, whatever
            `word_mask` says of them.
        inputs: What else the tower takes; None is left out.

    Returns:
        (texts, tokens, hidden) with the mask of what takes part, and the state of the token that
        the encoder pools, if it is one, or of the mean word beside special tokens.

    Raises:
        ValueError: If there are neither token ids nor outputs.
    """
    if text_hidden_states is not None:
        return _computed_before(encoder, text_hidden_states, word_mask, text_pooled_state)
    if input_ids is None:
        raise ValueError(
            "Give `input_ids` or `text_hidden_states`, got neither. Features of images alone come "
            "from `encode_images`."
        )
    row = encoder_spec(encoder).text
    if attention_mask is None and not row.pad_is_special:
        tower = tower_config(encoder, row, "text")
        ends = {"prefix": row.prefix, "suffix": row.suffix}
        attention_mask = attended_tokens(input_ids, tower, **ends)
    given = _given({"input_ids": input_ids, "attention_mask": attention_mask, **inputs})
    moved, place = padded_right(given)
    out = text_output(encoder, **moved)
    hidden = last_hidden_state(out, encoder, "text")
    pooled = pooled_state(encoder, row, hidden, out)
    if place is not None:
        hidden = hidden.gather(1, place.to(hidden.device).unsqueeze(-1).expand_as(hidden))
    text = encoder, row, input_ids, attention_mask
    words = (words_alone(*text) if word_mask is None else word_mask.bool()).to(hidden.device)
    if not keep_special_tokens:
        return TokenFeatures(hidden, words, pooled)
    pooled = mean_state(row, TokenFeatures(hidden, words)) if pooled is None else pooled
    counted = words_and_special_tokens(*text, word_mask).to(hidden.device)
    return TokenFeatures(hidden, counted, pooled)


def _computed_before(
    encoder: PreTrainedModel, states: Tensor, mask: Tensor | None, pooled: Tensor | None
) -> TokenFeatures:
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    place = encoder.device, encoder.dtype
    pooled = None if pooled is None else pooled.to(*place)
    return TokenFeatures(states.to(*place), mask.to(encoder.device), pooled)


def _given(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None}


def project(
    encoder: PreTrainedModel,
    side: str,
    hidden: TokenFeatures,
    pools: bool = True,
    keep_special_tokens: bool = False,
) -> TokenFeatures:
    """Tokens, and what the encoder pools of them, in the common space, not normalised.

    Args:
        encoder: The dual encoder.
        side: `"image"` or `"text"`.
        hidden: From `image_hidden_states` or `text_hidden_states`.
        pools: False leaves the pooled features out.
        keep_special_tokens: Whether special tokens are among `hidden`. Pooled features do not
            depend on it.
    """
    row = getattr(encoder_spec(encoder), side)
    features = apply_steps(encoder, row.steps, hidden.features)
    if not pools:
        return TokenFeatures(features, hidden.mask)
    kept = keep_special_tokens and side == "image"
    pooled = project_pooled(encoder, row, patches_alone(encoder, row, hidden, kept))
    return TokenFeatures(features, hidden.mask, pooled)


def image_output(encoder: PreTrainedModel, **inputs: Any) -> Any:
    """Runs the image side: `last_hidden_state`, and the projected `pooler_output`."""
    _check_not_empty("pixel_values", inputs)
    features = encoder_spec(encoder).image.features
    return features(encoder, **inputs) if features else encoder.get_image_features(**inputs)


def text_output(encoder: PreTrainedModel, **inputs: Any) -> Any:
    """Runs the text side: `last_hidden_state`, and the projected `pooler_output`."""
    _check_not_empty("input_ids", inputs)
    features = encoder_spec(encoder).text.features
    return features(encoder, **inputs) if features else encoder.get_text_features(**inputs)


def _check_not_empty(name: str, inputs: dict[str, Any]) -> None:
    """Towers cannot reshape nothing, and would say so in words of their own."""
    values = inputs.get(name)
    if values is not None and values.shape[0] == 0:
        raise ValueError(f"`{name}` must hold at least one row, got none.")


def last_hidden_state(out: Any, encoder: PreTrainedModel, side: str) -> Tensor:
    """(rows, tokens, hidden) of an output; the cells of a convolution's map are its tokens.

    Raises:
        ValueError: If there is no such thing.
    """
    hidden = getattr(out, "last_hidden_state", None)
    if hidden is not None and hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)  # (rows, channels, height, width) before
    if hidden is None or hidden.ndim != 3:
        raise ValueError(
            f"{type(encoder).__name__} gives no {side} token features: `last_hidden_state` is "
            f"{'missing' if hidden is None else f'of shape {tuple(hidden.shape)}'}. PICO needs one "
            "vector per patch and per word."
        )
    return hidden


def prefix_length(encoder: PreTrainedModel) -> int:
    """Tokens before the first patch."""
    return len(prefix_tokens(encoder, encoder_spec(encoder).image))
