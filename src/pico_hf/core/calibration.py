"""Style shows in the moments of columns: those of a gallery are replaced by those of known images.

Not in arXiv 2510.11175. An image's tower output keeps its place among the images of its gallery;
what all of them share, the mean and the spread of every column, is taken for their style.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pico_hf.core.moments import TokenMoments
from pico_hf.core.token_features import TokenFeatures

LEAST_SPREAD = 1e-3  # of the reference's typical column: a column that is constant stays so


@dataclass(frozen=True)
class StyleCalibration:
    """Moves tokens from the moments of their gallery to those of reference images.

    Attributes:
        gallery: Moments of the images that are to be scored, all of one style.
        reference: Moments of images like those the model was trained on.
    """

    gallery: TokenMoments
    reference: TokenMoments

    @classmethod
    def between(
        cls, gallery: Iterable[TokenFeatures], reference: Iterable[TokenFeatures]
    ) -> StyleCalibration:
        """Measures the moments of both sides, in one pass over each.

        Args:
            gallery: Tower outputs of the images to be scored.
            reference: Tower outputs of images like those of the training data.
        """
        return cls(*(TokenMoments.of(side, diagonal=True) for side in (gallery, reference)))

    def __call__(self, tokens: TokenFeatures) -> TokenFeatures:
        """Tokens (n, tokens, columns) with (x - mean) / std · reference std + reference mean."""
        std, target = self.gallery.std, self.reference.std
        factor = target / torch.maximum(std, LEAST_SPREAD * target.mean())
        shift = self.reference.mean - self.gallery.mean * factor
        device = tokens.features.device
        features = tokens.features.float() * factor.float().to(device) + shift.float().to(device)
        return TokenFeatures(features.to(tokens.features.dtype), tokens.mask, tokens.pooled)
