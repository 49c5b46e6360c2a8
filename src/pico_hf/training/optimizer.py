"""Parameter groups: a learning rate for towers and one for heads, with weight decay or without."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from pico_hf.encoders.projection_modules import projection_parameters
from pico_hf.hub.adapter_files import base_model
from pico_hf.training_args import PicoTrainingArguments

# Under these names transformers hands on the parameters of optimizers that arrange them themselves.
_OWN_ARRANGEMENT = {"params", "model", "optimizer_dict"}


def grouped_options(
    optimizer: Any,
    options: Mapping[str, Any],
    model: nn.Module,
    args: PicoTrainingArguments,
    decayed: Collection[str],
) -> dict[str, Any]:
    """Keywords of an optimizer, with parameter groups as its `params` if it takes any.

    Args:
        optimizer: Class of the optimizer, or a factory that is called with the model.
        options: Its keywords, as `Trainer.get_optimizer_cls_and_kwargs` gives them.
        model: The model, plain or wrapped by peft.
        args: The run's knobs.
        decayed: Names of the parameters with weight decay.

    Raises:
        ValueError: If towers are to have a learning rate of their own and the optimizer takes all
            parameters at one, as GaLore, LOMO and Muon do.
    """
    is_class = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    if is_class and not _OWN_ARRANGEMENT & options.keys():
        rate = options.get("lr", args.learning_rate)
        return {**options, "params": parameter_groups(model, args, decayed, rate)}
    if args.tower_learning_rate is not None:
        raise ValueError(
            f"`tower_learning_rate` does not go with {getattr(optimizer, '__name__', optimizer)}, "
            "which takes all parameters at one rate. Leave it out, or choose another `optim`."
        )
    return dict(options)


def parameter_groups(
    model: nn.Module,
    args: PicoTrainingArguments,
    decayed: Collection[str],
    learning_rate: float,
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay.

    Args:
        model: The model, plain or wrapped by peft.
        args: The run's knobs.
        decayed: Names of the parameters with weight decay.
        learning_rate: That of the heads, >= 0.

    Returns:
        Groups with `params`, `lr` and `weight_decay`.
    """
    pico = base_model(model)
    heads = set(projection_parameters(pico.encoder))
    towers = {id(p) for name, p in pico.encoder.named_parameters() if name not in heads}
    tower_rate = args.tower_learning_rate
    if tower_rate is None:
        # An adapter's matrices start from nothing like new heads, not from what towers learned.
        tower_rate = learning_rate / (1 if pico is not model else 10)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (id(parameter) in towers, name in decayed)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": tower_rate if tower else learning_rate,
            "weight_decay": args.weight_decay if decay else 0.0,
        }
        for (tower, decay), parameters in groups.items()
    ]
