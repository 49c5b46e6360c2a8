"""Finds the best images of a store: by one vector per image first, then by exact scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.search.store import ImageStore

# Up to so many images a scan of all tokens takes a fraction of a second.
EXACT_UP_TO = 2000


@dataclass(frozen=True)
class Queries:
    """Queries in the stored columns, with the column weights w of a model folded in.

    With the image basis B, an image's pooled feature a in the encoder's columns, and a query's b in
    weighted columns, cos = a · B(w ∘ b) / (‖√w ∘ b‖ · ‖a M‖) for the metric M = B diag(√w): the
    query carries all but the last length, so that stored features do not depend on w.

    Attributes:
        tokens: Words or patches; `pooled` holds B(w ∘ b) / ‖√w ∘ b‖ unless `share` is 0.
        share: m of the score (1 - m) · S + m · cos, in [0, 1].
        metric: M (D, D) fp32; None if `share` is 0.
    """

    tokens: TokenFeatures
    share: float = 0.0
    metric: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def exact_scores(store: ImageStore, rows: Tensor, queries: TokenFeatures) -> Tensor:
    """(rows, queries) S of some images and folded queries, see `similarity`."""
    scores = torch.empty(len(rows), len(queries))
    for part, block in store.vectors.blocks(rows):
        scores[part] = similarity(store.vectors.tokens(block), queries)
    return scores


@torch.no_grad()
def best_rows(
    store: ImageStore,
    rows: Tensor,
    queries: Queries,
    top_k: int,
    depth: int,
    exact: bool | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """The best of some rows for every query, with exact scores.

    Args:
        store: The images.
        rows: Which of them are searched, ascending.
        queries: Words or patches.
        top_k: How many are returned.
        depth: How many of the best by one vector per image are scored exactly, where not all are.
        exact: True scores all rows; None does up to `EXACT_UP_TO`.

    Returns:
        (scores, rows) of every query, best first; equal scores in the order of rows.

    Raises:
        ValueError: If the pooled features are part of the score and not all rows have one.
    """
    cosines = _cosines(store, rows, queries)
    if queries.share == 1.0:  # no token takes part
        return [_best(own, rows, top_k) for own in cosines.t()]
    depth = max(depth, top_k)
    if exact is None:
        exact = len(rows) <= EXACT_UP_TO
    if exact or len(rows) <= depth:
        scores = _mixed(exact_scores(store, rows, queries.tokens), cosines, queries.share).t()
        return [_best(own, rows, top_k) for own in scores]
    # S is about twice the product of the means.
    means = 2 * store.vectors.pooled_scores(queries.tokens.mean())[rows]
    first = _mixed(means, cosines, queries.share)
    found = []
    for number in range(len(queries)):
        near = first[:, number].topk(depth).indices.sort().values
        own = slice(number, number + 1)
        tokens = exact_scores(store, rows[near], queries.tokens[own])
        scores = _mixed(tokens, cosines[near, own], queries.share).flatten()
        found.append(_best(scores, rows[near], top_k))
    return found


def _cosines(store: ImageStore, rows: Tensor, queries: Queries) -> Tensor:
    """(rows, queries) cosines of pooled features; no columns of queries where they do not count."""
    if queries.share == 0.0:
        return torch.zeros(len(rows), 0)
    lacking = int((~store.has_summary[rows]).sum())
    if lacking:
        raise ValueError(
            f"The encoder's pooled features are {queries.share:.3g} of the model's score "
            f"(`pooled_share`), and the index holds {lacking} images without one. Add the same "
            "images again, which completes them, or set `model.prototypes.share_score(0)`."
        )
    assert queries.tokens.pooled is not None
    assert queries.metric is not None
    return store.vectors.summary_scores(queries.tokens.pooled, queries.metric)[rows]


def _mixed(scores: Tensor, cosines: Tensor, share: float) -> Tensor:
    return scores if share == 0.0 else (1 - share) * scores + share * cosines


def _best(scores: Tensor, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if not bool(scores.isfinite().all()):
        raise ValueError(
            "A query, or an image of the index, has vectors that are not finite. Look for damage "
            "with `verify`, and make the index anew from images."
        )
    order = scores.sort(descending=True, stable=True).indices[:top_k]
    return scores[order], rows[order]
