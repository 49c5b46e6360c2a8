"""PICO for Hugging Face: image-text retrieval whose embedding columns are weighted by semantics.

Importing this package registers `PicoConfig` and `PicoModel` with the Auto classes and does nothing
else. The Trainer, data loading and other costly modules are imported when they are first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pico_hf.configuration_pico import PicoConfig
    from pico_hf.core.encoded_split import EncodedSplit
    from pico_hf.core.token_features import TokenFeatures
    from pico_hf.data.collator import PicoCollator
    from pico_hf.data.dataset import ImageTextDataset
    from pico_hf.data.image_pairs import ImagePairDataset
    from pico_hf.data.loading import load_image_text
    from pico_hf.data.pair_collator import ImagePairCollator
    from pico_hf.data.stream import ImageTextStream
    from pico_hf.encoders.spec import EncoderSpec, Step, TokenMap
    from pico_hf.encoders.table import register_encoder
    from pico_hf.evaluate_metric import retrieval_metric_path
    from pico_hf.explanation import Explanation, explain
    from pico_hf.hub.prototype_files import PicoPrototypes
    from pico_hf.lora import load_adapter_model, pico_lora_config, save_adapter
    from pico_hf.modeling_outputs import PicoOutput
    from pico_hf.modeling_pico import PicoModel
    from pico_hf.pipelines import (
        PicoImageFeatureExtractionPipeline,
        PicoZeroShotImageClassificationPipeline,
    )
    from pico_hf.recipes import Recipe, recipe
    from pico_hf.retriever import Match, PicoRetriever
    from pico_hf.search.hits import Hit
    from pico_hf.search.index import PicoIndex
    from pico_hf.training.encoder_cosine import evaluate_encoder
    from pico_hf.training.encoding import SplitEncoder
    from pico_hf.training.evaluation import evaluate_retrieval, split_scores
    from pico_hf.training.image_retrieval import (
        EncodedImagePairs,
        encode_image_pairs,
        evaluate_image_retrieval,
        score_images,
    )
    from pico_hf.training.trainer import PicoTrainer
    from pico_hf.training_args import PicoTrainingArguments

__version__ = "0.1.0"

_LAZY = {
    "EncoderSpec": "pico_hf.encoders.spec",
    "PicoConfig": "pico_hf.configuration_pico",
    "PicoModel": "pico_hf.modeling_pico",
    "PicoOutput": "pico_hf.modeling_outputs",
    "PicoPrototypes": "pico_hf.hub.prototype_files",
    "Step": "pico_hf.encoders.spec",
    "TokenFeatures": "pico_hf.core.token_features",
    "TokenMap": "pico_hf.encoders.spec",
    "register_encoder": "pico_hf.encoders.table",
    "EncodedImagePairs": "pico_hf.training.image_retrieval",
    "EncodedSplit": "pico_hf.core.encoded_split",
    "Explanation": "pico_hf.explanation",
    "ImagePairCollator": "pico_hf.data.pair_collator",
    "ImagePairDataset": "pico_hf.data.image_pairs",
    "ImageTextDataset": "pico_hf.data.dataset",
    "ImageTextStream": "pico_hf.data.stream",
    "Hit": "pico_hf.search.hits",
    "Match": "pico_hf.retriever",
    "PicoCollator": "pico_hf.data.collator",
    "PicoImageFeatureExtractionPipeline": "pico_hf.pipelines",
    "PicoIndex": "pico_hf.search.index",
    "PicoRetriever": "pico_hf.retriever",
    "PicoTrainer": "pico_hf.training.trainer",
    "PicoTrainingArguments": "pico_hf.training_args",
    "PicoZeroShotImageClassificationPipeline": "pico_hf.pipelines",
    "SplitEncoder": "pico_hf.training.encoding",
    "encode_image_pairs": "pico_hf.training.image_retrieval",
    "evaluate_encoder": "pico_hf.training.encoder_cosine",
    "evaluate_image_retrieval": "pico_hf.training.image_retrieval",
    "evaluate_retrieval": "pico_hf.training.evaluation",
    "explain": "pico_hf.explanation",
    "split_scores": "pico_hf.training.evaluation",
    "load_adapter_model": "pico_hf.lora",
    "load_image_text": "pico_hf.data.loading",
    "pico_lora_config": "pico_hf.lora",
    "Recipe": "pico_hf.recipes",
    "recipe": "pico_hf.recipes",
    "retrieval_metric_path": "pico_hf.evaluate_metric",
    "save_adapter": "pico_hf.lora",
    "score_images": "pico_hf.training.image_retrieval",
}

__all__ = [
    "EncodedImagePairs",
    "EncodedSplit",
    "EncoderSpec",
    "Explanation",
    "Hit",
    "ImagePairCollator",
    "ImagePairDataset",
    "ImageTextDataset",
    "ImageTextStream",
    "Match",
    "PicoCollator",
    "PicoConfig",
    "PicoImageFeatureExtractionPipeline",
    "PicoIndex",
    "PicoModel",
    "PicoOutput",
    "PicoPrototypes",
    "PicoRetriever",
    "PicoTrainer",
    "PicoTrainingArguments",
    "PicoZeroShotImageClassificationPipeline",
    "Recipe",
    "SplitEncoder",
    "Step",
    "TokenFeatures",
    "TokenMap",
    "encode_image_pairs",
    "evaluate_encoder",
    "evaluate_image_retrieval",
    "evaluate_retrieval",
    "explain",
    "load_adapter_model",
    "load_image_text",
    "pico_lora_config",
    "recipe",
    "register_encoder",
    "retrieval_metric_path",
    "save_adapter",
    "score_images",
    "split_scores",
]

# The command line registers them when a command begins: its help should not cost seconds.
if "pico_hf_command" not in sys.modules:
    import_module("pico_hf.registration")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
