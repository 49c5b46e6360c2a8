"""What a trainer refuses when it is built, each with the reason that the documentation gives.

`docs/training_arguments.md` lists every argument; a test keeps it, this module and the installed
transformers together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pico_hf.core.processes import batch_statistics
from pico_hf.encoders.projection_modules import linear_heads
from pico_hf.hub.adapter_files import CARRIED, base_model, writable_fields
from pico_hf.modeling_pico import PicoModel
from pico_hf.training.zero import check_deepspeed
from pico_hf.training_args import PicoTrainingArguments


@dataclass(frozen=True)
class Refusal:
    """Why an argument is refused.

    Attributes:
        allowed: Whether a value may pass.
        reason: The reason, and what to do instead.
    """

    allowed: Callable[[Any], bool]
    reason: str


def _unset(value: Any) -> bool:
    return not value


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: getattr(value, "value", value) in values


_SIXTEEN_BITS = (
    "it would leave the weights in 16 bits after the first evaluation. Load the model with "
    "`dtype=torch.bfloat16`, or train with `bf16=True`."
)
_WHOLE_SPLIT = "ranks need all scores of a split at once. Leave it out."
_SHARDED = (
    "whole splits are encoded by whole models, and this one would be in parts. Start several "
    "processes with `torchrun`, each of which holds the model."
)
_LIGER = "Liger has kernels for language models only. Leave it out."

REFUSED: dict[str, Refusal] = {
    "label_smoothing_factor": Refusal(
        _unset, "a contrastive loss has no class labels to smooth. Leave it out."
    ),
    "label_names": Refusal(
        _unset, "the label of a caption is its image, in every batch. Leave it out."
    ),
    "bf16_full_eval": Refusal(_unset, _SIXTEEN_BITS),
    "fp16_full_eval": Refusal(_unset, _SIXTEEN_BITS),
    "use_liger_kernel": Refusal(_unset, _LIGER),
    "liger_kernel_config": Refusal(_unset, _LIGER),
    "prediction_loss_only": Refusal(
        _unset, "an evaluation ranks whole splits and has no loss. Leave it out."
    ),
    "eval_do_concat_batches": Refusal(_is(True), _WHOLE_SPLIT),
    "batch_eval_metrics": Refusal(_unset, _WHOLE_SPLIT),
    "include_for_metrics": Refusal(
        _unset,
        "`compute_metrics` gets the scores of a whole split, not its batches. Leave it out.",
    ),
    "include_num_input_tokens_seen": Refusal(
        _is("no", False), "it would count pixels as tokens. Leave it out."
    ),
    "train_sampling_strategy": Refusal(
        _is("random", "sequential"),
        "captions are chosen anew in every epoch, so rows have no length of their own. Pass "
        "`'random'` or `'sequential'`.",
    ),
    "remove_unused_columns": Refusal(
        _unset,
        "it would remove images and captions before the collator sees them. Pass `False`.",
    ),
    "parallelism_config": Refusal(_unset, _SHARDED),
}


def check_arguments(args: Any) -> None:
    """Refuses arguments of another class, and values that this trainer cannot honour.

    Raises:
        ValueError: If there is one; the message names it and says what to do.
    """
    if not isinstance(args, PicoTrainingArguments):
        raise ValueError(
            f"`args` must be PicoTrainingArguments, got {type(args).__name__}. Pass "
            "`PicoTrainingArguments(…)`: it takes the same arguments and adds those of this method."
        )
    for name, refusal in REFUSED.items():
        value = getattr(args, name, None)  # an older transformers may lack it
        if value is not None and not refusal.allowed(value):
            raise ValueError(f"`{name}` cannot be {value!r}: {refusal.reason}")


def check_model(model: Any, args: PicoTrainingArguments) -> None:
    """Refuses what is no Pico model, an adapter that would be lost, projections of another kind.

    Raises:
        ValueError: See above.
    """
    pico = base_model(model)
    if not isinstance(pico, PicoModel):
        raise ValueError(
            f"`model` must be a PicoModel, got {type(model).__name__}. Pass "
            "`PicoModel.from_encoder(model)`, or a model that `PicoModel.from_pretrained` gives."
        )
    if pico is not model:
        writable_fields(model)  # what could not be read back is not trained
        if args.refine_prototypes:
            _check_adapter(pico)
    if args.projection_start == "closed_form":
        if pico is not model:
            raise ValueError(
                '`projection_start="closed_form"` replaces projections, which an adapter adapts. '
                'Leave it at "as_is", or train the model without an adapter first.'
            )
        linear_heads(pico.encoder)


def _check_adapter(pico: nn.Module) -> None:
    """Prototypes are buffers: an adapter that does not list them would lose them in silence."""
    for name in CARRIED:
        if not hasattr(getattr(pico, name), "modules_to_save"):
            raise ValueError(
                f"The adapter does not carry `{name}`, which would be lost when it is saved. "
                f"Add {name!r} to its `modules_to_save`, or use `pico_hf.pico_lora_config`."
            )


def check_combinations(
    args: PicoTrainingArguments, model: Any, model_init: Any, collator: Any, optimizers: Any
) -> None:
    """Refuses arguments that do not go together, which would otherwise be ignored in silence.

    Args:
        args: The run's knobs.
        model: The model or None.
        model_init: Makes a model, or None.
        collator: The user's own collator, or None.
        optimizers: The user's own optimizer and scheduler, either None.

    Raises:
        ValueError: If there are such arguments.
    """
    if (model is None) == (model_init is None):
        raise ValueError("Pass either `model` or `model_init`, and not both.")
    check_deepspeed(args, model, optimizers)
    if args.freeze_encoder:
        _check_frozen(args, model_init, collator)
    if args.tower_learning_rate is not None and optimizers[0] is not None:
        raise ValueError(
            "`tower_learning_rate` does not reach an optimizer of your own. Leave it out, and pass "
            "`optimizers` with a group of parameters for the towers."
        )


def _check_frozen(args: PicoTrainingArguments, model_init: Any, collator: Any) -> None:
    if model_init is not None:
        raise ValueError(
            "`freeze_encoder` caches features of one model, and `model_init` may make others. Pass "
            "`model`, or leave `freeze_encoder` out."
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            "`neftune_noise_alpha` adds noise inside towers that `freeze_encoder` does not run. "
            "Leave one of them out."
        )
    if collator is not None and not hasattr(collator, "fingerprint"):
        raise ValueError(
            "`freeze_encoder` caches features under a name that depends on the collator, and "
            f"{type(collator).__name__} has no `fingerprint`. Add one, a text that changes with "
            "the preprocessing, or leave `data_collator` out."
        )


def check_mini_batches(args: PicoTrainingArguments, model: nn.Module) -> None:
    """Refuses `mini_batch_size` where its gradients would not be those of the whole batch.

    Raises:
        ValueError: If a BatchNorm is trained, or if the optimizer steps inside of a backward.
    """
    if args.mini_batch_size is None:
        return
    training = model.training
    moving = batch_statistics(model.train())
    model.train(training)
    if moving:
        raise ValueError(
            "`mini_batch_size` does not go with a BatchNorm that is trained, whose statistics are "
            "those of a whole batch. Leave it out, pass `gradient_checkpointing=True`, or freeze "
            "the towers with `freeze_encoder=True`."
        )
    if getattr(args.optim, "value", args.optim) in ("lomo", "adalomo"):
        raise ValueError(
            f"`mini_batch_size` does not go with `optim={args.optim!r}`, which changes weights "
            "before all gradients are there. Choose another `optim`."
        )
