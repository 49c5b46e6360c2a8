"""Optimizer states and gradients spread over processes by DeepSpeed (ZeRO stages 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import Trainer

from pico_hf.hub.adapter_files import base_model
from pico_hf.training.device_refusals import asked_of_launcher
from pico_hf.training_args import SCHEDULERS_BY_METRIC, PicoTrainingArguments

DEEPSPEED_VARIABLE = "ACCELERATE_USE_DEEPSPEED"  # what `accelerate launch` sets

_CONFIG = {
    "comment",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "zero_allow_untested_optimizer",
    "zero_optimization",
}
_ZERO = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage",
}
_TOGETHER = "Start several processes with `torchrun`, each of which holds the model."


def check_deepspeed(args: PicoTrainingArguments, model: Any, optimizers: Any) -> None:
    """Refuses every use of DeepSpeed but ZeRO stages 1 and 2 in fp32, which is what was run.

    Args:
        args: The run's knobs; DeepSpeed is asked for there, or by `accelerate launch`.
        model: The model, or None if it is not there yet.
        optimizers: The user's own optimizer and scheduler, either None.

    Raises:
        ValueError: See above; the message names the setting and says what to do.
    """
    launched = asked_of_launcher(DEEPSPEED_VARIABLE)
    if not (args.deepspeed or launched):
        return
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        raise ValueError(
            f"`deepspeed` was set after the arguments were made (`{DEEPSPEED_VARIABLE}` counts, "
            "too), and nothing would read it. Pass it to `PicoTrainingArguments(…)`."
        )
    for refused in _unfit_config(plugin.deepspeed_config, args):
        raise ValueError(refused)
    for name, (refuse, instead) in _with_deepspeed(args, model, optimizers).items():
        if refuse:
            raise ValueError(f"{name} does not go with `deepspeed`. {instead}")


def _unfit_config(config: Mapping[str, Any], args: PicoTrainingArguments) -> Iterator[str]:
    """What of a configuration is refused, in one line each."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2):
        yield (
            f"`zero_optimization.stage` of `deepspeed` cannot be {zero.get('stage', 0)!r}: stage 0 "
            "spreads nothing, and whole splits are encoded by whole models, which stage 3 leaves "
            "to no process. Pass 1 or 2, or `fsdp` (examples/accelerate_fsdp2.yaml)."
        )
    for name in sorted(key for key in config if key not in _CONFIG and _active(config[key])):
        yield (
            f"`{name}` of `deepspeed` cannot be {config[name]!r}: only ZeRO in fp32 was tried here,"
            " 16 bits would round the buffers of prototypes, and optimizer and scheduler come from "
            "the training arguments. Leave it out."
        )
    for name in sorted(key for key in zero if key not in _ZERO and _matters(key, zero[key])):
        yield (
            f"`zero_optimization.{name}` of `deepspeed` cannot be {zero[name]!r}: it was not tried "
            "here. Leave it out."
        )
    clipping = config.get("gradient_clipping", 0.0)
    if clipping != "auto" and float(clipping) != float(args.max_grad_norm or 0.0):
        yield (
            f"`gradient_clipping` of `deepspeed` is {clipping!r} and `max_grad_norm` "
            f"{args.max_grad_norm!r}, which would be ignored. Pass the same number, or "
            '"gradient_clipping": "auto" in its file.'
        )


def _active(section: Any) -> bool:
    """Whether a section is switched on; `auto` is not, since 16 bits are refused anyway."""
    if isinstance(section, Mapping) and "enabled" in section:
        return section["enabled"] not in (False, "auto")
    return bool(section)


def _matters(name: str, value: Any) -> bool:
    """Whether stages 1 and 2 look at a setting that `accelerate launch` always writes."""
    off = isinstance(value, Mapping) and value.get("device") in (None, "none")
    return not (off or name.startswith("stage3_"))


def _with_deepspeed(args: Any, model: Any, optimizers: Any) -> dict[str, tuple[bool, str]]:
    """What does not go with DeepSpeed: whether it is given, and what to do."""
    adapter = model is not None and base_model(model) is not model
    precision = args.mixed_precision not in (None, "no")
    return {
        "`bf16` or `fp16`": (precision, "It would round the buffers of prototypes: use fp32."),
        "`save_only_model=False`": (
            not args.save_only_model,
            "DeepSpeed pickles its optimizer's state, which is never read here. Pass "
            "`save_only_model=True`.",
        ),
        "`load_best_model_at_end=True`": (
            bool(args.load_best_model_at_end),
            "Pass False, and load what `trainer.state.best_model_checkpoint` names.",
        ),
        '`projection_start="closed_form"`': (
            args.projection_start == "closed_form",
            "DeepSpeed has copied the weights by then, and would put them back. Leave it at "
            '"as_is".',
        ),
        "An `lr_scheduler_type` that follows a metric": (
            args.lr_scheduler_type in SCHEDULERS_BY_METRIC,
            "It was not tried there. Choose another one.",
        ),
        "`mini_batch_size`": (args.mini_batch_size is not None, "Leave one of them out."),
        "`auto_find_batch_size`": (bool(args.auto_find_batch_size), "Leave one of them out."),
        "`push_to_hub`": (args.push_to_hub, "Push what `save_model` saves when the run is over."),
        "An adapter": (adapter, f"Its few parameters need no sharding. {_TOGETHER}"),
        "`optimizers`": (
            any(given is not None for given in optimizers),
            "Choose one by `optim` and `lr_scheduler_type`.",
        ),
        "A single process": (
            args.world_size < 2,
            "Start several ones with `torchrun`; without a GPU pass `use_cpu=True`, too.",
        ),
    }


class ZeroTrainer(Trainer):
    """`transformers.Trainer` that takes `deepspeed=` with ZeRO stages 1 and 2.

    Every process holds the whole model, so it is saved as in a run without DeepSpeed.
    """

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """See `Trainer.train`; with DeepSpeed it trains once, without resuming and trials."""
        if getattr(self, "deepspeed", None) is not None:
            raise ValueError(
                "With `deepspeed` a trainer trains once. Make a new one with the model as it is."
            )
        for name, given in (("resume_from_checkpoint", resume_from_checkpoint), ("trial", trial)):
            if self.is_deepspeed_enabled and given:
                raise ValueError(
                    f"`{name}` does not go with `deepspeed`, whose optimizer's state is pickled "
                    "and never read here. Leave one of them out."
                )
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._prepare_for_training(*args, **kwargs)
        except RuntimeError as error:
            if not self.is_deepspeed_enabled or "self.dim() cannot be 0" not in str(error):
                raise
            raise ValueError(
                "This deepspeed cannot send parameters without dimensions, such as `logit_scale`, "
                "to other processes (0.19.8 cannot). Install deepspeed==0.19.7."
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, trained or not; see `Trainer.save_model`."""
        given = self.is_deepspeed_enabled
        self.is_deepspeed_enabled = False  # stock code asks an engine, which only training makes
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.is_deepspeed_enabled = given
