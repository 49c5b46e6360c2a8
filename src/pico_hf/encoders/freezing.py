"""Which parameters of an encoder are trained when its towers are frozen."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from pico_hf.encoders.projection_modules import projection_parameters, steps_of


def freeze_towers(encoder: PreTrainedModel) -> None:
    """Leaves only what comes after the towers' hidden states trainable.

    Of an encoder that peft adapts, the adapter's own parameters alone stay trainable.

    Args:
        encoder: The dual encoder; `requires_grad` of its parameters changes.

    Raises:
        ValueError: If nothing comes after the hidden states, or if the towers are adapted.
    """
    trainable = set(projection_parameters(encoder))
    if not trainable:
        raise ValueError(
            f"{type(encoder).__name__} has no projections after its towers: with frozen towers "
            "nothing is left to train. Train the towers too, or adapt them by LoRA."
        )
    parameters = dict(encoder.named_parameters())
    if any(".lora_" in name or ".modules_to_save." in name for name in parameters):
        adapted = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if tower := sorted(adapted - trainable):
            raise ValueError(
                f"Towers that an adapter trains (`{tower[0]}`, …) cannot be frozen: their hidden "
                "states change. Leave `freeze_encoder` out, or train without LoRA."
            )
        trainable &= adapted
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)


def keep_batch_statistics(encoder: PreTrainedModel) -> None:
    """Puts projections with a BatchNorm in eval mode, and any BatchNorm that is not trained.

    A projection's statistics are those of pooled vectors. Batches of tokens would replace them by
    others, and would let padding into the scores. Those of a frozen tower would move without being
    saved with the adapter that is trained on it.
    """
    for step in steps_of(encoder):
        if step.flat:
            encoder.get_submodule(step.path).eval()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.train(module.training and module.weight.requires_grad)
