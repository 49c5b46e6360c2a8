"""Why an image and a caption match: maps of words and patches, and the columns that carried it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pico_hf.cards.heat_maps import Block, draw_blocks, save_figure
from pico_hf.core.attribution import Attribution, attribute
from pico_hf.core.modes import evaluation_mode
from pico_hf.data.collator import PicoCollator
from pico_hf.encoders.grid import patch_grid
from pico_hf.modeling_pico import PicoModel
from pico_hf.training.encoding import encode_batch


@dataclass(frozen=True)
class Explanation:
    """Where the score of one image and one caption comes from; a notebook shows it as a figure.

    Attributes:
        words: Labels of the W words that take part in the score, as the tokenizer cut them.
        weighted: With the model's column weights; its `columns` sum to the model's score.
        unweighted: The same columns, each with the weight 1.
        column_weights: (D,) float32, mean 1.
        grid: (rows, columns) of the P patches over the image; None if they are no cells of a grid,
            such as the queries of a Q-Former.
        image: (height, width, 3) float32 in [0, 1]: what the vision tower saw, after the
            processor's resizing and cropping.
    """

    words: tuple[str, ...]
    weighted: Attribution
    unweighted: Attribution
    column_weights: Tensor
    grid: tuple[int, int] | None
    image: np.ndarray

    @property
    def score(self) -> float:
        """S of the pair, as `PicoModel.score` has it."""
        return self.weighted.score

    def word_maps(self, *, weighted: bool = True) -> Tensor:
        """s[p, w] of every word over the patches.

        Args:
            weighted: False takes all columns with the weight 1.

        Returns:
            (W, rows, columns) of the grid; (W, 1, P) without one.
        """
        products = (self.weighted if weighted else self.unweighted).products
        return products.T.unflatten(1, self.grid or (1, -1))

    def patch_maps(self, *, weighted: bool = True) -> Tensor:
        """s[p, w] of every patch over the words.

        Args:
            weighted: False takes all columns with the weight 1.

        Returns:
            (rows, columns, W) of the grid; (1, P, W) without one.
        """
        products = (self.weighted if weighted else self.unweighted).products
        return products.unflatten(0, self.grid or (1, -1))

    def figure(self) -> Any:
        """Draws all of it: each word over the patches, each patch over the words, a bar per column.

        Where all column weights are equal, what is with them is what is without them, and is drawn
        once.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        titles = {
            "with the column weights": self.weighted,
            "without column weights": self.unweighted,
        }
        if torch.allclose(self.column_weights, torch.ones_like(self.column_weights)):
            titles = {"all column weights equal": self.weighted}
        blocks = [Block(title, parts) for title, parts in titles.items()]
        return draw_blocks(blocks, self.words, self.grid, self.image)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the figure to a file, which appears when it is complete.

        Args:
            path: Ends in `.png`, `.pdf`, `.svg` or another format of matplotlib.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If the ending is none of them.
        """
        save_figure(self.figure(), path)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=100)
        return file.getvalue()


@torch.no_grad()
def explain(model: PicoModel, processor: Any, image: Any, caption: str) -> Explanation:
    """Takes the score of one image and one caption apart.

    Args:
        model: The model, which stays as it is; if its gallery is calibrated, so is this image.
        processor: What `AutoProcessor` gives: a tokenizer and an image processor.
        image: A PIL image, a path, the bytes of a file or an array, as training takes it.
        caption: One text.

    Raises:
        ValueError: If the image cannot be read, or if the caption is no text or an empty one.

    Example:
        >>> explanation = explain(model, processor, "cat.jpg", "a cat on a sofa")  # doctest: +SKIP
        >>> explanation.word_maps().shape  # doctest: +SKIP
        torch.Size([5, 7, 7])
    """
    if not isinstance(caption, str):
        raise ValueError(
            f"`caption` must be one text, got {type(caption).__name__}. Explain one at a time."
        )
    if not caption.strip():
        raise ValueError("`caption` must have at least one word, got an empty one.")
    collate = PicoCollator(
        processor, config=model.config, image_column="image", caption_column="caption"
    )
    batch = collate([{"image": image, "caption": caption}])
    with evaluation_mode(model):
        patches, words = encode_batch(model, batch)
    assert patches is not None
    assert words is not None
    weights = model.column_weights
    grid = patch_grid(model.encoder, batch, int(patches.mask.sum()))
    return Explanation(
        words=word_labels(collate, caption, batch["input_ids"][0], words.mask[0].cpu()),
        weighted=attribute(patches, words, weights, model.pooled_share),
        unweighted=attribute(patches, words, pooled_share=model.pooled_share),
        column_weights=weights.detach().cpu(),
        grid=grid,
        image=seen_image(batch, collate.image_processor),
    )


def word_labels(
    collate: PicoCollator, caption: str, input_ids: Tensor, mask: Tensor
) -> tuple[str, ...]:
    """What each word of a text reads like.

    Args:
        collate: What made the token ids.
        caption: The text.
        input_ids: (tokens,) as the collator cut them.
        mask: (tokens,) True = word.

    Returns:
        Per word its part of the caption; what the tokenizer calls it where that is not known.
    """
    tokenizer: Any = collate.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(input_ids.tolist())
    spans: list[tuple[int, int]] = [(0, 0)] * len(tokens)
    if tokenizer.is_fast:
        options = {"truncation": True, "max_length": collate.max_length}
        found = tokenizer(caption, return_offsets_mapping=True, **options)
        if found["input_ids"] == input_ids[: len(found["input_ids"])].tolist():
            spans[: len(found["input_ids"])] = found["offset_mapping"]
    return tuple(
        caption[slice(*spans[place])].strip() or _readable(tokenizer, tokens[place])
        for place in mask.nonzero().flatten().tolist()
    )


def _readable(tokenizer: Any, token: str) -> str:
    """A token without the marks of spaces, or as it is if it is a part of a character."""
    text = tokenizer.convert_tokens_to_string([token]).strip()
    return text if text and "\ufffd" not in text else token


def seen_image(batch: Mapping[str, Tensor], image_processor: Any) -> np.ndarray:
    """The first image of a batch as the vision tower saw it, (height, width, 3) in [0, 1].

    Args:
        batch: What the collator gives; of a NaFlex tower with its `spatial_shapes`.
        image_processor: Whose normalisation is undone. Without one that leads back to [0, 1],
            the darkest value becomes 0 and the brightest 1.
    """
    pixels = batch["pixel_values"][0].float().cpu()
    if "spatial_shapes" in batch:
        rows, columns = batch["spatial_shapes"][0].tolist()
        side = round((pixels.shape[-1] / 3) ** 0.5)
        cells = pixels[: rows * columns].reshape(rows, columns, side, side, 3)
        image = cells.permute(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
    else:
        image = pixels.permute(1, 2, 0)
    mean, std = (getattr(image_processor, f"image_{name}", None) for name in ("mean", "std"))
    if getattr(image_processor, "do_normalize", False) and mean is not None and std is not None:
        image = image * torch.tensor(std) + torch.tensor(mean)
    low, high = float(image.min()), float(image.max())
    if low < -0.01 or high > 1.01:
        image = (image - low) / (high - low)
    return image.clamp(0, 1).numpy()
