"""A model whose parameters are spread over processes (FSDP 2), and whole where need be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import get_parameters_from_modules
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from pico_hf.encoders.projection_modules import projection_parameters
from pico_hf.hub.adapter_files import base_model
from pico_hf.hub.tensors import checked_tensors
from pico_hf.training.device_refusals import FSDP_VARIABLE, check_sharding
from pico_hf.training.resumable import ResumableTrainer
from pico_hf.training.resuming import check_checkpoint_weights

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


class ShardingTrainer(ResumableTrainer):
    """A [`ResumableTrainer`] that takes `fsdp=True`.

    Splits are encoded, statistics taken and models saved while every process holds all parameters.
    Checkpoints hold what those of other runs hold, safetensors among it, and either kind of run
    goes on from them.
    """

    _whole = False

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over processes while it trains."""
        return self.accelerator.is_fsdp2

    def create_accelerator_and_postprocess(self) -> None:
        """Refuses what accelerate would ignore; see `Trainer`."""
        before = os.environ.get(FSDP_VARIABLE)
        super().create_accelerator_and_postprocess()
        try:
            check_sharding(self.args, self.accelerator, getattr(self, "model", None))
        except ValueError:
            # accelerate has noted it for the whole process, where later runs would find it.
            AcceleratorState._reset_state()
            os.environ.pop(FSDP_VARIABLE, None)
            if before is not None:
                os.environ[FSDP_VARIABLE] = before
            raise

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.sharded:
            prepare_parameters(self.model, self.accelerator)
        return super()._prepare_for_training(*args, **kwargs)

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Every process holds all parameters within the block, which all have to enter.

        Without FSDP they do anyway.
        """
        parts = [part for part in self.model.modules() if isinstance(part, FSDPModule)]
        if self._whole or not parts:
            yield
            return
        # torch takes for the root whichever part runs first, unless it is told.
        parts[0]._get_fsdp_state()._lazy_init()
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
            for part in parts:
                part.reshard()
                _forget_order(part)
            for part in parts[1:]:  # the root is needed again at once
                part.set_reshard_after_forward(True, recurse=False)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `Trainer.evaluate`."""
        with self.whole_model():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.predict`."""
        with self.whole_model():
            return super().predict(*args, **kwargs)

    # ---- files ------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self.whole_model():  # a fingerprint of the encoder is saved, too
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves what a run without FSDP saves; stock code would pickle the weights once more."""
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = _numbers(Path(checkpoint) / "optimizer.pt")
        state = with_names(state, self.model, self.optimizer)
        if state["state"]:  # plain gradient descent has none, and torch takes none
            set_optimizer_state_dict(self.model, self.optimizer, state, options=_WHOLE)
        self.lr_scheduler.load_state_dict(_numbers(Path(checkpoint) / "scheduler.pt"))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.sharded:
            self._load_weights(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.sharded:
            self._load_weights(Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _load_weights(self, folder: Path) -> None:
        check_checkpoint_weights(folder, self.model)
        files = sorted(folder.glob("model*.safetensors"))
        tensors = dict(pair for file in files for pair in checked_tensors(file))
        set_model_state_dict(self.model, tensors, options=_WHOLE)


def _forget_order(part: FSDPModule) -> None:
    """Forgets the order in which parts were run, which the next backward pass would go back.

    Processes encode different numbers of batches, and with other orders they would wait for ever.
    """
    state = part._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    for group in state._fsdp_param_groups:
        group._post_forward_indices.clear()


def on_whole_model(method: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a method of a [`ShardingTrainer`] run while every process holds all parameters."""

    @wraps(method)
    def run(self: ShardingTrainer, *args: Any, **kwargs: Any) -> Any:
        with self.whole_model():
            return method(self, *args, **kwargs)

    return run


def prepare_parameters(model: nn.Module, accelerator: Accelerator) -> None:
    """Tells accelerate which parameters form a part and which ones stay whole.

    Scalars have no dimension to be spread over: they stay whole, and their gradients are averaged
    over processes. Parts are the layers of the towers, unless the run names others.

    Args:
        model: The [`PicoModel`], not yet sharded.
        accelerator: With FSDP 2.
    """
    plugin = accelerator.state.fsdp_plugin
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return
    given = get_parameters_from_modules(plugin.ignored_modules, model, accelerator.device)
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    for scalar in scalars:
        scalar.data = scalar.data.to(accelerator.device)
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(_average_gradient)
    plugin.ignored_modules = [nn.ParameterList([*scalars, *given])]
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)


def _average_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the classes whose modules are run as a whole, before the hidden states.

    The word embeddings are not among them: accelerate makes a part of them by itself.
    """
    pico = base_model(model)
    words = pico.get_input_embeddings()
    after = set(projection_parameters(pico.encoder))
    later = {id(p) for name, p in pico.encoder.named_parameters() if name in after}
    names: dict[str, bool] = {}
    for module in pico.encoder.modules():
        name = type(module).__name__
        if name in (pico.encoder._no_split_modules or ()):
            fits = words not in module.modules() and not later & set(map(id, module.parameters()))
            names[name] = names.get(name, True) and fits
    return sorted(name for name, fits in names.items() if fits)


def with_names(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """A state of an optimizer with the names of parameters in place of their numbers.

    Args:
        state: Of a run with FSDP, which has names, or without, which has numbers.
        model: The model.
        optimizer: Whose groups hold the parameters in the order of those numbers.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    given = [number for group in state["param_groups"] for number in group["params"]]
    called = dict(zip(given, own, strict=True))
    groups = [
        {**group, "params": [called[number] for number in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {called[number]: values for number, values in state["state"].items()},
        "param_groups": groups,
    }


def _numbers(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
