"""How a trainer makes its model and reads the loss of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pico_hf.core.state import MOST_POOLED
from pico_hf.hub.adapter_files import live_module


def pair_loss(outputs: Mapping[str, Any]) -> Tensor:
    """The loss of a batch of pairs; 0, with gradients, of a single pair.

    Args:
        outputs: Of a [`PicoModel`].

    Raises:
        ValueError: If images and texts are not pairs.
    """
    if outputs.get("loss") is not None:
        return outputs["loss"]
    logits = outputs["logits_per_image"]
    if logits.shape != (1, 1):
        raise ValueError(
            f"A batch must have as many texts as images, got {logits.shape[0]} images and "
            f"{logits.shape[1]} texts. Make pairs of them in `data_collator`."
        )
    return logits.sum() * 0


def loss_of_batch(
    function: Callable[..., Tensor] | None, items: Tensor | int | None, outputs: Mapping[str, Any]
) -> Tensor:
    """The loss of a batch by the user's own function, if there is one.

    Args:
        function: `compute_loss_func` of a trainer, or None.
        items: What it gets as `num_items_in_batch`.
        outputs: Of a [`PicoModel`].
    """
    if function is not None:
        return function(outputs, None, num_items_in_batch=items)
    return pair_loss(outputs)


def without_options(model_init: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A function that makes a model of a trial or of nothing, since `Trainer` counts its arguments.

    Args:
        model_init: May have any number of arguments with defaults, which keep them.
    """
    parameters = list(inspect.signature(model_init).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_trial = len(parameters) == len(positional) == 1
    needs_none = all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )
    return model_init if takes_trial or not needs_none else lambda: model_init()


@torch.no_grad()
def train_tokens_too(model: Any) -> None:
    """Makes tokens at least a fifth of a score that is about to be trained.

    A wrapped encoder ranks by its pooled features alone, so that tokens would get no gradient.
    The scale of the logits follows, as if the encoder had been wrapped with that share: S spans
    twice a cosine's range. A checkpoint that is loaded afterwards has its own share.

    Args:
        model: A [`PicoModel`].
    """
    share = model.pooled_share
    if share > MOST_POOLED:
        live_module(model.prototypes).share_score(MOST_POOLED)
        live_module(model.pair_logits).follow_share(share, MOST_POOLED)
