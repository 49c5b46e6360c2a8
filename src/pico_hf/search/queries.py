"""Queries in the columns that an index stores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pico_hf.core.token_features import TokenFeatures


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

    def one(self, number: int) -> Queries:
        """One of them."""
        return Queries(self.tokens[number : number + 1], self.share, self.metric)


def mixed(scores: Tensor, cosines: Tensor, share: float) -> Tensor:
    """(1 - share) · scores + share · cosines; without cosines if they do not count."""
    return scores if share == 0.0 else (1 - share) * scores + share * cosines
