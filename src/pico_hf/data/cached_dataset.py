"""Images and captions whose tower outputs were computed before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset, Subset

from pico_hf.data.dataset import ImageTextDataset


class CachedImageTextDataset(ImageTextDataset):
    """An [`ImageTextDataset`] whose rows carry tower outputs instead of pixels and words.

    Args:
        source: The dataset the features were computed from.
        images: Features of its images, in the order of `source.images()`.
        captions: Features of its captions, in the order of `source.captions()`.
        folder: Where they are kept, if in a folder of their own.
        special_tokens: Whether special tokens are among them; None: nobody says.
    """

    special_tokens: bool | None = None

    def __init__(
        self,
        source: ImageTextDataset,
        images: Dataset,
        captions: Dataset,
        folder: Path | None = None,
        special_tokens: bool | None = None,
    ) -> None:
        super().__init__(source.rows, source.seed)
        self.set_epoch(source.epoch)
        self._stores = images, captions
        self.folder, self.special_tokens = folder, special_tokens

    def images(self) -> Dataset:
        """All images once, as hidden states."""
        return self._stores[0]

    def captions(self) -> Dataset:
        """All captions once, as hidden states."""
        return self._stores[1]

    def part(self, rows: Sequence[int]) -> ImageTextDataset:
        """Some images with all their captions, as hidden states."""
        ends = self.text_to_image.bincount(minlength=len(self)).cumsum(0).tolist()
        starts = [0, *ends]
        captions = [n for row in rows for n in range(starts[row], ends[row])]
        images, texts = self._stores
        stores = Subset(images, rows), Subset(texts, captions)
        about = self.folder, self.special_tokens
        return CachedImageTextDataset(super().part(rows), *stores, *about)

    def check_special_tokens(self, kept: bool) -> None:
        """Raises ValueError if a model of this setting cannot take these features.

        Args:
            kept: The model's `keep_special_tokens`.
        """
        if self.special_tokens not in (None, kept):
            raise ValueError(
                f"The cached features were made with `keep_special_tokens={self.special_tokens}`, "
                f"the model has {kept}. Give it the dataset that they were made of."
            )
