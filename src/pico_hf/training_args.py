"""Arguments of one training run; what belongs to the model is in PicoConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

SCHEDULERS_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
SMALLER_IS_BETTER = ("loss", "median_rank")
PROJECTION_STARTS = ("as_is", "closed_form")


@dataclass(repr=False)  # a generated one would show `hub_token`
class PicoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of image-text retrieval, and PICO's own.

    The defaults follow the task's published recipe (LAPS, CVPR 2024): AdamW, weight decay 1e-4,
    learning rate 2e-4 for heads and a tenth of it for towers, gradient clip 2.0, batch 128.

    Attributes:
        refine_prototypes: False leaves the column weights as they are: w = 1 throughout for a model
            that is new.
        prototype_warmup_epochs: Epochs with uniform weights before the first refinement; the hinge
            loss ramps over all negatives meanwhile. >= 0.
        freeze_encoder: Train projections only and cache the towers' token features once.
        alignment_images: Images of the training split, with all their captions, from which
            canonical columns are estimated when training ends; >= 2.
        projection_start: `"closed_form"` replaces both sides' last linear projection before the
            first step by what training pairs have in common, see `pico_hf.core.closed_form`: for
            projections that are untrained. `"as_is"` starts from the model's own.
        feature_cache_dir: Where those features are kept; None is a folder that all runs share.
            `pico-hf cache` lists and clears it.
        tower_learning_rate: Learning rate of the towers' parameters; None is `learning_rate` / 10,
            and `learning_rate` for an adapter of the towers.
        mini_batch_size: Pairs encoded at a time in a training step, >= 1. Gradients stay those of
            the whole batch and memory is that of so few pairs; every pair is encoded twice. None
            encodes the whole batch at once.

    Raises:
        ValueError: If a value is out of range.
    """

    learning_rate: float = field(
        default=2e-4, metadata={"help": "Peak learning rate of the heads."}
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=2.0, metadata={"help": "Gradient clip."})
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Pairs per step; every other pair in it is a negative."}
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Rows encoded at a time."}
    )
    eval_strategy: str | None = field(
        default=None, metadata={"help": "When the dev split is scored; default: each epoch."}
    )
    save_strategy: str | None = field(
        default=None, metadata={"help": "When a checkpoint is written; default: as eval_strategy."}
    )
    save_steps: float | None = field(
        default=None, metadata={"help": "Steps between checkpoints; default: as eval_steps."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={
            "help": "End with the checkpoint of the best dev rSum; default: if there is one."
        },
    )
    metric_for_best_model: str | None = field(
        default="eval_rsum",
        metadata={"help": "Picks the best checkpoint; of several dev splits the first one's."},
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Default: False for losses and median ranks, else True."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep image and caption columns for the collator."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "A last batch of one pair would have no negatives."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Every process computes the same prototypes itself."}
    )
    refine_prototypes: bool = field(
        default=True, metadata={"help": "False trains the base model: w = 1 throughout."}
    )
    prototype_warmup_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Epochs with uniform weights before the first refinement; default 1, for a "
            "stream 0.1, which is a tenth of the run."
        },
    )
    alignment_images: int = field(
        default=20_000, metadata={"help": "Training images that canonical columns come from."}
    )
    freeze_encoder: bool = field(
        default=False, metadata={"help": "Train projections only; cache token features once."}
    )
    projection_start: str = field(
        default="as_is",
        metadata={"help": "Where projections start: as_is, or closed_form for untrained ones."},
    )
    feature_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of cached features; default: shared by all runs."},
    )
    tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the towers; default learning_rate / 10."}
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs encoded at a time, for batches that do not fit into memory."},
    )

    def __post_init__(self) -> None:
        """Fits what was not given to what was, then checks our own knobs after the stock ones."""
        self.warmup_given = self.prototype_warmup_epochs is not None
        if not self.warmup_given:
            self.prototype_warmup_epochs = 1.0
        self.evaluation_given = self.eval_strategy is not None
        self._fit_evaluation()
        super().__post_init__()
        if getattr(self.deepspeed_plugin, "zero_stage", None) == 3:  # else models load in parts
            raise ValueError(
                "`zero_optimization.stage` of `deepspeed` cannot be 3: whole splits are encoded by "
                "whole models, and stage 3 leaves none. Pass 1 or 2, or `fsdp`."
            )
        if _value(self.lr_scheduler_type) in SCHEDULERS_BY_METRIC:
            # Their own default is right for losses only.
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode} | dict(self.lr_scheduler_kwargs or {})
        if self.prototype_warmup_epochs < 0:
            raise ValueError(
                f"`prototype_warmup_epochs` must be >= 0, got {self.prototype_warmup_epochs}."
            )
        if self.projection_start not in PROJECTION_STARTS:
            raise ValueError(
                f"`projection_start` must be one of {', '.join(PROJECTION_STARTS)}, got "
                f"{self.projection_start!r}."
            )
        if self.alignment_images < 2:
            raise ValueError(f"`alignment_images` must be >= 2, got {self.alignment_images}.")
        if self.per_device_train_batch_size < 2:
            raise ValueError(
                "`per_device_train_batch_size` must be >= 2, got "
                f"{self.per_device_train_batch_size}: the other pairs of a batch are its negatives."
            )
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ValueError(f"`mini_batch_size` must be >= 1, got {self.mini_batch_size}.")
        if self.tower_learning_rate is not None and self.tower_learning_rate < 0:
            raise ValueError(f"`tower_learning_rate` must be >= 0, got {self.tower_learning_rate}.")

    def __str__(self) -> str:
        """All values, without the token wherever it stands."""
        text = super().__str__()
        return text.replace(self.hub_token, "[hidden]") if self.hub_token else text

    __repr__ = __str__

    def _fit_evaluation(self) -> None:
        """Makes evaluation, saving and the choice of the best model fit each other.

        A default never contradicts what was given: saving follows evaluation or the other way
        round, and the best model is loaded at the end if there are scores of saved checkpoints.
        """
        given, saved = (_value(name) for name in (self.eval_strategy, self.save_strategy))
        follows = saved in ("steps", "epoch") and self.load_best_model_at_end is not False
        self.eval_strategy = given or (saved if follows else "epoch")
        scored = _value(self.eval_strategy)
        self.save_strategy = saved or (scored if scored != "no" else "epoch")
        if scored == "steps" and self.eval_steps is None:
            self.eval_steps = self.save_steps or self.logging_steps
        if self.save_steps is None:
            self.save_steps = self.eval_steps if scored == "steps" else 500
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self._scores_checkpoints(scored)
        chooses = _value(self.lr_scheduler_type) in SCHEDULERS_BY_METRIC
        if self.metric_for_best_model is None and (self.load_best_model_at_end or chooses):
            self.metric_for_best_model = "eval_rsum"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(SMALLER_IS_BETTER)

    def _scores_checkpoints(self, scored: str) -> bool:
        """Whether every checkpoint is written when the dev split is scored."""
        saved = _value(self.save_strategy)
        if scored == "no" or saved == "best":
            return saved == "best" and scored != "no"
        ratio = self.save_steps / self.eval_steps if scored == "steps" else 1
        return saved == scored and abs(ratio - round(ratio)) < 1e-9


def _value(name: Any) -> Any:
    """The text of an enumeration's member; anything else as it is."""
    return getattr(name, "value", name)
