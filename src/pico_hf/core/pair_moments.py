"""Moments of matched images and texts: what either side varies in, and what both share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from pico_hf.core.moments import TokenMoments


@dataclass(frozen=True)
class PairMoments:
    """Moments of matched images and texts: the scatter of either side and what both share.

    Attributes:
        images: Moments of the images.
        texts: Moments of the texts.
        text_to_image: (texts,) row of the image each text belongs to.
    """

    images: TokenMoments
    texts: TokenMoments
    text_to_image: Int[Tensor, " texts"]

    def __post_init__(self) -> None:
        if len(self.text_to_image) != len(self.texts.items) or len(self.images.items) < 2:
            raise ValueError(
                "`text_to_image` must name the image of every text, of at least 2 images, got "
                f"{len(self.text_to_image)} entries for {len(self.texts.items)} texts and "
                f"{len(self.images.items)} images."
            )

    @cached_property
    def shared(self) -> Float[Tensor, "image_columns text_columns"]:
        """C_vt, the covariance of mean patch and mean word over matched pairs.

        Example:
            >>> rows = torch.tensor([[1.0], [3.0]]).double()
            >>> side = TokenMoments(rows, rows.mean(dim=0), torch.eye(1).double())
            >>> PairMoments(side, side, torch.tensor([0, 1])).shared.tolist()
            [[1.0]]
        """
        images = _centred(self.images.items[self.text_to_image])
        return images.t() @ _centred(self.texts.items) / len(self.text_to_image)

    @cached_property
    def scatters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Covariances of images and texts: of all `"tokens"`, and of the mean tokens, `"items"`."""
        images, texts = _centred(self.images.items[self.text_to_image]), _centred(self.texts.items)
        count = len(self.text_to_image)
        return {
            "tokens": (self.images.scatter, self.texts.scatter),
            "items": (images.t() @ images / count, texts.t() @ texts / count),
        }


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=0)
