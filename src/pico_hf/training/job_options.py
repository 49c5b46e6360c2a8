"""What a training job is made of, as options: which model, and which data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A dual encoder or a Pico model: a folder or a repository."}
    )
    vision_model: str | None = field(
        default=None, metadata={"help": "Vision tower, to be joined with --text_model."}
    )
    text_model: str | None = field(default=None, metadata={"help": "Text tower."})
    # Fields of PicoConfig: what is not given stays as the model has it.
    num_prototypes: int | None = field(
        default=None, metadata={"help": "Style prototypes per modality, K."}
    )
    probe_size: int | None = field(
        default=None, metadata={"help": "Pairs that define the prototypes, R."}
    )
    estimators: list[str] | None = field(
        default=None, metadata={"help": "What proposes how to score: style, canonical, pooled."}
    )
    feedback_temperature: float | None = field(
        default=None, metadata={"help": "How much a gain in rSum counts in the fusion, > 0."}
    )
    column_dropout: float | None = field(
        default=None, metadata={"help": "Share of the image tower's columns left out in training."}
    )
    loss: str | None = field(default=None, metadata={"help": "hinge, infonce or sigmoid."})
    margin: float | None = field(default=None, metadata={"help": "Margin of the hinge loss, > 0."})
    pooled_share: float | None = field(
        default=None,
        metadata={"help": "How much of the score the encoder's own pooled features are."},
    )
    use_lora: bool = field(
        default=False, metadata={"help": "Adapt the towers by LoRA; needs peft. Saves an adapter."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "Updates are scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the matrices."})


@dataclass
class DataArguments:
    """Which data to train and evaluate on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder or Hub repository."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "parquet or jsonl files, or an imagefolder."}
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Likewise, dev split; default: a tenth of the training images, ten at least."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: found by its type."})
    caption_column: str | None = field(
        default=None, metadata={"help": "One caption or a list of them; default: found by name."}
    )
    image_id_column: str | None = field(
        default=None, metadata={"help": "Rows of one value are no negatives of each other."}
    )
    gallery_column: str | None = field(
        default=None, metadata={"help": "Rows of one value are ranked among themselves."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "For a quick try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "For a quick try."})
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave unreadable images out and count them."}
    )
    compare_base: bool = field(
        default=True, metadata={"help": "Also score the same model with uniform column weights."}
    )


KNOBS = (
    "num_prototypes",
    "probe_size",
    "estimators",
    "feedback_temperature",
    "column_dropout",
    "loss",
    "margin",
    "pooled_share",
)
