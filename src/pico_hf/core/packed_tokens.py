"""Tokens of a whole split, kept without padding, in memory or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import IO

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures

BLOCK_TOKENS = 2**14  # tokens that are padded and scored at a time
# Memory is taken in pieces that no allocator mixes with short-lived ones; what is not used of the
# last piece is never touched.
CHUNK_BYTES = 2**26


class PackedTokens:
    """The real tokens of many images or texts, one after the other.

    Args:
        chunks: Tokens (tokens, D) of the first items, of the next ones, and so on. They are never
            joined, since memory would hold all of them twice for a moment.
        lengths: (items,) of every chunk, on the CPU: how many tokens each item has.
        pooled: (items, D), see [`TokenFeatures`]; None: there are none.

    Example:
        >>> chunk, lengths = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2])
        >>> packed = PackedTokens([chunk], [lengths])
        >>> packed[:].features.squeeze(-1).tolist(), packed[:].mask.tolist()
        ([[1.0, 0.0], [2.0, 3.0]], [[True, False], [True, True]])
    """

    def __init__(
        self,
        chunks: list[Shaped[Tensor, "_ D"]],
        lengths: list[Int[Tensor, " _"]],
        pooled: Float[Tensor, "items D"] | None = None,
    ) -> None:
        self.chunks, self.pooled = chunks, pooled
        self.lengths = torch.cat(lengths)
        counts = torch.tensor([len(part) for part in lengths])
        self._chunk = torch.repeat_interleave(torch.arange(len(chunks)), counts)
        self._start = torch.cat([part.cumsum(0) - part for part in lengths])  # inside its chunk
        self._file: IO[bytes] | None = None  # lives as long as the tokens that are read from it

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, items: slice | Tensor) -> TokenFeatures:
        """The chosen items, padded with zeros to the longest of them; not to be changed in place.

        Args:
            items: A slice, row numbers, or a boolean tensor with one entry per item.
        """
        rows = torch.arange(len(self))[items.cpu() if isinstance(items, Tensor) else items]
        lengths, chunks = self.lengths[rows], self._chunk[rows]
        if len(rows) and bool((lengths == lengths[0]).all()):
            return self._unpadded(rows, int(lengths[0]))
        mask = torch.arange(int(lengths.max()) if len(rows) else 1) < lengths.unsqueeze(1)
        position = self._start[rows].unsqueeze(1) + torch.arange(mask.shape[1])
        padded = self.chunks[0].new_zeros(*mask.shape, self.chunks[0].shape[1])
        for number in chunks.unique().tolist():
            real = mask & (chunks == number).unsqueeze(1)
            chunk = self.chunks[number]
            padded[real.to(chunk.device)] = chunk[position[real].to(chunk.device)]
        return TokenFeatures(padded, mask.to(padded.device), self._pooled_of(rows))

    def _unpadded(self, rows: Tensor, length: int) -> TokenFeatures:
        """Items of one length: as they lie in memory where they are neighbours, else copied."""
        chunks, starts = self._chunk[rows], self._start[rows]
        apart = (chunks[1:] != chunks[:-1]) | (starts[1:] != starts[:-1] + length)
        firsts = torch.cat([torch.zeros(1, dtype=torch.long), apart.nonzero().flatten() + 1])
        counts = torch.diff(firsts, append=torch.tensor([len(rows)])) * length
        runs = zip(chunks[firsts].tolist(), starts[firsts].tolist(), counts.tolist(), strict=True)
        pieces = [self.chunks[chunk][start : start + count] for chunk, start, count in runs]
        tokens = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        features = tokens.view(len(rows), length, tokens.shape[1])
        mask = torch.ones(features.shape[:2]).bool().to(features.device)
        return TokenFeatures(features, mask, self._pooled_of(rows))

    def _pooled_of(self, rows: Tensor) -> Tensor | None:
        return None if self.pooled is None else self.pooled[rows.to(self.pooled.device)]

    def blocks(self, items: Int[Tensor, " chosen"] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Parts of some items that are small enough to be padded and scored at a time.

        Args:
            items: Row numbers; None takes all.

        Yields:
            (place of the part among the chosen items, its row numbers).
        """
        chosen = torch.arange(len(self)) if items is None else items.cpu()
        size = max(1, BLOCK_TOKENS * len(self) // max(1, int(self.lengths.sum())))
        for start in range(0, len(chosen), size):
            yield slice(start, start + size), chosen[start : start + size]

    @classmethod
    def collect(
        cls, batches: Iterable[TokenFeatures], max_bytes: float = float("inf")
    ) -> PackedTokens:
        """Packs batches as they come; memory holds the tokens once.

        Args:
            batches: Of some images or texts.
            max_bytes: If there is more than that, all of it goes to a temporary file, which is read
                block by block and goes away with the result.

        Raises:
            ValueError: If there are no batches.
        """
        chunks = _Chunks()
        lengths: list[Tensor] = []
        pooled: list[Tensor] = []
        file = None
        for batch in batches:
            pooled += [] if batch.pooled is None else [batch.pooled]
            lengths.append(batch.mask.sum(dim=1).cpu())
            chunks.append(batch.features[batch.mask])
            if file is None and chunks.size > max_bytes:
                file = tempfile.NamedTemporaryFile(prefix="pico-hf-", suffix=".tokens")  # noqa: SIM115
            if file is not None:
                chunks.move_to(file)
        if not lengths:
            raise ValueError("`batches` must hold at least one batch, got none.")
        whole = torch.cat(pooled) if len(pooled) == len(lengths) else None
        if file is not None:
            return cls._from_file(file, lengths, batch.features, whole)
        return cls(*chunks.with_lengths(lengths), whole)

    @classmethod
    def _from_file(
        cls, file: IO[bytes], lengths: list[Tensor], like: Tensor, pooled: Tensor | None
    ) -> PackedTokens:
        file.flush()
        joined, width = torch.cat(lengths), like.shape[2]
        count = int(joined.sum()) * width
        tokens = torch.from_file(file.name, shared=False, size=count, dtype=like.dtype)
        packed = cls([tokens.view(-1, width)], [joined], pooled)
        packed._file = file
        return packed


class _Chunks:
    """Tokens of batch after batch, in few large pieces of memory."""

    def __init__(self) -> None:
        self.size = 0  # bytes so far
        self._pieces: list[Tensor] = []
        self._used: list[int] = []  # rows of each piece
        self._batches: list[int] = []  # batches in each piece

    def append(self, tokens: Tensor) -> None:
        """Copies tokens (tokens, D) into the last piece, or into a new one."""
        self.size += tokens.nbytes
        if not self._pieces or self._used[-1] + len(tokens) > len(self._pieces[-1]):
            rows = max(len(tokens), CHUNK_BYTES // max(1, tokens[:1].nbytes))
            self._pieces.append(tokens.new_empty(rows, tokens.shape[1]))
            self._used.append(0)
            self._batches.append(0)
        start = self._used[-1]
        self._pieces[-1][start : start + len(tokens)] = tokens
        self._used[-1] += len(tokens)
        self._batches[-1] += 1

    def move_to(self, file: IO[bytes]) -> None:
        """Writes all tokens to the end of a file and forgets them."""
        for piece, used in zip(self._pieces, self._used, strict=True):
            file.write(piece[:used].cpu().view(torch.uint8).numpy().data)
        self._pieces, self._used, self._batches = [], [], []

    def with_lengths(self, lengths: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The pieces, and the lengths of the items of each."""
        batches = iter(lengths)
        items = [torch.cat([next(batches) for _ in range(n)]) for n in self._batches]
        used = zip(self._pieces, self._used, strict=True)
        return [piece[:rows] for piece, rows in used], items
