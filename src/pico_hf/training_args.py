"""Arguments of one training run; what belongs to the model is in PicoConfig."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
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
        feature_cache_dir: Where those features are kept; None is a folder that all runs share.
            `pico-hf cache` lists and clears it.
        tower_learning_rate: Learning rate of the towers' parameters; None is `learning_rate` / 10,
            and `learning_rate` for an adapter of the towers.

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
    eval_strategy: str = field(default="epoch", metadata={"help": "When the dev split is scored."})
    save_strategy: str = field(default="epoch", metadata={"help": "When a checkpoint is written."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "End with the checkpoint of the best dev rSum."}
    )
    metric_for_best_model: str | None = field(
        default="eval_rsum", metadata={"help": "Metric that picks the best checkpoint."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "rSum: more is better."})
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
    prototype_warmup_epochs: float = field(
        default=1.0, metadata={"help": "Epochs with uniform weights before the first refinement."}
    )
    alignment_images: int = field(
        default=20_000, metadata={"help": "Training images that canonical columns come from."}
    )
    freeze_encoder: bool = field(
        default=False, metadata={"help": "Train projections only; cache token features once."}
    )
    feature_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of cached features; default: shared by all runs."},
    )
    tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the towers; default learning_rate / 10."}
    )

    def __post_init__(self) -> None:
        """Checks our own arguments after the stock ones."""
        super().__post_init__()
        if self.prototype_warmup_epochs < 0:
            raise ValueError(
                f"`prototype_warmup_epochs` must be >= 0, got {self.prototype_warmup_epochs}."
            )
        if self.alignment_images < 2:
            raise ValueError(f"`alignment_images` must be >= 2, got {self.alignment_images}.")
        if self.per_device_train_batch_size < 2:
            raise ValueError(
                "`per_device_train_batch_size` must be >= 2, got "
                f"{self.per_device_train_batch_size}: the other pairs of a batch are its negatives."
            )
