"""The vectors of an index in memory, mapped from its shards: what a search computes with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.quantisation import dequantise
from pico_hf.core.token_features import TokenFeatures
from pico_hf.search.queries import Queries, mixed
from pico_hf.search.shards import Shard, StoredImage


class ShardVectors:
    """Tokens, mean tokens and summaries of the rows of some shards, deleted ones included.

    Args:
        shards: In their order.
        dtype: In which tokens are stored.
    """

    _packed: tuple[PackedTokens, PackedTokens] | None = None
    _lengths: tuple[Tensor, Tensor] | None = None  # a metric, and the summaries' lengths in it

    def __init__(self, shards: Sequence[Shard], dtype: str) -> None:
        self._shards, self._dtype = tuple(shards), dtype

    def tokens(self, rows: Tensor) -> TokenFeatures:
        """Tokens of some rows, padded; in the storage dtype, or fp32 if that is int8."""
        packed, scales = self._both()
        tokens = packed[rows]
        if self._dtype != "int8":
            return tokens
        factors = scales[rows].features.squeeze(-1)
        return TokenFeatures(dequantise(tokens.features, factors), tokens.mask)

    def _both(self) -> tuple[PackedTokens, PackedTokens]:
        """Tokens and scales of all rows."""
        if self._packed is None:
            lengths = [shard.lengths for shard in self._shards]
            scales = [shard.scales.unsqueeze(1) for shard in self._shards]
            tokens = [shard.tokens for shard in self._shards]
            self._packed = PackedTokens(tokens, lengths), PackedTokens(scales, lengths)
        return self._packed

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """See `PackedTokens.blocks`."""
        return self._both()[0].blocks(rows)

    def first_stage(self, rows: Tensor, queries: Queries) -> Tensor:
        """(rows, queries) scores of some rows by one vector each; S is about twice theirs."""
        if queries.share == 1.0:
            return self.cosines(rows, queries)
        means = 2 * self._mean_scores(queries.tokens.mean())[rows]
        return mixed(means, self.cosines(rows, queries), queries.share)

    def cosines(self, rows: Tensor, queries: Queries) -> Tensor:
        """(rows, queries) cosines of pooled features; no columns where they do not count."""
        if queries.share == 0.0:
            return torch.zeros(len(rows), 0)
        assert queries.tokens.pooled is not None
        assert queries.metric is not None
        return self._summary_scores(queries.tokens.pooled, queries.metric)[rows]

    def _mean_scores(self, queries: Tensor) -> Tensor:
        """(all rows, queries) products of the mean tokens with queries (queries, D)."""
        parts = [shard.pooled @ queries.t() for shard in self._shards]
        return torch.cat(parts) if parts else torch.zeros(0, len(queries))

    def _summary_scores(self, queries: Tensor, metric: Tensor) -> Tensor:
        """(all rows, queries) cosines of the summaries and the queries.

        Args:
            queries: (queries, D), see `Queries`.
            metric: (D, D), see `Queries`. Lengths in it are kept in memory while it stays.
        """
        if not self._shards:
            return torch.zeros(0, len(queries))
        lengths = None if self._lengths is None else self._lengths[1]
        if lengths is None or not torch.equal(self._lengths[0], metric):  # type: ignore[index]
            parts = [(shard.summary @ metric).norm(dim=1) for shard in self._shards]
            lengths = torch.cat(parts).clamp_min(1e-12)
            self._lengths = metric, lengths
        products = torch.cat([shard.summary @ queries.t() for shard in self._shards])
        return products / lengths.unsqueeze(1)


@dataclass(frozen=True)
class Candidates:
    """Images that are scored exactly.

    Attributes:
        records: Of every row of `vectors`.
        vectors: Of these images, and of others maybe.
        rows: Which rows are meant, ascending.
    """

    records: Sequence[dict[str, Any]]
    vectors: ShardVectors
    rows: Tensor

    @classmethod
    def of(cls, images: Sequence[StoredImage]) -> Candidates:
        """Images in memory, in fp32."""
        vectors = ShardVectors([Shard.of(images)] if images else [], "float32")
        return cls([image.record for image in images], vectors, torch.arange(len(images)))
