"""Score matrix and what matches what → ranks of matches, Recall@k, Precision@k, mean AP.

For queries and targets of one kind, image and image: any number of targets may match a query, and
an image that is its own target is left out. [`pico_hf.core.metrics`] has the protocol of captions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pico_hf.core.metrics import CUTOFFS, recall_at_k

_ROWS = 64  # queries ranked at a time: sorting takes several copies of what it sorts


def match_ranks(
    scores: Float[Tensor, "queries targets"], matches: Bool[Tensor, "queries targets"]
) -> Int[Tensor, "queries targets"]:
    """Ranks of each query's matches among all targets, from 1, best first; 0 after the last one.

    Ties of a match with another target count against the query, so that the ranks do not depend on
    the order of the targets.

    Args:
        scores: Any real scale; -inf = not ranked for this query, neither match nor competitor.
        matches: True = the target is what the query looks for.

    Raises:
        ValueError: If scores hold NaN or the shapes differ.

    Example:
        >>> scores = torch.tensor([[0.9, 0.8, 0.8, 0.1]])
        >>> match_ranks(scores, torch.tensor([[True, False, True, False]])).tolist()
        [[1, 3, 0, 0]]
    """
    _check(scores, matches)
    best_first = scores.masked_fill(~matches, -torch.inf).sort(dim=1, descending=True).values
    others = scores.masked_fill(matches, -torch.inf).sort(dim=1).values
    before = scores.shape[1] - torch.searchsorted(others, best_first)  # who reaches the match
    place = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    return (place + before).masked_fill(best_first == -torch.inf, 0)


def average_precision(ranks: Int[Tensor, "queries targets"]) -> Float[Tensor, " queries"]:
    """Mean over a query's matches of the share of matches among the targets up to each, fp64.

    That is the area under its precision-recall curve, as information retrieval counts it.

    Args:
        ranks: From [`match_ranks`], at least one match per query.

    Returns:
        In (0, 1].

    Example:
        >>> average_precision(torch.tensor([[1, 3, 0, 0]])).tolist()  # (1/1 + 2/3) / 2
        [0.8333333333333333]
    """
    place = torch.arange(1, ranks.shape[1] + 1, device=ranks.device).double()
    found = ranks > 0
    precision = torch.where(found, place / ranks.clamp(min=1), 0.0)
    return precision.sum(dim=1) / found.sum(dim=1)


def precision_at_k(ranks: Int[Tensor, "queries targets"], k: int) -> Float[Tensor, " queries"]:
    """Share of matches among the first k targets of each query, in [0, 1], fp64.

    It cannot reach 1 for a query with fewer than k matches.

    Args:
        ranks: From [`match_ranks`].
        k: >= 1.

    Example:
        >>> precision_at_k(torch.tensor([[1, 3, 0, 0]]), 2).tolist()
        [0.5]
    """
    return ((ranks > 0) & (ranks <= k)).sum(dim=1).double() / k


def match_metrics(
    scores: Float[Tensor, "queries targets"],
    query_ids: Int[Tensor, " queries"],
    target_ids: Int[Tensor, " targets"],
    query_images: Int[Tensor, " queries"] | None = None,
    target_images: Int[Tensor, " targets"] | None = None,
) -> dict[str, float]:
    """Recall@1/5/10, Precision@5/10, mean average precision and median rank of the first match.

    A target of the query's identity is a match. One that also is the same image as the query is
    neither match nor competitor: queries that are part of the gallery leave themselves out. Queries
    without a match are left out of the means.

    Args:
        scores: Any real scale; -inf = not ranked for this query.
        query_ids: What each query shows, such as the row of its target or its class.
        target_ids: What each target shows, in the same numbers.
        query_images: Which image each query is; None: no query is among the targets.
        target_images: Which image each target is, in the same numbers.

    Returns:
        `r1`, `r5`, `r10`, `p5`, `p10` and `map` in percent, `median_rank` from 1, and `queries`,
        how many had a match. With one match per query, R@k is the usual recall, with several the
        share of queries for which one of them is among the first k.

    Raises:
        ValueError: If scores hold NaN, a length does not fit, or no query has a match.

    Example:
        >>> scores = torch.tensor([[2.0, 0.5, 0.1], [0.5, 2.0, 0.7], [0.1, 0.7, 2.0]])
        >>> ids, images = torch.tensor([0, 0, 1]), torch.arange(3)
        >>> metrics = match_metrics(scores, ids, ids, images, images)
        >>> metrics["r1"], metrics["map"], metrics["queries"]  # ranks 1 and 2; the third has none
        (50.0, 75.0, 2.0)
    """
    for side, count, codes in (
        ("query", scores.shape[0], (query_ids, query_images)),
        ("target", scores.shape[1], (target_ids, target_images)),
    ):
        _check_codes(side, count, *codes)
    firsts, precisions, per_query = [], [], []
    for rows in torch.arange(len(scores), device=scores.device).split(_ROWS):
        block, matches = scores[rows], query_ids[rows].unsqueeze(1) == target_ids
        if query_images is not None and target_images is not None:
            own = matches & (query_images[rows].unsqueeze(1) == target_images)
            block, matches = block.masked_fill(own, -torch.inf), matches & ~own
        ranks = match_ranks(block, matches)
        ranks = ranks[ranks[:, 0] > 0]
        firsts.append(ranks[:, 0])
        per_query.append(average_precision(ranks))
        precisions.append(torch.stack([precision_at_k(ranks, k) for k in CUTOFFS[1:]], dim=1))
    first, precision = torch.cat(firsts), torch.cat(precisions)
    if len(first) == 0:
        raise ValueError(
            "`target_ids` must hold a match of at least one query besides the query itself, got "
            "none. Check that both sides are numbered alike."
        )
    metrics = {f"r{k}": recall_at_k(first, k) for k in CUTOFFS}
    means = 100.0 * precision.mean(dim=0)
    metrics |= {f"p{k}": float(mean) for k, mean in zip(CUTOFFS[1:], means, strict=True)}
    metrics["map"] = 100.0 * float(torch.cat(per_query).mean())
    metrics["median_rank"] = first.double().quantile(0.5).item()
    metrics["queries"] = float(len(first))
    return metrics


def _check(scores: Tensor, matches: Tensor) -> None:
    if scores.shape != matches.shape:
        raise ValueError(
            f"`matches` must be of the shape of `scores` {tuple(scores.shape)}, got "
            f"{tuple(matches.shape)}. Say of every pair whether it matches."
        )
    if scores.numel() and scores.amax().isnan():  # the maximum of a matrix with a NaN is NaN
        raise ValueError("`scores` must be numbers, got NaN. Check the features they came from.")


def _check_codes(side: str, count: int, ids: Tensor, images: Tensor | None) -> None:
    for name, codes in ((f"{side}_ids", ids), (f"{side}_images", images)):
        if codes is not None and codes.shape != (count,):
            raise ValueError(
                f"`{name}` must hold one number for each of the {count} {side} images of "
                f"`scores`, got shape {tuple(codes.shape)}."
            )
