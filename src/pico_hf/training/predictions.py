"""Scores and metrics of an encoded split, in the form that transformers hands out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import nested_detach, nested_numpify
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.training.encoder_cosine import encoder_metrics
from pico_hf.training.evaluation import evaluate_retrieval, predict_retrieval

UserMetrics = Callable[[EvalPrediction], dict[str, float]]


def ranked(model: PreTrainedModel, split: EncodedSplit, prefix: str) -> EvalLoopOutput:
    """Ranks a split, also as the encoder itself would, and keeps no scores.

    Args:
        model: Scores.
        split: The whole split.
        prefix: Of the names of metrics.
    """
    metrics = _named(evaluate_retrieval(model, split) | encoder_metrics(model, split), prefix)
    return EvalLoopOutput(None, None, metrics=metrics, num_samples=len(split.images))


def predicted(
    model: PreTrainedModel,
    split: EncodedSplit,
    prefix: str,
    compute_metrics: UserMetrics | None = None,
    preprocess: Callable[[Tensor, Tensor], Any] | None = None,
) -> EvalLoopOutput:
    """Ranks a split, keeps its scores, and adds the metrics that the user computes of them.

    Args:
        model: Scores.
        split: The whole split.
        prefix: Of the names of metrics.
        compute_metrics: Takes an `EvalPrediction` whose `predictions` are scores (images, texts),
            -inf across galleries, and whose `label_ids` are the image (texts,) of each caption.
        preprocess: Makes of both what `compute_metrics` gets as `predictions`; None: the scores.

    Returns:
        Scores and images of the captions as arrays, and all metrics.
    """
    scores, metrics = predict_retrieval(model, split)
    metrics |= encoder_metrics(model, split)
    labels = split.images_of_captions()
    if compute_metrics is not None:
        made = scores if preprocess is None else preprocess(scores, labels)
        prediction = EvalPrediction(nested_numpify(nested_detach(made)), nested_numpify(labels))
        metrics |= denumpify_detensorize(compute_metrics(prediction))
    named = _named(metrics, prefix)
    return EvalLoopOutput(scores.numpy(), labels.numpy(), named, num_samples=len(split.images))


def _named(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {
        name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
        for name, value in metrics.items()
    }
