"""Finds the best images of a store: by pooled vectors first, then by exact scores."""

from __future__ import annotations

import torch
from torch import Tensor

from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.search.store import ImageStore

# Up to so many images a scan of all tokens takes a fraction of a second.
EXACT_UP_TO = 2000


def pooled_tokens(tokens: TokenFeatures) -> Tensor:
    """(items, D) mean of the real tokens of each item."""
    mask = tokens.mask.unsqueeze(2)
    return (tokens.features.float() * mask).sum(dim=1) / mask.sum(dim=1)


def exact_scores(store: ImageStore, rows: Tensor, queries: TokenFeatures) -> Tensor:
    """(rows, queries) S of some images and folded queries, see `similarity`."""
    scores = torch.empty(len(rows), len(queries))
    for part, block in store.blocks(rows):
        scores[part] = similarity(store.tokens(block), queries)
    return scores


@torch.no_grad()
def best_rows(
    store: ImageStore,
    rows: Tensor,
    queries: TokenFeatures,
    top_k: int,
    depth: int,
    exact: bool | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """The best of some rows for every query, with exact scores.

    Args:
        store: The images.
        rows: Which of them are searched, ascending.
        queries: Words or patches, folded with the column weights, in the stored columns.
        top_k: How many are returned.
        depth: How many of the best by pooled vectors are scored exactly, where not all are.
        exact: True scores all rows; None does up to `EXACT_UP_TO`.

    Returns:
        (scores, rows) of every query, best first; equal scores in the order of rows.
    """
    depth = max(depth, top_k)
    if exact is None:
        exact = len(rows) <= EXACT_UP_TO
    if exact or len(rows) <= depth:
        scores = exact_scores(store, rows, queries).t()
        return [_best(own, rows, top_k) for own in scores]
    pooled = store.pooled_scores(pooled_tokens(queries))[rows]
    found = []
    for number in range(len(queries)):
        near = rows[pooled[:, number].topk(depth).indices.sort().values]
        scores = exact_scores(store, near, queries[number : number + 1]).flatten()
        found.append(_best(scores, near, top_k))
    return found


def _best(scores: Tensor, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    order = scores.sort(descending=True, stable=True).indices[:top_k]
    return scores[order], rows[order]
