"""What a trainer refuses of the GPUs and processes that it is started on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pico_hf.training_args import PicoTrainingArguments


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
