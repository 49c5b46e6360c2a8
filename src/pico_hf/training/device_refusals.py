"""What a trainer refuses of the GPUs and processes that it is started on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from pico_hf.hub.adapter_files import base_model
from pico_hf.training_args import PicoTrainingArguments

FSDP_VARIABLE = "ACCELERATE_USE_FSDP"  # of `accelerate launch`, and set by accelerate itself


def check_devices(args: PicoTrainingArguments, model: Any) -> None:
    """Refuses several GPUs in one process, and several processes that could not train together.

    Raises:
        ValueError: If one process sees several GPUs, over which the model is not spread: a batch
            and its negatives would be split. If several processes are to save on SIGTERM. If they
            checkpoint reentrantly, which fails with parameters that no loss reaches.
    """
    places: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    spread = len({place for place in places.values() if place not in ("cpu", "disk")}) > 1
    if args.n_gpu > 1 and not spread:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs. Start one process for each with `torchrun "
            f"--nproc_per_node {args.n_gpu} your_script.py`, or show it one GPU with "
            "`CUDA_VISIBLE_DEVICES=0`."
        )
    if args.world_size > 1 and not (
        args.dataloader_drop_last or args.accelerator_config.even_batches
    ):
        raise ValueError(
            "`even_batches=False` would give some processes fewer batches, and the others would "
            "wait for ever. Pass `dataloader_drop_last=True`, or leave it out."
        )
    if args.world_size > 1 and args.enable_jit_checkpoint:
        raise ValueError(
            "`enable_jit_checkpoint` does not go with several processes, which get SIGTERM at "
            "different steps. Leave it out and choose a smaller `save_steps`."
        )
    chosen = args.ddp_find_unused_parameters is not None or args.ddp_static_graph is not None
    if args.world_size > 1 and _reentrant(args) and not chosen:
        raise ValueError(
            "`use_reentrant=True` does not go with several processes. Pass "
            "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )


def _reentrant(args: PicoTrainingArguments) -> bool:
    names = ("activation_checkpointing", "gradient_checkpointing")  # transformers renamed it
    given = [getattr(args, f"{name}_kwargs", None) or {} for name in names]
    used = any(getattr(args, name, None) for name in names)
    return used and any(options.get("use_reentrant") is True for options in given)


def check_sharding(args: PicoTrainingArguments, accelerator: Accelerator, model: Any) -> None:
    """Refuses FSDP where it would be ignored or would not do what it says.

    Args:
        args: The run's knobs.
        accelerator: Of the run.
        model: The model, or None if it is not there yet.

    Raises:
        ValueError: See above.
    """
    if not (args.fsdp or asked_of_launcher(FSDP_VARIABLE)):
        return
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError("`fsdp` takes FSDP 2 only. Pass `fsdp_config={'version': 2}`.")
    if not accelerator.is_fsdp2:
        raise ValueError(
            f"`fsdp` has no effect with {accelerator.num_processes} process(es) on "
            f"{accelerator.device.type}: accelerate spreads parameters over several GPUs only, and "
            "would ignore it. Leave it out: processes started with `torchrun` train one model."
        )
    for name, (refused, instead) in _with_sharding(args, plugin, model).items():
        if refused:
            raise ValueError(f"{name} does not go with `fsdp`. {instead}")


def _with_sharding(args: Any, plugin: Any, model: Any) -> dict[str, tuple[bool, str]]:
    """What does not go with parameters in parts: whether it is given, and what to do."""
    whole = "FULL_STATE_DICT" in str(plugin.state_dict_type)
    return {
        "`state_dict_type` other than FULL_STATE_DICT": (not whole, "Choose that one."),
        "`cpu_ram_efficient_loading`": (plugin.cpu_ram_efficient_loading, "Pass False."),
        "`activation_checkpointing` of `fsdp_config`": (
            plugin.activation_checkpointing,
            "Pass `gradient_checkpointing=True`.",
        ),
        "`mini_batch_size`": (args.mini_batch_size is not None, "Leave one of them out."),
        "`push_to_hub`": (args.push_to_hub, "Push what `save_model` saves when the run is over."),
        "An adapter": (
            model is not None and base_model(model) is not model,
            "Its few parameters need no sharding: start processes with `torchrun`.",
        ),
    }


def asked_of_launcher(variable: str) -> bool:
    """Whether `accelerate launch` set a variable to true."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
