"""Image → image retrieval: encodes the images of both sides, scores and ranks them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.match_metrics import match_metrics
from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.similarity import same_side_similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.image_pairs import ImagePairDataset
from pico_hf.data.image_sides import ImageSide
from pico_hf.training.encoding import SplitEncoder


@dataclass(frozen=True)
class EncodedImagePairs:
    """All images of an [`ImagePairDataset`] as token features, in its order.

    Attributes:
        queries: Images that search.
        targets: Images that are searched; the same object if they are the queries.
        query_ids: (queries,) number of what each query shows.
        target_ids: (targets,) likewise.
        query_images: (queries,) number of each query's content.
        target_images: (targets,) likewise.
    """

    queries: PackedTokens
    targets: PackedTokens
    query_ids: Tensor
    target_ids: Tensor
    query_images: Tensor
    target_images: Tensor


def encode_image_pairs(
    encoder: SplitEncoder, pairs: ImagePairDataset, description: str = "Encoding"
) -> EncodedImagePairs:
    """Encodes every image of either side once, in the columns of images.

    Args:
        encoder: Model, collator (a [`PicoCollator`] or [`ImagePairCollator`]) and batch size.
        pairs: What to encode.
        description: Text of the progress bar.
    """

    def encoded(side: ImageSide) -> PackedTokens:
        batches = encoder.batches(side.images, description)
        images = (image for image, _ in batches if image is not None)
        return encoder.packed(images)

    queries = encoded(pairs.queries)
    return EncodedImagePairs(
        queries,
        queries if pairs.targets is pairs.queries else encoded(pairs.targets),
        pairs.query_ids,
        pairs.target_ids,
        pairs.query_images,
        pairs.target_images,
    )


def score_images(
    model: PreTrainedModel,
    queries: TokenFeatures,
    targets: TokenFeatures,
    column_weights: Tensor | None = None,
) -> Tensor:
    """Scores images against images by the model's column weights.

    Both sides are in the columns of images, in which `PicoModel.encode_images` gives them: the
    basis of texts never takes part. For the score see
    [`pico_hf.core.similarity.same_side_similarity`].

    Args:
        model: Gives the column weights, unless others are tried.
        queries: From `encode_images`.
        targets: From `encode_images`.
        column_weights: (D,) weights >= 0 to try instead of the model's own; ones are the cosines of
            the encoder columns.

    Returns:
        (queries, targets) fp32, in [-2, 2]; symmetric, and 2 for an image with itself.
    """
    weights = model.column_weights if column_weights is None else column_weights
    return same_side_similarity(queries, targets, weights)


@torch.no_grad()
def image_pair_scores(
    model: PreTrainedModel, encoded: EncodedImagePairs, column_weights: Tensor | None = None
) -> Tensor:
    """Scores all queries against all targets block by block; see [`score_images`]."""
    queries, targets = encoded.queries, encoded.targets
    scores = torch.empty(len(queries), len(targets), device=model.device)
    for row, some_queries in queries.blocks():
        left = queries[some_queries].to(model.device)
        for column, some_targets in targets.blocks():
            right = targets[some_targets].to(model.device)
            scores[row, column] = score_images(model, left, right, column_weights)
    return scores


def evaluate_image_retrieval(
    model: PreTrainedModel, encoded: EncodedImagePairs, column_weights: Tensor | None = None
) -> dict[str, float]:
    """Ranks all targets for every query.

    Args:
        model: Gives the column weights, unless others are tried.
        encoded: From [`encode_image_pairs`].
        column_weights: (D,) weights to try instead of the model's own.

    Returns:
        R@1/5/10, P@5/10 and mean average precision in percent, the median rank of the first match,
        and how many queries have a match; see [`pico_hf.core.match_metrics.match_metrics`].
    """
    scores = image_pair_scores(model, encoded, column_weights).cpu()
    return match_metrics(
        scores,
        encoded.query_ids,
        encoded.target_ids,
        encoded.query_images,
        encoded.target_images,
    )
