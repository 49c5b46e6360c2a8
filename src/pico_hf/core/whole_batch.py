"""A batch that several processes hold in parts, scored as if one process held all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pico_hf.core.processes import Processes
from pico_hf.core.token_features import TokenFeatures

Scorer = Callable[[TokenFeatures, TokenFeatures], Tensor]


@dataclass(frozen=True)
class WholeBatch:
    """The pairs that all processes hold, in the order of their ranks.

    Only texts travel, which are much smaller than images, and scores.

    Attributes:
        processes: That hold a part each, at least one pair.
        pairs: How many pairs count, from the first; further ones repeat what others hold, so that
            every process has a part of the last batch of an epoch. None: all.
    """

    processes: Processes
    pairs: int | None = None

    def scores(
        self, score: Scorer, images: TokenFeatures, texts: TokenFeatures
    ) -> Float[Tensor, "images texts"]:
        """Scores of all images and all texts, the same in every process.

        Every process scores its images against the texts of all. Gradients are right for a loss
        that each process computes of all scores, if they are averaged over processes in the end, as
        `DistributedDataParallel` does.

        Args:
            score: From images and texts to scores (images, texts).
            images: Of this process.
            texts: Of this process.
        """
        device = images.features.device
        own = torch.tensor([len(images), *texts.mask.shape], device=device)
        rows, columns, words = self.processes.gathered(own).t().tolist()
        missing = max(words) - texts.mask.shape[1]
        mask = _padded(F.pad(texts.mask, (0, missing)).byte(), max(columns))
        features = _padded(F.pad(texts.features, (0, 0, 0, missing)), max(columns))
        everyone = TokenFeatures(
            _joined(_AllTexts.apply(features, self.processes), columns),
            _joined(self.processes.gathered(mask), columns).bool(),
            self._pooled(texts, columns),
        )
        block = score(images, everyone[: self.pairs])
        blocks = _AllRows.apply(_padded(block, max(rows)), self.processes)
        return _joined(blocks, rows)[: self.pairs]

    def _pooled(self, texts: TokenFeatures, columns: list[int]) -> Tensor | None:
        """The pooled vectors of all texts, if they are part of the score."""
        if texts.pooled is None:
            return None
        own = _padded(texts.pooled, max(columns))
        return _joined(_AllTexts.apply(own, self.processes), columns)

    def identities(self, own: Tensor) -> Tensor:
        """Identities (all images,) of all images.

        Args:
            own: (images,) of this process.
        """
        counts = self.processes.gathered(torch.tensor(own.shape, device=own.device))
        rows = counts.flatten().tolist()
        return _joined(self.processes.gathered(_padded(own, max(rows))), rows)[: self.pairs]


def _padded(own: Tensor, rows: int) -> Tensor:
    """With rows of zeros at the end: what is gathered has one shape in all processes."""
    return F.pad(own, (0, 0) * (own.ndim - 1) + (0, rows - len(own)))


def _joined(parts: Tensor, counts: list[int]) -> Tensor:
    """From (processes, rows, …) to all rows in order, without those they were padded with."""
    if min(counts) == parts.shape[1]:
        return parts.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _AllTexts(torch.autograd.Function):
    """What all processes hold; the gradient of a part is the sum of what all found for it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, processes: Processes) -> Tensor:
        """From (…) to (processes, …)."""
        ctx.rank = processes.rank
        return processes.gathered(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Own part of the sum."""
        # gloo reads memory as if it were contiguous, and what comes in belongs to autograd.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.rank], None


class _AllRows(torch.autograd.Function):
    """What all processes hold, and of which all compute one loss; the gradient is the own part.

    It is multiplied by the number of processes, since gradients are averaged over them in the end.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, processes: Processes) -> Tensor:
        """From (…) to (processes, …)."""
        ctx.processes = processes
        return processes.gathered(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Own part, times the number of processes."""
        return gradient[ctx.processes.rank] * ctx.processes.count, None
