"""A whole retrieval split as token features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.processes import ALONE, Processes


@dataclass(frozen=True)
class EncodedSplit:
    """A whole split as token features, in canonical order (see [`ImageTextDataset`]).

    Attributes:
        images: All images, once each.
        texts: All captions.
        text_to_image: (texts,) row of `images` that each caption belongs to.
        gallery: (images,) which images are ranked together.
        image_ids: (images,) identity; images of one identity do not compete. None = all different.
        image_rows: (images,) row of each image in `ImageTextDataset.images()`; None = the same.
        caption_rows: (texts,) row of each text in `ImageTextDataset.captions()`; None = the same.
        processes: All hold the split and share the work of scoring it.
        shows_progress: Whether scoring it shows a progress bar.
    """

    images: PackedTokens
    texts: PackedTokens
    text_to_image: Tensor
    gallery: Tensor
    image_ids: Tensor | None = None
    image_rows: Tensor | None = None
    caption_rows: Tensor | None = None
    processes: Processes = ALONE
    shows_progress: bool = False

    def rows_of_images(self) -> Tensor:
        """(images,) row of each image in `ImageTextDataset.images()`, on the CPU."""
        return torch.arange(len(self.images)) if self.image_rows is None else self.image_rows.cpu()

    def rows_of_captions(self) -> Tensor:
        """(texts,) row of each text in `ImageTextDataset.captions()`, on the CPU."""
        return (
            torch.arange(len(self.texts)) if self.caption_rows is None else self.caption_rows.cpu()
        )

    def images_of_captions(self) -> Tensor:
        """(captions,) row of the image of each caption, both in the order of the split's rows."""
        owners = torch.empty(len(self.texts), dtype=torch.long)
        owners[self.rows_of_captions()] = self.rows_of_images()[self.text_to_image.cpu()]
        return owners
