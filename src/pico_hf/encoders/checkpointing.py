"""Gradient checkpointing that also trains layers above frozen ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def set_gradient_checkpointing(
    model: PreTrainedModel,
    enable: bool = True,
    gradient_checkpointing_func: Callable[..., Any] = checkpoint,
    **options: Any,
) -> None:
    """Switches gradient checkpointing on or off in every layer; stands in for a model's own method.

    Reentrant checkpointing gives a layer gradients only if an input of it needs one. Behind frozen
    embeddings no input does, and then the layer's own parameters would stay as they are.
    transformers makes the outputs of word embeddings need one, which leaves image towers out, and
    does so only for models whose main input is text.

    Args:
        model: The model.
        enable: False computes every layer once again as usual.
        gradient_checkpointing_func: Runs a layer and forgets its inner results.
        options: What else `PreTrainedModel._set_gradient_checkpointing` takes.
    """
    reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is True
    run = gradient_checkpointing_func
    run = with_input_gradients(run) if enable and reentrant else run
    PreTrainedModel._set_gradient_checkpointing(model, enable, run, **options)


def enable_input_require_grads(model: PreTrainedModel) -> None:
    """Makes what embeddings give need gradients, which peft asks for; stands in for a method.

    The stock method fails for towers whose embeddings give a tuple, as those of a Swin do.

    Args:
        model: The model; `disable_input_require_grads` takes this back.
    """
    embeddings = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            with suppress(NotImplementedError):
                found = module.get_input_embeddings()
                embeddings[id(found)] = found
    modules = [found for found in embeddings.values() if isinstance(found, nn.Module)]
    hooks = [module.register_forward_hook(_require_gradients) for module in modules]
    model._require_grads_hooks = hooks
    if hooks:
        model._require_grads_hook = hooks[0]


def _require_gradients(module: nn.Module, inputs: Any, output: Any) -> None:
    for value in output if isinstance(output, tuple) else (output,):
        if _is_float(value):
            value.requires_grad_()


def with_input_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint function that makes the hidden states of a trained layer need gradients.

    Args:
        run: Called as `run(layer, hidden_states, …)`.

    Returns:
        A function that is called alike. It raises ValueError for a layer that gets its hidden
        states as a keyword, which reentrant checkpointing does not follow.
    """

    @wraps(run)
    def run_with_gradients(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(function, *args, **kwargs)
        if not _trains(function):
            follows = any(isinstance(value, Tensor) and value.requires_grad for value in args)
            return run(function, *args, **kwargs) if follows else function(*args)
        first = next((n for n, value in enumerate(args) if _is_float(value)), None)
        if first is None:
            raise ValueError(
                "`use_reentrant=True` cannot checkpoint a layer that takes its hidden states by "
                "name. Pass `gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
        if not args[first].requires_grad:
            args = (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
        return run(function, *args, **kwargs)

    return run_with_gradients


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _trains(function: Callable[..., Any]) -> bool:
    """Whether the layer that a function belongs to has trainable parameters; True if none does."""
    inner = function.func if isinstance(function, partial) else function
    given = function.args if isinstance(function, partial) else ()
    owners = [getattr(inner, "__self__", None), *given]
    layer = next((owner for owner in owners if isinstance(owner, nn.Module)), None)
    return layer is None or any(parameter.requires_grad for parameter in layer.parameters())
