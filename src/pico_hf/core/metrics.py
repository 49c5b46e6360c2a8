"""Score matrix and caption→image index → ranks, Recall@k, rSum."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

CUTOFFS = (1, 5, 10)
_ROWS = 64  # images compared at a time: a whole comparison would be counted through an int64 copy


class NotNumbersError(ValueError):
    """Scores that hold NaN cannot be ranked."""


def text_to_image_ranks(
    scores: Float[Tensor, "images texts"],
    text_to_image: Int[Tensor, " captions"],
    image_ids: Int[Tensor, " identities"] | None = None,
) -> Int[Tensor, " captions"]:
    """Rank of each text's image among all images, from 1.

    Ties count against the query: a model that scores everything alike must not look perfect.
    Where several images have the identity of the text's own, the best-ranked of them counts, and
    they are no competitors of each other.

    Args:
        scores: One row per image, one column per caption; any real scale.
        text_to_image: Row of the image that each caption belongs to.
        image_ids: Identity of each image; None = all different.

    Returns:
        Ranks from 1 to the number of images.

    Raises:
        ValueError: If scores hold NaN, or if the index does not fit the matrix.

    Example:
        >>> scores = torch.tensor([[0.9, 0.5], [0.1, 0.5]])
        >>> text_to_image_ranks(scores, torch.tensor([0, 1])).tolist()
        [1, 2]
    """
    _check(scores, text_to_image, image_ids)
    if image_ids is not None:
        return _text_ranks_by_identity(scores, text_to_image, image_ids)
    own = _own(scores, text_to_image)
    # The match reaches its own score, so counting starts at 1.
    return torch.stack([(block >= own).sum(dim=0) for block in scores.split(_ROWS)]).sum(dim=0)


def image_to_text_ranks(
    scores: Float[Tensor, "images texts"],
    text_to_image: Int[Tensor, " captions"],
    image_ids: Int[Tensor, " identities"] | None = None,
) -> Int[Tensor, " images"]:
    """Rank of each image's best-ranked caption among the captions of other images, from 1.

    An image's further captions do not push each other down, as in the published protocol of the
    task; ties with captions of other images count against the query. The captions of all images of
    one identity are captions of each of them.

    Args:
        scores: One row per image, one column per caption; any real scale.
        text_to_image: Row of the image that each caption belongs to.
        image_ids: Identity of each image; None = all different.

    Returns:
        Ranks from 1.

    Raises:
        ValueError: If scores hold NaN, or if the index does not fit the matrix.

    Example:
        >>> scores = torch.tensor([[0.9, 0.2, 0.3], [0.1, 0.6, 0.7]])
        >>> image_to_text_ranks(scores, torch.tensor([0, 0, 1])).tolist()
        [1, 1]
    """
    _check(scores, text_to_image, image_ids)
    if image_ids is not None:
        return _image_ranks_by_identity(scores, text_to_image, image_ids)
    own = _own(scores, text_to_image)
    best = scores.new_full((len(scores),), -torch.inf)
    best = best.scatter_reduce(0, text_to_image, own, "amax")
    blocks = zip(scores.split(_ROWS), best.split(_ROWS), strict=True)
    reached = torch.cat([(block >= bar.unsqueeze(1)).sum(dim=1) for block, bar in blocks])
    own_reached = text_to_image[own >= best[text_to_image]]  # the best one, and its equals
    return 1 + reached - torch.bincount(own_reached, minlength=len(scores))


def recall_at_k(ranks: Int[Tensor, " queries"], k: int) -> float:
    """Percentage of queries whose match is among the first k, in [0, 100].

    Args:
        ranks: From 1.
        k: >= 1.

    Returns:
        R@k in percent.

    Example:
        >>> recall_at_k(torch.tensor([1, 2, 7, 1]), 1)
        50.0
    """
    return 100.0 * (ranks <= k).double().mean().item()


def retrieval_metrics(
    scores: Float[Tensor, "images texts"],
    text_to_image: Int[Tensor, " captions"],
    image_ids: Int[Tensor, " identities"] | None = None,
) -> dict[str, float]:
    """Recall@1/5/10 and median rank both ways, and rSum, the sum of the six recalls.

    Args:
        scores: One row per image, one column per caption; any real scale.
        text_to_image: Row of the image that each caption belongs to; every image has at least one.
        image_ids: Identity of each image; None = all different. Images of one identity, such as two
            views of a product, share their captions and do not compete.

    Returns:
        `i2t_r1` … `t2i_r10` in percent, `i2t_median_rank`, `t2i_median_rank` from 1 (the mean of
        the middle two for an even number of queries), and `rsum` in [0, 600].

    Raises:
        ValueError: If scores hold NaN, or if the index does not fit the matrix.

    Example:
        >>> retrieval_metrics(torch.eye(2), torch.tensor([0, 1]))["rsum"]
        600.0
    """
    metrics: dict[str, float] = {}
    for way, rank in (("i2t", image_to_text_ranks), ("t2i", text_to_image_ranks)):
        ranks = rank(scores, text_to_image, image_ids)
        metrics |= {f"{way}_r{k}": recall_at_k(ranks, k) for k in CUTOFFS}
        metrics[f"{way}_median_rank"] = ranks.double().quantile(0.5).item()
    metrics["rsum"] = sum(metrics[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in CUTOFFS)
    return metrics


def _own(scores: Tensor, text_to_image: Tensor) -> Tensor:
    """(texts,) score of each text with its own image."""
    return scores.gather(0, text_to_image.unsqueeze(0)).squeeze(0)


def _text_ranks_by_identity(
    scores: Tensor, text_to_image: Tensor, image_ids: Tensor
) -> Int[Tensor, " captions"]:
    wanted = image_ids[text_to_image]  # (texts,)
    blocks = list(zip(scores.split(_ROWS), image_ids.split(_ROWS), strict=True))
    best = scores.new_full((scores.shape[1],), -torch.inf)
    for block, ids in blocks:
        others = ids.unsqueeze(1) != wanted
        best = torch.maximum(best, block.masked_fill(others, -torch.inf).amax(dim=0))
    ranks = torch.ones_like(text_to_image)
    for block, ids in blocks:
        ranks += ((block >= best) & (ids.unsqueeze(1) != wanted)).sum(dim=0)
    return ranks


def _image_ranks_by_identity(
    scores: Tensor, text_to_image: Tensor, image_ids: Tensor
) -> Int[Tensor, " images"]:
    wanted = image_ids[text_to_image]
    ranks = []
    for block, ids in zip(scores.split(_ROWS), image_ids.split(_ROWS), strict=True):
        others = ids.unsqueeze(1) != wanted
        best = block.masked_fill(others, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + ((block >= best) & others).sum(dim=1))
    return torch.cat(ranks)


def _check(scores: Tensor, text_to_image: Tensor, image_ids: Tensor | None) -> None:
    images, texts = scores.shape
    if len(text_to_image) != texts or texts == 0:
        raise ValueError(
            f"`text_to_image` must name the image of each of the {texts} texts, at least one, got "
            f"{len(text_to_image)} entries. Give one row number per column of `scores`."
        )
    first, last = (int(end) for end in text_to_image.aminmax())
    if first < 0 or last >= images:
        raise ValueError(
            f"`text_to_image` must hold rows from 0 to {images - 1}, got {first} to {last}. "
            "Number the images from 0 in the order of the rows of `scores`."
        )
    missing = torch.bincount(text_to_image, minlength=images) == 0
    if missing.any():
        raise ValueError(
            f"`text_to_image` must name every image, but image {int(missing.nonzero()[0])} has no "
            "caption. Leave such images out."
        )
    if image_ids is not None and image_ids.shape != (images,):
        raise ValueError(
            f"`image_ids` must name the identity of each of the {images} images, got shape "
            f"{tuple(image_ids.shape)}. Give one number per row of `scores`."
        )
    if scores.amax().isnan():  # the maximum of a matrix with a NaN is NaN
        raise NotNumbersError(
            "`scores` must be numbers, got NaN. Check the features they came from."
        )
