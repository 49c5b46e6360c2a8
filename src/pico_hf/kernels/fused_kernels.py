"""Triton kernels of the late interaction in both directions, without the 4-D tensor of products.

The rows of a tile are the words of whole texts, its columns are patches of one image, so the best
word of a patch is final within a tile and only the best patch of a word runs over tiles. The
gradient is a matrix product with the one-hot matrix of the winning tokens, rebuilt from their
positions tile by tile: no atomics, so the order of the sums is always the same.

Importing this module needs triton; with TRITON_INTERPRET=1 the kernels run on a CPU.
"""

from __future__ import annotations

try:  # transformers takes an import inside `try` as optional in code fetched from the Hub
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton: `pip install triton`.") from error


@triton.jit
def forward(
    image_features, text_features, image_lengths, text_lengths, scores, best_word, best_patch,
    images, texts, patches, width,
    TEXTS: tl.constexpr, WORDS: tl.constexpr, PATCHES: tl.constexpr, DEPTH: tl.constexpr,
    INDEXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Score one image against a tile of texts; if INDEXED, store which token won each maximum."""
    tiles = tl.cdiv(texts, TEXTS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * TEXTS  # texts innermost: the image stays in the cache
    row = tl.arange(0, TEXTS * WORDS)
    text, word = (first + row // WORDS).to(tl.int64), row % WORDS
    real_word = word < tl.load(text_lengths + text, mask=text < texts, other=0)
    own_patches = tl.load(image_lengths + image)
    tile_text = (first + tl.arange(0, TEXTS)).to(tl.int64)
    own_words = tl.load(text_lengths + tile_text, mask=tile_text < texts, other=1)

    best = tl.full([TEXTS * WORDS], float("-inf"), tl.float32)
    best_at = tl.zeros([TEXTS * WORDS], tl.int32)
    by_patch = tl.zeros([TEXTS], tl.float32)
    for start in range(0, own_patches, PATCHES):
        patch = start + tl.arange(0, PATCHES)
        real_patch = patch < own_patches
        products = tl.zeros([TEXTS * WORDS, PATCHES], tl.float32)
        for depth in range(0, width, DEPTH):  # in slices: a whole-width tile would spill
            column = depth + tl.arange(0, DEPTH)
            words = tl.load(
                text_features + (text * WORDS + word)[:, None] * width + column[None, :],
                mask=real_word[:, None] & (column < width)[None, :], other=0.0,
            )  # fmt: skip
            tokens = tl.load(
                image_features + (image * patches + patch)[:, None] * width + column[None, :],
                mask=real_patch[:, None] & (column < width)[None, :], other=0.0,
            )  # fmt: skip
            products = tl.dot(words, tl.trans(tokens), products, input_precision=PRECISION)

        by_text = tl.where(real_word[:, None], products, float("-inf"))
        by_text = tl.reshape(by_text, (TEXTS, WORDS, PATCHES))
        value, winner = tl.max(by_text, axis=1, return_indices=True)
        by_patch += tl.sum(tl.where(real_patch[None, :], value, 0.0), axis=1)
        if INDEXED:
            place = (tile_text[:, None] * images + image) * patches + patch[None, :]
            tl.store(
                best_word + place, winner.to(best_word.dtype.element_ty),
                mask=(tile_text < texts)[:, None] & real_patch[None, :],
            )  # fmt: skip
        by_image = tl.where(real_patch[None, :], products, float("-inf"))
        value, winner = tl.max(by_image, axis=1, return_indices=True)
        best_at = tl.where(value > best, start + winner, best_at)  # the first of tied patches stays
        best = tl.maximum(value, best)

    if INDEXED:
        place = (image * texts + text) * WORDS + word
        tl.store(best_patch + place, best_at.to(best_patch.dtype.element_ty), mask=real_word)
    by_word = tl.reshape(tl.where(real_word, best, 0.0), (TEXTS, WORDS))
    total = by_patch / own_patches + tl.sum(by_word, axis=1) / own_words
    tl.store(scores + image * texts + tile_text, total, mask=tile_text < texts)


@triton.jit
def winners(
    gradient, best_word, best_patch, image, text, word, patch, own_patches, own_words,
    images, texts, patches,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Derivative of the loss by the products of one tile, (words of texts, patches of one image).

    A product gets gradient / patches of its pair if its word is the best one for its patch, plus
    gradient / words of its pair if its patch is the best one for its word.
    """
    real_word, real_patch = word < own_words, patch < own_patches
    real = real_word[:, None] & real_patch[None, :]
    incoming = tl.load(gradient + image * texts + text, mask=real_word, other=0.0)
    place = (text[:, None] * images + image) * patches + patch[None, :]
    winning_word = tl.load(best_word + place, mask=real, other=0).to(tl.int32)
    place = (image * texts + text) * WORDS + word
    winning_patch = tl.load(best_patch + place, mask=real_word, other=0).to(tl.int32)
    by_patch = (incoming / own_patches)[:, None]
    by_word = (incoming / tl.maximum(own_words, 1))[:, None]
    won_patch = tl.where(winning_word == word[:, None], by_patch, 0.0)
    won_word = tl.where(winning_patch[:, None] == patch[None, :], by_word, 0.0)
    return tl.where(real, won_patch + won_word, 0.0)


@triton.jit
def gradient_to_images(
    gradient, text_features, image_lengths, text_lengths, best_word, best_patch, result,
    images, texts, patches, width,
    TEXTS: tl.constexpr, WORDS: tl.constexpr, PATCHES: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of PATCHES patches of one image and DEPTH columns over all texts."""
    blocks = tl.cdiv(patches, PATCHES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    patch = (tl.program_id(0) % blocks) * PATCHES + tl.arange(0, PATCHES)
    column = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    row = tl.arange(0, TEXTS * WORDS)
    own_patches = tl.load(image_lengths + image)
    place = (image * patches + patch)[:, None] * width + column[None, :]
    inside = (patch < own_patches)[:, None] & (column < width)[None, :]
    total = tl.load(result + place, mask=inside, other=0.0)
    for first in range(0, texts, TEXTS):
        text, word = (first + row // WORDS).to(tl.int64), row % WORDS
        incoming = tl.load(gradient + image * texts + text, mask=text < texts, other=0.0)
        if tl.max(tl.abs(incoming), axis=0) > 0:  # hardest negatives leave most tiles empty
            own_words = tl.load(text_lengths + text, mask=text < texts, other=0)
            share = winners(
                gradient, best_word, best_patch, image, text, word, patch, own_patches, own_words,
                images, texts, patches, WORDS,
            )  # fmt: skip
            words = tl.load(
                text_features + (text * WORDS + word)[:, None] * width + column[None, :],
                mask=(word < own_words)[:, None] & (column < width)[None, :], other=0.0,
            )  # fmt: skip
            share = tl.trans(share).to(words.dtype)
            total = tl.dot(share, words, total, input_precision=PRECISION)
    tl.store(result + place, total, mask=inside)


@triton.jit
def gradient_to_texts(
    gradient, image_features, image_lengths, text_lengths, best_word, best_patch, result,
    images, texts, patches, width,
    TEXTS: tl.constexpr, WORDS: tl.constexpr, PATCHES: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of the words of TEXTS texts and DEPTH columns over all images."""
    first = tl.program_id(0) * TEXTS
    column = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    row = tl.arange(0, TEXTS * WORDS)
    text, word = (first + row // WORDS).to(tl.int64), row % WORDS
    own_words = tl.load(text_lengths + text, mask=text < texts, other=0)
    total = tl.zeros([TEXTS * WORDS, DEPTH], tl.float32)
    for number in range(0, images):
        image = tl.cast(number, tl.int64)
        incoming = tl.load(gradient + image * texts + text, mask=text < texts, other=0.0)
        if tl.max(tl.abs(incoming), axis=0) > 0:
            own_patches = tl.load(image_lengths + image)
            for start in range(0, own_patches, PATCHES):
                patch = start + tl.arange(0, PATCHES)
                share = winners(
                    gradient, best_word, best_patch, image, text, word, patch, own_patches,
                    own_words, images, texts, patches, WORDS,
                )  # fmt: skip
                tokens = tl.load(
                    image_features + (image * patches + patch)[:, None] * width + column[None, :],
                    mask=(patch < own_patches)[:, None] & (column < width)[None, :], other=0.0,
                )  # fmt: skip
                share = share.to(tokens.dtype)
                total = tl.dot(share, tokens, total, input_precision=PRECISION)
    place = (text * WORDS + word)[:, None] * width + column[None, :]
    tl.store(result + place, total, mask=(word < own_words)[:, None] & (column < width)[None, :])
