"""What the wrapped encoder scores by itself: the cosine of its own pooled features."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.metrics import NotNumbersError
from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.score_form import ScoreForm
from pico_hf.core.token_features import TokenFeatures
from pico_hf.training.evaluation import evaluate_retrieval

logger = logging.getLogger(__name__)

PREFIX = "encoder_"  # of its metrics beside those of the model


@torch.no_grad()
def evaluate_encoder(model: PreTrainedModel, split: EncodedSplit) -> dict[str, float]:
    """Ranks a split just as the wrapped encoder does, whatever the model's columns and weights are.

    That is what one has without PICO, so it stands beside every score of a model. Features come
    from the split, so this costs one product of pooled vectors.

    Args:
        model: Whose columns the split is in.
        split: From [`SplitEncoder.split`], with that model.

    Returns:
        The metrics of `evaluate_retrieval`.

    Raises:
        ValueError: If the split has no pooled features.
    """
    plain = replace(
        split,
        images=_pooled(model, split.images, "image"),
        texts=_pooled(model, split.texts, "text"),
    )
    own = ScoreForm(torch.ones_like(model.semantic_probability), 1.0)
    return evaluate_retrieval(model, plain, own)


def encoder_metrics(model: PreTrainedModel, split: EncodedSplit) -> dict[str, float]:
    """The same as `encoder_rsum` and so on; nothing, with a warning, if these are no numbers."""
    try:
        found = evaluate_encoder(model, split)
    except NotNumbersError:
        logger.warning(
            "The encoder's own pooled features hold NaN or infinity: its metrics are left out."
        )
        return {}
    return {f"{PREFIX}{name}": value for name, value in found.items()}


def _pooled(model: PreTrainedModel, side: PackedTokens, name: str) -> PackedTokens:
    """Pooled vectors in the encoder columns, one token per item."""
    if side.pooled is None:
        raise ValueError(
            f"The {name}s of `split` must have pooled features, got tokens alone. Encode them with "
            "`SplitEncoder.split` and a model in eval mode."
        )
    vectors = side.pooled.unsqueeze(1)
    mask = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    turned = TokenFeatures(vectors, mask, side.pooled)
    own = model.prototypes.to_encoder_columns(turned, name)
    return PackedTokens.collect([own])
