"""Low-rank adapters of an encoder's towers, with prototypes that are saved beside them.

What comes after the towers' hidden states is trained in full, not by LoRA: it is small, random in a
pair of towers that was only just joined, and it decides what a column means. So the prototypes fit
the merged model bit for bit, and their fingerprint is the same before and after merging.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pico_hf.core.modes import evaluation_mode
from pico_hf.encoders.check import dummy_batch
from pico_hf.encoders.projection_modules import projection_modules
from pico_hf.encoders.tokens import image_hidden_states, text_hidden_states
from pico_hf.hub.adapter_files import CARRIED, writable_fields
from pico_hf.hub.adapter_loading import load_adapter
from pico_hf.hub.adapter_rules import import_peft
from pico_hf.hub.saving import save_companions
from pico_hf.hub.weights import refuse_mixture
from pico_hf.modeling_pico import PicoModel

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def pico_lora_config(
    model: PicoModel, *, r: int = 8, alpha: int = 16, dropout: float = 0.05, **options: Any
) -> LoraConfig:
    """Configures `peft.get_peft_model`: LoRA in both towers, the rest trained in full.

    Args:
        model: The model to be adapted.
        r: Rank, at least 1.
        alpha: Updates are scaled by `alpha / r`.
        dropout: Dropout before the low-rank matrices, in [0, 1).
        options: Further fields of `peft.LoraConfig`. A `target_modules` or `modules_to_save` of
            yours replaces ours; prototypes, scale and bias are always added to the latter.

    Returns:
        The configuration.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If a value is out of range, if the model is adapted already, or if its towers
            have no linear layers.
    """
    _check_values(r, dropout)
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError(
            "`model` is adapted by LoRA already. Merge it first: `peft_model.merge_and_unload()`."
        )
    heads = [f"encoder.{path}" for path in projection_modules(model.encoder)]
    targets = options.pop("target_modules", None) or tower_linears(model)
    if not targets:
        raise ValueError(
            f"The towers of {type(model.encoder).__name__} have no linear layers that LoRA could "
            "adapt. Name other layers with `target_modules=[…]`."
        )
    whole = options.pop("modules_to_save", heads)
    return import_peft().LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=[*whole, *(name for name in CARRIED if name not in whole)],
        **options,
    )


def tower_linears(model: PicoModel) -> list[str]:
    """Finds the linear layers whose output reaches the towers' hidden states.

    Found by a dummy batch, since names do not tell: matching heads, cross-attention, decoders and
    poolers that no token passes stay out, and so do layers whose weights are read by another
    module (the output of a `nn.MultiheadAttention`), in which an adapter would never be called.

    Args:
        model: The model, not adapted.

    Returns:
        Dotted paths inside the model, in the order of its modules.
    """
    encoder = model.encoder
    heads = tuple(f"{path}." for path in projection_modules(encoder))
    linears = {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and not f"{name}.".startswith(heads)
    }
    probes = {name: torch.zeros((), requires_grad=True) for name in linears}
    hooks = [module.register_forward_hook(_adds(probes[name])) for name, module in linears.items()]
    try:
        with evaluation_mode(model):
            reached = _reached(encoder, probes)
    finally:
        for hook in hooks:
            hook.remove()
    return [f"encoder.{name}" for name in linears if name in reached]


def load_adapter_model(
    path: str | os.PathLike,
    *,
    base: str | os.PathLike | PreTrainedModel | None = None,
    trainable: bool = False,
    **options: Any,
) -> PeftModel:
    """Loads an adapter onto its base and keeps the two apart, bit for bit as they were trained.

    `PicoModel.from_pretrained(path)` loads the same adapter merged into its base.

    Args:
        path: Folder or Hub repository with an adapter that [`PicoTrainer`] saved.
        base: What it was trained on: a folder, a Hub repository or a live model, Pico or plain
            (changed in place). None takes the one that the adapter names.
        trainable: True goes on training it.
        options: Hub options of the adapter, such as `revision` or `token` (the latter is used for
            the base too); other loading options, such as `dtype`, are the base's.

    Returns:
        The peft model in eval mode.

    Raises:
        ImportError: If peft is not installed.
        OSError: If there is no adapter, or no base.
        ValueError: If a file is damaged or hostile, or if the adapter does not fit the base.
    """
    return load_adapter(PicoModel, path, base=base, trainable=trainable, **options)


def save_adapter(peft_model: PeftModel, folder: str | os.PathLike) -> None:
    """Saves an adapter, its prototypes and the Pico configuration, as [`PicoTrainer`] does.

    `peft_model.save_pretrained` alone leaves the configuration out, which says what the prototypes
    are.

    Args:
        peft_model: The adapter on its base.
        folder: Created if need be.

    Raises:
        ValueError: If the adapter could not be read back, or if the folder holds a whole model.
    """
    writable_fields(peft_model)
    refuse_mixture(folder, adapter=True)
    peft_model.save_pretrained(os.fspath(folder))
    save_companions(peft_model, folder)


def _check_values(r: int, dropout: float) -> None:
    if r < 1:
        raise ValueError(f"`r` must be at least 1, got {r}: it is the rank of every update.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")


def _adds(probe: Tensor) -> Any:
    """A hook that leaves values as they are and ties the output to the probe's gradient."""
    return lambda module, inputs, output: output + probe.to(output.device, output.dtype)


def _reached(encoder: PreTrainedModel, probes: dict[str, Tensor]) -> set[str]:
    """Names of the probes that the hidden states of either side depend on."""
    if not probes:
        return set()
    images, texts = dummy_batch(encoder)
    with torch.enable_grad():
        total = (
            image_hidden_states(encoder, **images).features.float().square().sum()
            + text_hidden_states(encoder, **texts).features.float().square().sum()
        )
        gradients = torch.autograd.grad(total, list(probes.values()), allow_unused=True)
    return {name for name, gradient in zip(probes, gradients, strict=True) if gradient is not None}
