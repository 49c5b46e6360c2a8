"""Scores of what the two graphs give, with numpy alone.

This file is written beside exported graphs, so that they can be used where neither this package
nor torch is installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_PRODUCTS = 2**24  # products alive at a time: 64 MB


def score(
    images: Sequence[NDArray[Any]],
    texts: Sequence[NDArray[Any]],
    pooled_share: float,
) -> NDArray[np.float32]:
    """Scores every image against every text, as the model does: (1 - m) · S + m · cos.

    S is that of [`late_interaction`]. cos is the product of pooled vectors, which hold √w and are
    of unit length. So the tokens of an image serve any column weights w, its pooled vector only
    those that its graph was made with.

    Args:
        images: `tokens`, `mask` and `pooled` of the image graph, in this order.
        texts: The same of the text graph, made of the same model.
        pooled_share: m, in [0, 1]: `pooled_share` in the metadata of either file.

    Returns:
        (images, texts) fp32, in [-2, 2] for uniform weights.

    Raises:
        ValueError: If m is out of its range, if pooled vectors do not fit each other or their
            tokens, or if `late_interaction` takes no such tokens.

    Example:
        >>> mask = np.ones((1, 1), bool)
        >>> images = [np.eye(2)[None, :1], mask, np.array([[0.6, 0.8]])]
        >>> texts = [np.eye(2)[None, :1], mask, np.array([[0.0, 1.0]])]
        >>> score(images, texts, 0.25)  # S = 2, cos = 0.8
        array([[1.7]], dtype=float32)
    """
    if not 0.0 <= pooled_share <= 1.0:
        raise ValueError(f"`pooled_share` must be in [0, 1], got {pooled_share!r}.")
    if pooled_share == 0.0:
        return late_interaction(*images[:2], *texts[:2])
    cosines = _cosines(images, texts)
    if pooled_share == 1.0:
        return cosines
    share = np.float32(pooled_share)
    return (1 - share) * late_interaction(*images[:2], *texts[:2]) + share * cosines


def _cosines(images: Sequence[NDArray[Any]], texts: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    for side, (tokens, _, pooled) in (("images", images), ("texts", texts)):
        if pooled.shape != (tokens.shape[0], images[0].shape[-1]):
            raise ValueError(
                f"`{side}` must hold pooled vectors (n, D) after tokens (n, tokens, D) and a mask, "
                f"got {pooled.shape} after {tokens.shape}, where image tokens have "
                f"{images[0].shape[-1]} columns. Take both sides from graphs of one model."
            )
    return images[2].astype(np.float32) @ texts[2].astype(np.float32).T


def late_interaction(
    image_tokens: NDArray[np.floating],
    image_mask: NDArray[np.bool_],
    text_tokens: NDArray[np.floating],
    text_mask: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Scores every image against every text by their tokens; the model's score is [`score`].

    S = mean_p max_w s[p, w] + mean_w max_p s[p, w], s[p, w] = Σ_d V[p, d] · T[w, d]
    (arXiv 2510.11175), where T holds the column weights already.

    Args:
        image_tokens: (images, patches, D), of the image graph.
        image_mask: (images, patches) True = real patch.
        text_tokens: (texts, words, D), of the text graph.
        text_mask: (texts, words) True = word. That of the text graph, or one of your own.

    Returns:
        (images, texts) fp32, in [-2, 2] for uniform weights.

    Raises:
        ValueError: If shapes do not fit each other, if a mask is not boolean, or if an image or a
            text has no real token.

    Example:
        >>> patches, words = np.eye(2)[None], np.array([[[0.5, 0.0], [9.0, 9.0]]])
        >>> late_interaction(patches, np.ones((1, 2), bool), words, np.array([[True, False]]))
        array([[0.75]], dtype=float32)
    """
    _check("image", image_tokens, image_mask)
    _check("text", text_tokens, text_mask)
    columns = image_tokens.shape[2], text_tokens.shape[2]
    if columns[0] != columns[1]:
        raise ValueError(
            f"`text_tokens` must be as wide as `image_tokens` ({columns[0]} columns), got "
            f"{columns[1]}. Take both from graphs of one model."
        )
    scores = np.empty((len(image_tokens), len(text_tokens)), dtype=np.float32)
    for text, (tokens, mask) in enumerate(zip(text_tokens, text_mask, strict=True)):
        words = tokens[mask].astype(np.float32)
        for block in _blocks(image_tokens.shape, len(words)):
            patches = image_tokens[block].astype(np.float32)
            scores[block, text] = _score(patches @ words.T, image_mask[block])
    return scores


def _score(products: NDArray[np.float32], real: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Both directions for (images, patches, words) of one text."""
    by_patch = np.where(real, products.max(axis=2), 0.0).sum(axis=1) / real.sum(axis=1)
    by_word = np.where(real[:, :, None], products, -np.inf).max(axis=1).mean(axis=1)
    return (by_patch + by_word).astype(np.float32)


def _blocks(shape: tuple[int, ...], words: int) -> Iterator[slice]:
    images, patches = shape[:2]
    step = max(1, BLOCK_PRODUCTS // max(1, patches * words))
    return (slice(first, first + step) for first in range(0, images, step))


def _check(side: str, tokens: NDArray[np.floating], mask: NDArray[np.bool_]) -> None:
    if tokens.ndim != 3 or mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"`{side}_tokens` must be of shape (n, tokens, D) and `{side}_mask` of (n, tokens), "
            f"got {tokens.shape} and {mask.shape}."
        )
    if mask.dtype != np.bool_:
        raise ValueError(f"`{side}_mask` must be boolean, got {mask.dtype}. Use mask.astype(bool).")
    if not mask.any(axis=1).all():
        empty = np.flatnonzero(~mask.any(axis=1))[:5].tolist()
        raise ValueError(
            f"`{side}_mask` must have a real token in every row, got none in rows {empty}. Remove "
            "these rows or keep at least one token."
        )
