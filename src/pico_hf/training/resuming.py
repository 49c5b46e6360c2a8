"""What a run checks of a checkpoint before it goes on from it: as much as loading a model does."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from pico_hf.hub.adapter_files import base_model
from pico_hf.hub.adapter_loading import check_weights
from pico_hf.hub.errors import shortened
from pico_hf.hub.files import read_json, refuse_pickle
from pico_hf.hub.tensors import check_safetensors, checked_tensors
from pico_hf.hub.weights import read_model_files
from pico_hf.training.checkpoints import MANIFEST, damage, newest_whole, step_of

_STATE = "trainer_state.json"
_MOST = sys.float_info.max  # a whole number may be larger, and then no float can be made of it
_MOST_STEPS = 2**53
_EARLIER = {"keep_special_tokens": False}  # facts that older checkpoints do not name
_PICKLED_WEIGHTS = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME, ADAPTER_WEIGHTS_NAME)
_NUMBERS = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")


def asked_for(resume: str | os.PathLike | bool | None) -> str | bool | None:
    """What `resume_from_checkpoint` asks for: a folder, True or nothing.

    A shell or a configuration file gives `"True"` and `"False"` as texts.

    Example:
        >>> asked_for("True"), asked_for("false"), asked_for("outputs/checkpoint-8")
        (True, None, 'outputs/checkpoint-8')
    """
    if isinstance(resume, bool) or resume is None:
        return resume or None
    text = os.fspath(resume)
    return {"true": True, "false": None, "none": None, "": None}.get(text.lower(), text)


def run_facts(model: nn.Module, train: Any, dev: Any) -> dict[str, Any]:
    """What a run must have in common with the one that wrote its checkpoint.

    Args:
        model: The Pico model, plain or wrapped by peft.
        train: Training split or stream, or None.
        dev: Dev split, a dict of them, or None.
    """
    pico = base_model(model)
    splits = dev if isinstance(dev, Mapping) else {"": dev}
    return {
        "estimators": list(pico.config.estimators),
        "num_prototypes": pico.config.num_prototypes,
        "keep_special_tokens": pico.config.keep_special_tokens,
        "encoder": pico.encoder.config.model_type,
        "adapter": pico is not model,
        "train_dataset": getattr(train, "identity", None),
        "eval_dataset": {name: getattr(split, "identity", None) for name, split in splits.items()},
    }


def chosen_checkpoint(resume: str | bool, output_dir: Path, facts: Mapping[str, Any]) -> str:
    """The folder that a run goes on from, checked but for its weights.

    Args:
        resume: From `asked_for`: a folder, or True for the newest whole checkpoint of the run.
        output_dir: The run's folder.
        facts: From `run_facts`.

    Raises:
        ValueError: If it is no whole checkpoint of this run, or not to be trusted.
    """
    folder = newest_whole(output_dir) if resume is True else Path(str(resume))
    if not folder.is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint's folder or True, got '{folder}', "
            "which is no folder."
        )
    _refuse_pickled(folder)
    if reason := damage(folder, sizes=False):
        raise ValueError(
            f"The checkpoint '{folder}' is not whole: it {reason}. Resume from another one, or "
            "from the newest whole one of `output_dir` with `resume_from_checkpoint=True`."
        )
    _check_facts(folder, facts)
    _check_state(folder, output_dir)
    _check_numbers(folder)
    return str(folder)


def check_checkpoint_weights(folder: Path, model: nn.Module) -> None:
    """Raises ValueError or OSError unless a checkpoint holds every weight of the live model.

    Args:
        folder: Of the checkpoint.
        model: The live model, plain or wrapped by peft; it is not changed.
    """
    _refuse_pickled(folder)
    if base_model(model) is model:
        _check_shapes(folder, read_model_files(folder, {}).shapes, model)
        return
    for file in sorted(folder.rglob("*.safetensors")):
        if file.name != ADAPTER_SAFE_WEIGHTS_NAME or file.parent != folder:
            check_safetensors(file)
    if not (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file() or _has_whole_model(folder):
        raise ValueError(
            f"The checkpoint '{folder}' must hold an adapter in {ADAPTER_SAFE_WEIGHTS_NAME} and no "
            "whole model. Resume with the model that it was written with."
        )
    check_weights(model, checked_tensors(folder / ADAPTER_SAFE_WEIGHTS_NAME))


def _has_whole_model(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors*"))


def _refuse_pickled(folder: Path) -> None:
    """Stock code would open them, some of them even beside safetensors."""
    if any((folder / name).exists() for name in _PICKLED_WEIGHTS):
        refuse_pickle(folder, "weights to be resumed from")


def _check_shapes(folder: Path, found: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    """Every tensor is there, or one that shares its memory, as tied weights do."""
    live: dict[str, Tensor] = model.state_dict(keep_vars=True)
    there = {live[name].data_ptr() for name in found.keys() & live.keys()}
    for name in sorted(found.keys() | live.keys()):
        if name not in live:
            problem = "the model has no place for"
        elif name not in found and live[name].data_ptr() not in there:
            problem = "it lacks"
        elif name in found and found[name] != tuple(live[name].shape):
            problem = f"the model has shape {tuple(live[name].shape)} in place of {found[name]} for"
        else:
            continue
        raise ValueError(
            f"The checkpoint '{folder}' does not fit the model: {problem} `{name}`. Resume with "
            "the model that it was written with."
        )


def _check_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    saved = read_json(folder / MANIFEST)
    for name, value in facts.items():
        there = saved.get(name, _EARLIER.get(name))
        if there == value:
            continue
        if name.endswith("_dataset"):
            problem = f"was written by a run with another `{name}`: other images or captions"
        else:
            written = shortened(repr(there), 200)
            problem = f"was written with {name}={written}, this run has {value!r}"
        raise ValueError(
            f"The checkpoint '{folder}' {problem}. Resume with what it was written with, or leave "
            "`resume_from_checkpoint` out to train from the beginning."
        )


def _check_state(folder: Path, output_dir: Path) -> None:
    state = read_json(folder / _STATE)
    try:
        TrainerState.load_from_json(str(folder / _STATE))
    except Exception as error:  # whatever an odd value makes of itself
        raise ValueError(
            f"{_STATE} of '{folder}' is not the state of a run ({type(error).__name__}: "
            f"{shortened(error)}). Resume from another checkpoint."
        ) from error
    for name in ("global_step", "best_global_step"):
        value = state.get(name)
        count = type(value) is int and 0 <= value < _MOST_STEPS
        if not (count or (value is None and name != "global_step")):
            raise ValueError(
                f"`{name}` in {_STATE} of '{folder}' must be a number of steps, got "
                f"{shortened(repr(value), 80)}."
            )
    if not isinstance(state.get("log_history", []), list):
        raise ValueError(f"`log_history` in {_STATE} of '{folder}' must be a list.")
    metric = state.get("best_metric")
    if metric is not None and not (type(metric) in (int, float) and abs(metric) <= _MOST):
        raise ValueError(f"`best_metric` in {_STATE} of '{folder}' must be a finite number.")
    best = state.get("best_model_checkpoint")
    if best is not None and not isinstance(best, str):
        raise ValueError(f"`best_model_checkpoint` in {_STATE} of '{folder}' must be a path.")
    own_best(best, folder, output_dir)


def own_best(best: str | None, folder: Path, output_dir: Path) -> str | None:
    """The best checkpoint that a state names, in the run's own folder; None if it is gone.

    Args:
        best: `best_model_checkpoint` of the state.
        folder: The checkpoint with that state. Of a run that was moved or copied as a whole, the
            best checkpoint is the one beside it.
        output_dir: The run's folder.

    Raises:
        ValueError: If it names a folder elsewhere.
    """
    if best is None:
        return None
    path, beside = Path(best), folder.parent / Path(best).name
    if step_of(path) is not None:
        if path.resolve().parent in (folder.resolve().parent, output_dir.resolve()):
            return best if path.is_dir() else None
        if beside.is_dir():
            return str(beside)
    if not path.exists():
        return None
    raise ValueError(
        f"`best_model_checkpoint` in {_STATE} of '{folder}' names '{best}', which is outside of "
        "the run's own folder. Do not trust this checkpoint."
    )


def best_of(folder: Path, output_dir: Path) -> str | None:
    """`own_best` of a checkpoint's state."""
    return own_best(read_json(folder / _STATE).get("best_model_checkpoint"), folder, output_dir)


def _check_numbers(folder: Path) -> None:
    """Reads the optimizer's and other states without running anything that they may hold."""
    if not (folder / "optimizer.pt").is_file():
        raise ValueError(
            f"The checkpoint '{folder}' holds a model without the optimizer's state, as "
            "`save_only_model=True` leaves it, and nothing can go on from it. Load the model with "
            "`PicoModel.from_pretrained` and train it anew."
        )
    for path in sorted(path for pattern in _NUMBERS for path in folder.glob(pattern)):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a damaged file makes of itself
            # Torch's own text would advise to open the file by all means.
            raise ValueError(
                f"{path.name} of the checkpoint '{folder}' is damaged or holds more than numbers; "
                "none of it was run. Resume from another checkpoint."
            ) from error
