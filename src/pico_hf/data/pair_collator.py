"""Rows of images, or of images and their targets, to a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pico_hf.data.columns import find_in_row, require_column
from pico_hf.data.image_modes import colour_of
from pico_hf.data.image_sizes import check_image_sizes
from pico_hf.data.images import as_rgb


class ImagePairCollator:
    """Rows to a batch of images, followed by the target of each if the rows have one.

    It serves both training on an [`ImagePairDataset`] and the encoding of its images. Such a batch
    of pairs is scored by `PicoModel.forward` with `image_pairs=True`, image against image.

    Args:
        processor: What `AutoProcessor` or `AutoImageProcessor` gives.
        image_column: None finds it in the first row of a batch.
        target_image_column: Column of the targets.
        background: Colour behind transparent pixels, as `PIL.ImageColor` names it.

    Raises:
        ValueError: If the processor has no images to process, or would make huge ones.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_column: str | None = None,
        target_image_column: str = "target_image",
        background: str | tuple[int, int, int] = "white",
    ) -> None:
        self.image_processor = getattr(processor, "image_processor", processor)
        if not hasattr(self.image_processor, "preprocess"):
            raise ValueError(
                "`processor` must be or hold an image processor, got "
                f"{type(processor).__name__}. Load it with AutoProcessor.from_pretrained(…)."
            )
        check_image_sizes(self.image_processor)
        self.image_column, self.target_image_column = image_column, target_image_column
        self.background = colour_of(background)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch of rows with an image each, or with an image and a target image each.

        Returns:
            What the image processor gives; of n pairs for 2n images, the target of image i at
            n + i, and `image_pairs` True, and with `image_ids` in the rows those (n,).

        Raises:
            ValueError: If a row lacks its image or, where the first has one, its target.
        """
        image, _ = find_in_row(rows[0], self.image_column, None)
        columns = [image or "image"]
        paired = self.target_image_column in rows[0]
        if paired:
            columns.append(self.target_image_column)
        for row in rows:
            require_column(row, "image_column", columns[0])
            if paired:
                require_column(row, "target_image_column", columns[1])
        images = [as_rgb(row[column], self.background) for column in columns for row in rows]
        batch = dict(self.image_processor(images=images, return_tensors="pt"))
        if paired:
            batch["image_pairs"] = True
            if "image_ids" in rows[0]:
                batch["image_ids"] = torch.tensor([row["image_ids"] for row in rows])
        return batch
