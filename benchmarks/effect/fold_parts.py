"""Encoded parts of folds, and what feedback finds on one of them; features in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from folds import Fold
from pico_hf.core.canonical import CANDIDATES, bilinear_form
from pico_hf.core.decompositions import svd
from pico_hf.core.metrics import retrieval_metrics
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.pooled_share import SHARES
from pico_hf.core.similarity import pooled_similarity, similarity
from pico_hf.core.token_features import TokenFeatures

TEMPERATURE = 5.0  # of the normalised gain
Scores = tuple[Tensor, Tensor, Tensor]  # of tokens and of pooled vectors, and each text's image


@dataclass
class Part:
    """An encoded part of a fold, which is ranked gallery by gallery.

    Attributes:
        images: Of the part.
        texts: Likewise.
        galleries: Rows of images, rows of texts, and the image of each of these texts.
    """

    images: TokenFeatures
    texts: TokenFeatures
    galleries: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def of(cls, fold: Fold, heads: nn.Module, rows: Tensor) -> Part:
        texts, owners = fold.texts_of(rows)
        images = [heads.image(fold.images[some]) for some in rows.split(256)]
        words = [heads.text(fold.words[some]) for some in texts.split(256)]
        part = cls(TokenFeatures.concatenate(images), TokenFeatures.concatenate(words))
        for gallery in fold.gallery[rows].unique():
            own = (fold.gallery[rows] == gallery).nonzero().flatten()
            captions = torch.isin(owners, own).nonzero().flatten()
            place = torch.zeros(len(rows), dtype=torch.long)
            place[own] = torch.arange(len(own))
            part.galleries.append((own, captions, place[owners[captions]]))
        return part

    @torch.no_grad()
    def scores(self, form: Tensor) -> list[Scores]:
        """Of every gallery, with scores vᵀBt."""
        left, weights, right = svd(form)
        images, texts = self.images.turned(left.float()), self.texts.turned(right.t().float())
        weights = (weights / weights.mean()).float()
        return [
            (
                similarity(images[own], texts[captions], weights),
                pooled_similarity(images[own], texts[captions], weights),
                owners,
            )
            for own, captions, owners in self.galleries
        ]

    def scored(self, form: Tensor) -> Callable[[float], float]:
        """From a share of pooled vectors to the mean rSum over galleries."""
        return partial(rsum, self.scores(form))

    def ensembled(self, forms: list[Tensor], parts: Tensor, share: float) -> float:
        """Mean rSum if scores are averaged, and not the forms that they come from."""
        found = [self.scores(form) for form in forms]
        weighted = []
        for gallery in zip(*found, strict=True):
            sides = zip(*((tokens, pooled) for tokens, pooled, _ in gallery), strict=True)
            tokens, pooled = (
                sum(float(part) * one for part, one in zip(parts, side, strict=True))
                for side in sides
            )
            weighted.append((tokens, pooled, gallery[0][2]))
        return rsum(weighted, share)


def rsum(found: list[Scores], share: float) -> float:
    """Mean over galleries, with a share of pooled vectors."""
    ranked = (
        retrieval_metrics((1 - share) * tokens + share * pooled, owners)
        for tokens, pooled, owners in found
    )
    return sum(metrics["rsum"] for metrics in ranked) / len(found)


@dataclass(frozen=True)
class Found:
    """What the normalised gain makes of all candidates.

    Attributes:
        form: Their mean by what each brought, or w = 1 if that scores more.
        share: Of pooled vectors, for it.
        first: Likewise for w = 1.
        forms: w = 1 and all candidates.
        parts: How much each counts.
    """

    form: Tensor
    share: float
    first: float
    forms: list[Tensor]
    parts: Tensor


def feedback(part: Part, moments: PairMoments) -> Found:
    """Tries canonical columns on the feedback part."""
    form = torch.eye(moments.shared.shape[0], dtype=torch.float64)
    own = part.scored(form)
    share = max(SHARES, key=own)
    forms = [bilinear_form(moments, candidate) for candidate in CANDIDATES]
    gains = torch.tensor([0.0, *(part.scored(one)(share) - own(share) for one in forms)])
    parts = torch.softmax(gains / TEMPERATURE, dim=0).double()
    forms = [form, *forms]
    fused = torch.einsum("n,nij->ij", parts, torch.stack(forms))
    found = part.scored(fused)
    if found(share) < own(share):
        return Found(form, share, share, forms, parts)
    return Found(fused, max(SHARES, key=found), share, forms, parts)
