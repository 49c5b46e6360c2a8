"""Train, evaluate and save PICO on image-text pairs.

    python examples/run_pico.py                      # embedded data and encoders, nothing to download
    python examples/run_pico.py config.yaml          # every option in a YAML or JSON file
    python examples/run_pico.py --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset_name org/pairs --do_train --do_eval --output_dir outputs/mine

Without arguments it trains the base model (uniform column weights) and PICO from the same start on
emoji drawings of five families, and compares both on unseen concepts, drawn in seen and in unseen
styles.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoProcessor, HfArgumentParser, set_seed

from pico_hf import PicoModel, PicoTrainer, PicoTrainingArguments
from pico_hf.data import load_image_text
from pico_hf.model_card import comparison_table

HERE = Path(__file__).resolve().parent
EMBEDDED_DATA = HERE / "data" / "emoji-styles"
logger = logging.getLogger("run_pico")


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
    num_prototypes: int = field(default=8, metadata={"help": "Style prototypes per modality, K."})
    probe_size: int = field(default=1024, metadata={"help": "Pairs that define the prototypes, R."})
    estimator: str = field(default="paper", metadata={"help": "Estimator of the probability."})
    fusion: str = field(default="normalised_gain", metadata={"help": "How iterations are fused."})
    loss: str = field(default="hinge", metadata={"help": "hinge, infonce or sigmoid."})
    projection_dim: int = field(
        default=256, metadata={"help": "Columns of the embedded pair's common space."}
    )
    image_size: int = field(default=224, metadata={"help": "Pixels of the embedded pair's images."})


@dataclass
class DataArguments:
    """Which data to train and evaluate on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Folder or Hub repository."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "parquet or jsonl files, or an imagefolder."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Likewise, dev split."})
    image_column: str | None = field(default=None, metadata={"help": "Default: found by its type."})
    caption_column: str | None = field(
        default=None, metadata={"help": "One caption or a list of them; default: found by name."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "For a quick try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "For a quick try."})
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave unreadable images out and count them."}
    )
    compare_base: bool = field(
        default=True, metadata={"help": "Also train the same model with uniform column weights."}
    )
