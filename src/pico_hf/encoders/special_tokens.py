"""Which tokens take part in the interaction: patches and words, and special tokens on demand.

`PicoConfig.keep_special_tokens` decides whether the encoder's own special tokens are among them:
the vision tower's prefix (CLS, registers) and the text tower's BOS and EOS, [CLS] and [SEP].
Everything that asks is answered here. A batch says no more than which tokens are words, whatever
the setting, so that no collator can be of another setting than the model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.token_features import TokenFeatures
from pico_hf.encoders.padding import run_at_end
from pico_hf.encoders.spec import TokenMap, tower_config


def prefix_tokens(encoder: PreTrainedModel, row: TokenMap) -> tuple[str, ...]:
    """What the tokens before the first patch are called: CLS, registers; none of most maps.

    Args:
        encoder: The dual encoder.
        row: Its image side in the table.
    """
    own = ("CLS", *(f"special token {n}" for n in range(2, row.prefix + 1)))[: row.prefix]
    registers = 0
    if row.registers:
        registers = getattr(tower_config(encoder, row, "vision"), row.registers)
    return (*own, *(f"register {n}" for n in range(1, registers + 1)))


def kept_prefix(encoder: PreTrainedModel, row: TokenMap, keep: bool) -> tuple[str, ...]:
    """Those of them that take part.

    Args:
        encoder: The dual encoder.
        row: Its image side in the table.
        keep: Whether special tokens take part.
    """
    return prefix_tokens(encoder, row) if keep else ()


def patches_alone(
    encoder: PreTrainedModel, row: TokenMap, tokens: TokenFeatures, keep: bool
) -> TokenFeatures:
    """Tokens of images without the prefix that takes part.

    Args:
        encoder: The dual encoder.
        row: Its image side in the table.
        tokens: Hidden states or features of images.
        keep: Whether special tokens are among them.
    """
    first = len(kept_prefix(encoder, row, keep))
    if not first:
        return tokens
    return TokenFeatures(tokens.features[:, first:], tokens.mask[:, first:], tokens.pooled)


def words_alone(
    encoder: PreTrainedModel, row: TokenMap, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """(texts, tokens) True = word: attended tokens without the special ones at either end.

    A text of nothing but special tokens keeps them, since it has no score without a token.

    Args:
        encoder: The dual encoder.
        row: Its text side in the table.
        input_ids: (texts, tokens), padded on either side.
        attention_mask: (texts, tokens); None only of towers that attend to their padding.
    """
    if attention_mask is None:
        words = _before_padding(encoder, row, input_ids)
        return words | ~words.any(dim=1, keepdim=True)
    attended = attention_mask.bool()
    words = attended & ~_at_the_ends(row, attended)
    return words | (attended & ~words.any(dim=1, keepdim=True))


def words_and_special_tokens(
    encoder: PreTrainedModel,
    row: TokenMap,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    word_mask: Tensor | None,
) -> Tensor:
    """(texts, tokens) True = word, or special token of the text itself; never padding.

    Args:
        encoder: The dual encoder.
        row: Its text side in the table.
        input_ids: See [`words_alone`].
        attention_mask: See [`words_alone`].
        word_mask: (texts, tokens) True = word; None: all words.
    """
    special = _special_tokens(encoder, row, input_ids, attention_mask)
    if word_mask is not None:
        return word_mask.bool() | special.to(word_mask.device)
    if attention_mask is not None:
        return attention_mask.bool()
    return _before_padding(encoder, row, input_ids) | special


def _special_tokens(
    encoder: PreTrainedModel, row: TokenMap, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """(texts, tokens) True = a special token of the text itself.

    Where the architecture's row names none, as that of learned projections, there is no telling
    them from words: every attended token. Towers that attend to their padding end a text in special
    tokens (SigLIP: EOS) before it is padded.
    """
    if attention_mask is not None:
        attended = attention_mask.bool()
        return _at_the_ends(row, attended) if row.prefix or row.suffix else attended
    place = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    last = (place * _before_padding(encoder, row, input_ids)).amax(dim=1, keepdim=True)
    return (place <= row.prefix) | ((place > last) & (place <= last + row.suffix))


def _at_the_ends(row: TokenMap, attended: Tensor) -> Tensor:
    """The first `prefix` and last `suffix` of the attended tokens, on either padding side."""
    position = attended.long().cumsum(dim=1)
    last = position[:, -1:] - row.suffix
    return attended & ((position <= row.prefix) | (position > last))


def _before_padding(encoder: PreTrainedModel, row: TokenMap, input_ids: Tensor) -> Tensor:
    """What is neither the config's pad token nor part of a run of one token at the end.

    SigLIP 2's vocabulary pads with another token than its configs name, which is its EOS.
    """
    pad = tower_config(encoder, row, "text").pad_token_id
    run = run_at_end(input_ids == input_ids[:, -1:])
    return (input_ids != pad) & ~(run & (run.sum(dim=1, keepdim=True) > 1))
