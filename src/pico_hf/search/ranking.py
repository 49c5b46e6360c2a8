"""Finds the best images of a store: by one vector per image first, then by exact scores."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.search.hits import Found
from pico_hf.search.protocol import View
from pico_hf.search.queries import Queries, mixed
from pico_hf.search.vectors import Candidates

# Up to so many images a scan of all tokens takes a fraction of a second.
EXACT_UP_TO = 2000


def _exact_scores(candidates: Candidates, queries: Queries) -> Tensor:
    """(rows, queries) of some images, as the model scores them."""
    cosines = candidates.vectors.cosines(candidates.rows, queries)
    if queries.share == 1.0:  # no token takes part
        return cosines
    return mixed(_token_scores(candidates, queries.tokens), cosines, queries.share)


def _token_scores(candidates: Candidates, queries: TokenFeatures) -> Tensor:
    """(rows, queries) S of some images and folded queries, see `similarity`."""
    vectors, rows = candidates.vectors, candidates.rows
    scores = torch.empty(len(rows), len(queries))
    for part, block in vectors.blocks(rows):
        scores[part] = similarity(vectors.tokens(block), queries)
    return scores


@torch.no_grad()
def best_images(
    view: View, queries: Queries, top_k: int, depth: int, exact: bool | None = None
) -> list[Found]:
    """The best of some images for every query, with exact scores.

    Args:
        view: The images.
        queries: Words or patches.
        top_k: How many are returned.
        depth: How many of the best by one vector per image are scored exactly, where not all are.
        exact: True scores all images; None does up to `EXACT_UP_TO`.

    Returns:
        (score, record) of every query, best first; equal scores in the order of the store.

    Raises:
        ValueError: If the pooled features are part of the score and not all images have one.
    """
    number = len(view)
    if not number:
        return [[] for _ in range(len(queries))]
    _check_summaries(view, queries.share)
    depth = max(depth, top_k)
    if exact is None:
        exact = number <= EXACT_UP_TO
    if exact or number <= depth:
        return _best(view.blocks(), queries, top_k)
    near = view.nearest(queries, depth)
    return [_best([own], queries.one(n), top_k)[0] for n, own in enumerate(near)]


def _best(blocks: Iterable[Candidates], queries: Queries, top_k: int) -> list[Found]:
    """The best of all blocks, for every query."""
    found: list[Found] = [[] for _ in range(len(queries))]
    for candidates in blocks:
        scores = _exact_scores(candidates, queries)
        if not bool(scores.isfinite().all()):
            raise ValueError(
                "A query, or an image of the index, has vectors that are not finite. Look for "
                "damage with `verify`, and make the index anew from images."
            )
        for number, own in enumerate(scores.t()):
            order = own.sort(descending=True, stable=True).indices[:top_k]
            rows = candidates.rows[order].tolist()
            new = zip(own[order].tolist(), (candidates.records[row] for row in rows), strict=True)
            found[number] = best_of([found[number], list(new)], top_k)
    return found


def best_of(parts: Iterable[Found], top_k: int) -> Found:
    """The best of several lists; equal scores in the order of the lists."""
    return sorted((one for part in parts for one in part), key=lambda one: -one[0])[:top_k]


def _check_summaries(view: View, share: float) -> None:
    lacking = view.lacking_summary() if share else 0
    if lacking:
        raise ValueError(
            f"The encoder's pooled features are {share:.3g} of the model's score "
            f"(`pooled_share`), and the index holds {lacking} images without one. Add the same "
            "images again, which completes them, or set `model.prototypes.share_score(0)`."
        )
