"""The late interaction of all pairs in both directions, without the 4-D tensor of products.

Each block, a few images × some texts, is one matrix product. It is small enough to stay in the
cache until both maxima are taken. For a gradient only the positions of the maxima are kept, one or
two bytes each; `interaction_gradient` computes the gradient from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from tqdm import tqdm

from pico_hf.kernels.packing import Chunk, Packing, Run, size

BLOCK_ELEMENTS = 2**19  # products alive at a time: 2 MB in float32, one core's share of cache
BLOCK_PATCHES = 400  # two images of a ViT, several of a coarse grid: enough columns per product


@dataclass(frozen=True)
class Matches:
    """Position of the token that won each maximum, counted inside its image or text.

    Attributes:
        words: Best word of every patch, for every text. Axes are in the order of `Packing`.
        patches: Best patch of every word, for every image.
    """

    words: Integer[Tensor, "texts patch_rows"]
    patches: Integer[Tensor, "images word_rows"]

    @classmethod
    def empty(cls, images: Packing, texts: Packing) -> Matches:
        """Allocate positions in the smallest integer type that can hold them."""
        device = images.order.device
        return cls(
            words=torch.empty(
                len(texts.order), images.size, dtype=_index_type(texts), device=device
            ),
            patches=torch.empty(
                len(images.order), texts.size, dtype=_index_type(images), device=device
            ),
        )


def _index_type(packing: Packing) -> torch.dtype:
    longest = int(packing.lengths[-1]) if len(packing.lengths) else 0
    if longest <= 256:
        return torch.uint8
    return torch.int16 if longest <= 2**15 else torch.int32


def interact(
    image_features: Float[Tensor, "images patches D"],
    text_features: Float[Tensor, "texts words D"],
    images: Packing,
    texts: Packing,
    weights: Float[Tensor, " D"] | None = None,
    matches: Matches | None = None,
    progress: bool = False,
) -> Float[Tensor, "images texts"]:
    """Score all pairs block by block; fill `matches` if given.

    Memory in use besides the scores and `matches`: one chunk of words, the products of one block
    (twice if `matches` is given) and one number per image and word of one chunk. Everything is
    allocated on the device of `image_features`.
    """
    dtype = working_type(image_features, text_features)
    tiles = list(images.runs(BLOCK_PATCHES))
    widest = max((size(tile.rows) for tile in tiles), default=1)
    chunks = texts.chunks(max(1, BLOCK_ELEMENTS // widest))
    scores = image_features.new_empty(len(images.order), len(texts.order), dtype=dtype)
    with tqdm(total=len(chunks) * len(tiles), disable=not progress, desc="similarity") as bar:
        for chunk in chunks:
            words = fold(texts.take(text_features, chunk.rows, dtype), weights)
            columns = scores.new_empty(len(images.order), size(chunk.items))
            best_patch = scores.new_empty(len(words), len(images.order))
            block = None
            for tile in tiles:
                patches = images.take(image_features, tile.rows, dtype)
                if block is None or not block.fits(tile):
                    block = Block(words, chunk, tile, indexed=matches is not None)
                best_word, best_patch[:, tile.items] = block.maxima(patches)
                columns[tile.items] = best_word.mean(dim=2).T
                if matches is not None:
                    matches.words[chunk.items, tile.rows] = block.first_words()
                    matches.patches[tile.items, chunk.rows] = block.first_patches().T
                bar.update()
            for run in chunk.runs:
                by_text = best_patch[run.rows].unflatten(0, (-1, run.length))
                columns[:, run.items] += by_text.mean(dim=1).T
            scores[images.order.unsqueeze(1), texts.order[chunk.items]] = columns
    return scores


def fold(words: Float[Tensor, "rows D"], weights: Tensor | None) -> Float[Tensor, "rows D"]:
    """Multiply the columns of the words by the weights; s[p, w] contains them once."""
    return words if weights is None else words * weights.to(words)


def working_type(image_features: Tensor, text_features: Tensor) -> torch.dtype:
    """Return float64 if either side is float64, else float32: half precision sums are inexact."""
    both = torch.promote_types(image_features.dtype, text_features.dtype)
    return torch.promote_types(both, torch.float32)


class Block:
    """Memory for the products of one chunk of words and one tile of patches, with views of it.

    All tiles of one shape share the memory and its views, since for short captions slicing takes
    as long as the arithmetic.

    To find the position of a maximum, a countdown (n, n-1, …, 1) is multiplied by
    `product == maximum`; the highest value belongs to the first position. On a CPU this takes a
    third of the time of `torch.max(dim)`, which finds the index in a scalar loop. Of tied tokens
    the first one is taken; with NaN the position is valid but arbitrary.
    """

    def __init__(
        self, words: Float[Tensor, "word_rows D"], chunk: Chunk, tile: Run, indexed: bool
    ) -> None:
        self.words, self.shape = words, (size(tile.items), tile.length)
        self.products = words.new_empty(len(words), size(tile.rows))
        self.by_image = self.products.unflatten(1, self.shape)  # (word_rows, images, patches)
        self.best_word = words.new_empty(size(chunk.items), size(tile.rows))
        self.by_text = [
            (_by_text(self.products, run), self.best_word[run.items].unsqueeze(1))
            for run in chunk.runs
        ]
        if indexed:
            self._lay_out_positions(chunk, tile)

    def _lay_out_positions(self, chunk: Chunk, tile: Run) -> None:
        self.scratch = torch.empty_like(self.products)
        self.count = torch.empty_like(self.best_word)
        longest = max(tile.length, chunk.runs[-1].length)
        countdown = torch.arange(longest, 0, -1, device=self.count.device).to(self.count.dtype)
        self.patch_countdown = countdown[longest - tile.length :]
        self.positions = [
            (_by_text(self.scratch, run), countdown[longest - run.length :, None])
            for run in chunk.runs
        ]
        self.counts = [self.count[run.items] for run in chunk.runs]
        lengths = [run.length for run in chunk.runs for _ in range(size(run.items))]
        self.lengths = torch.tensor(lengths, device=self.count.device).unsqueeze(1)

    def fits(self, tile: Run) -> bool:
        """Tell whether this tile has the shape that the memory was allocated for."""
        return self.shape == (size(tile.items), tile.length)

    def maxima(
        self, patches: Float[Tensor, "patch_rows D"]
    ) -> tuple[Float[Tensor, "texts images patches"], Float[Tensor, "word_rows images"]]:
        """Return the best word of every patch and the best patch of every word."""
        torch.mm(self.words, patches.T, out=self.products)
        for products, best in self.by_text:
            torch.amax(products, dim=1, keepdim=True, out=best)
        self.best_patch = self.by_image.amax(dim=2)
        return self.best_word.unflatten(1, self.shape), self.best_patch

    def first_patches(self) -> Float[Tensor, "word_rows images"]:
        """Return the position of the best patch of every word."""
        scratch = self.scratch.view(self.by_image.shape)
        torch.eq(self.by_image, self.best_patch.unsqueeze(2), out=scratch)
        count = scratch.mul_(self.patch_countdown).amax(dim=2)
        return self.shape[1] - count.clamp_(min=1)

    def first_words(self) -> Float[Tensor, "texts patch_rows"]:
        """Return the position of the best word of every patch."""
        for (products, best), (scratch, countdown), count in zip(
            self.by_text, self.positions, self.counts, strict=True
        ):
            torch.eq(products, best, out=scratch)
            torch.amax(scratch.mul_(countdown), dim=1, out=count)
        return self.lengths - self.count.clamp(min=1)


def _by_text(products: Tensor, run: Run) -> Float[Tensor, "texts words patch_rows"]:
    return products[run.rows].unflatten(0, (-1, run.length))


def refuse_second_derivative() -> None:
    """Raise RuntimeError inside a backward that is itself recorded for a gradient."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "`similarity` cannot be differentiated twice, got create_graph=True. Call "
            "backward without it, or score with plain autograd operations."
        )
