"""From hidden states to the common space: tokens, and the one vector an encoder itself compares.

An encoder that was pretrained on pooled vectors is aligned in just those. What it pools is found in
its hidden states, so that the same steps that project tokens project it, also after training, and
features that were cached before the projections are as good as pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.token_features import TokenFeatures
from pico_hf.encoders.spec import Step, TokenMap


def apply_steps(encoder: PreTrainedModel, steps: Sequence[Step], hidden: Tensor) -> Tensor:
    """Takes (rows, tokens, hidden) through modules, token by token."""
    rows, tokens = hidden.shape[:2]
    for step in steps:
        module = encoder.get_submodule(step.path)
        if step.pools:
            hidden = module(hidden.reshape(rows * tokens, 1, -1)).reshape(rows, tokens, -1)
        elif step.flat:
            hidden = module(hidden.reshape(rows * tokens, -1)).reshape(rows, tokens, -1)
        else:
            hidden = module(hidden)
    return hidden


def pooled_state(
    encoder: PreTrainedModel, row: TokenMap, hidden: Float[Tensor, "n tokens hidden"], out: Any
) -> Float[Tensor, "n hidden"] | None:
    """The hidden state of the token that the encoder pools.

    The encoder says itself which one that is: the one whose projection is its pooled feature. CLIP
    looks for the end of a text in three ways, depending on its age.

    Args:
        encoder: The dual encoder.
        row: Its side in the table.
        hidden: Hidden states of all tokens, special ones included.
        out: The side's output, with the projected `pooler_output`.

    Returns:
        None if the feature is made of all patches or words.
    """
    if row.pooled_by == "every" and row.prefix:
        return hidden[:, 0]
    given = getattr(out, "pooler_output", None)
    if row.pooled_by != "token" or given is None:
        return None
    with torch.no_grad():
        projected = apply_steps(encoder, row.steps, hidden)
        place = (projected - given.unsqueeze(1)).abs().amax(dim=-1).argmin(dim=1, keepdim=True)
    place = place.unsqueeze(-1).expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, place).squeeze(1)  # take_along_dim would fix the batch of a graph


def project_pooled(
    encoder: PreTrainedModel, row: TokenMap, hidden: TokenFeatures
) -> Float[Tensor, "n columns"]:
    """The pooled feature in the common space, not normalised.

    Args:
        encoder: The dual encoder.
        row: Its side in the table.
        hidden: Patches or words before projection; `pooled` holds what [`pooled_state`] found.

    Returns:
        What the encoder gives as `pooler_output`. Where it has no such thing (BLIP-2's queries,
        learned projections): the projection of the mean token.
    """
    if hidden.pooled is not None:
        return apply_steps(encoder, row.steps, hidden.pooled.unsqueeze(1)).squeeze(1)
    if row.pooled_by == "attention":
        head = encoder.get_submodule(row.steps[0].path)
        whole = _without_padding(row, hidden.mask)
        seen = (hidden.features,) if whole else (hidden.features, hidden.mask)
        return apply_steps(encoder, row.steps[1:], head(*seen).unsqueeze(1)).squeeze(1)
    mean = hidden.mean().to(hidden.features).unsqueeze(1)
    return apply_steps(encoder, row.steps, mean).squeeze(1)


def mean_state(row: TokenMap, hidden: TokenFeatures) -> Float[Tensor, "n hidden"] | None:
    """The hidden state that [`project_pooled`] projects where an encoder pools no single token.

    Args:
        row: The side in the table.
        hidden: Patches or words before projection, without special tokens.

    Returns:
        None for a pooling step, which takes all states.
    """
    return None if row.pooled_by == "attention" else hidden.mean().to(hidden.features)


def _without_padding(row: TokenMap, mask: Tensor) -> bool:
    """Whether a head over all patches needs no mask; a graph cannot ask what is in one."""
    return row.real_patches is None if torch.compiler.is_compiling() else bool(mask.all())
