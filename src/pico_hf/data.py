"""Rows → batches and the caption→image index."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from pico_hf.data_loading import COLUMNS, checked_rows


class _Rows(Dataset):
    """One column's values as rows `{key: value}`."""

    def __init__(self, key: str, values: Sequence[Any]) -> None:
        self.key, self.values = key, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {self.key: self.values[row]}


class _Probe(Dataset):
    """The first images, each with its first caption, in fixed order."""

    def __init__(self, images: Dataset, captions: Dataset, first_caption: Sequence[int]) -> None:
        self.images, self.captions, self.first_caption = images, captions, first_caption

    def __len__(self) -> int:
        return len(self.first_caption)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.images[row], **self.captions[self.first_caption[row]]}


class ImageTextDataset(Dataset):
    """A retrieval split: images with one or several captions each.

    As a sequence it gives training pairs: one caption per image and epoch, chosen by a function of
    (seed, epoch, row) alone, so that an interrupted run resumes exactly.

    Args:
        rows: From `load_image_text`, or any data set with an image and a caption column.
        seed: Seed of the choice of captions.
        image_column: None finds it.
        caption_column: None finds it.

    Attributes:
        text_to_image: (captions,) row of the image each caption belongs to.
        image_ids: (images,) identity; images of one identity are no negatives of each other.
        gallery: (images,) which images are ranked together.

    Raises:
        ValueError: If a column is missing, an image unreadable or a caption empty.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        seed: int = 0,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        if rows.column_names != COLUMNS:
            rows = checked_rows(rows, image_column=image_column, caption_column=caption_column)
        self.rows = rows
        self.seed, self.epoch = seed, 0
        captions = rows["captions"]
        self._texts = [text for texts in captions for text in texts]
        counts = torch.tensor([len(texts) for texts in captions])
        self.text_to_image: Tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self.image_ids = _codes(rows["image_id"])
        self.gallery = _codes(rows["gallery"])
        self._counts = counts.tolist()
        self._starts = (counts.cumsum(0) - counts).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One training pair, with the identity of its image as `image_ids`."""
        caption = self.captions()[self._starts[row] + self._choice(row)]
        return {**self.images()[row], **caption, "image_ids": int(self.image_ids[row])}

    @property
    def fingerprint(self) -> str:
        """Changes with the data."""
        return self.rows._fingerprint

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the captions of an epoch; accelerate's data loaders call it."""
        self.epoch = epoch

    def images(self) -> Dataset:
        """Every image once, as rows `{"image": PIL image}`."""
        return _Rows("image", self.rows["image"])

    def captions(self) -> Dataset:
        """Every caption once, as rows `{"caption": str}`."""
        return _Rows("caption", self._texts)

    def probe(self, size: int) -> Dataset:
        """The first `size` images with their first captions, whatever the epoch."""
        return _Probe(self.images(), self.captions(), self._starts[:size])

    def _choice(self, row: int) -> int:
        key = f"{self.seed}/{self.epoch}/{row}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % self._counts[row]


class PicoCollator:
    """Rows to a batch, with the architecture's padding and a mask of the words.

    Args:
        processor: What `AutoProcessor` gives: a tokenizer and an image processor.
        max_length: Longest text in tokens; None asks the tokenizer. SigLIP's texts are always
            padded to 64, since its tower attends to the padding.

    Raises:
        ValueError: If the processor lacks a tokenizer or an image processor.
    """

    def __init__(self, processor: Any, max_length: int | None = None) -> None:
        self.tokenizer = getattr(processor, "tokenizer", None)
        self.image_processor = getattr(processor, "image_processor", None)
        if self.tokenizer is None or self.image_processor is None:
            raise ValueError(
                "`processing_class` must hold a tokenizer and an image processor, got "
                f"{type(processor).__name__}. Load it with AutoProcessor.from_pretrained(…)."
            )
        self.fixed_length = "siglip" in type(processor).__name__.lower()
        longest = 64 if self.fixed_length else min(self.tokenizer.model_max_length, 512)
        self.max_length = max_length or longest

    @property
    def fingerprint(self) -> str:
        """Changes with the preprocessing."""
        parts = (self.image_processor.to_dict(), self.tokenizer.name_or_path, self.max_length)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch of whatever the rows hold: images, captions, both, or cached hidden states."""
        batch: dict[str, Tensor] = {}
        if "image" in rows[0]:
            images = [as_rgb(row["image"]) for row in rows]
            batch |= self.image_processor(images=images, return_tensors="pt")
        if "caption" in rows[0]:
            batch |= self._words([row["caption"] for row in rows])
        for key, mask in (
            ("image_hidden_states", "patch_mask"),
            ("text_hidden_states", "word_mask"),
        ):
            if key in rows[0]:
                batch[key], batch[mask] = _pad([row[key] for row in rows])
        if "image_ids" in rows[0]:
            batch["image_ids"] = torch.tensor([row["image_ids"] for row in rows])
        return batch

    def _words(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids; words are the tokens that are neither special nor padding."""
        tokens = self.tokenizer(
            captions,
            padding="max_length" if self.fixed_length else True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
            return_attention_mask=True,
            return_special_tokens_mask=True,
        )
        special = tokens.pop("special_tokens_mask").bool()
        attended = tokens["attention_mask"].bool()
        words = attended & ~special
        bare = ~words.any(dim=1, keepdim=True)  # a text of nothing but special tokens keeps them
        tokens["word_mask"] = torch.where(bare, attended, words)
        if self.fixed_length:
            del tokens["attention_mask"]  # this tower was trained to attend to its padding
        return dict(tokens)


def as_rgb(image: Any) -> Image.Image:
    """A PIL image in RGB from a PIL image, a path or bytes.

    Raises:
        ValueError: If it is none of them.
    """
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if isinstance(image, str | Path | io.BytesIO):
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"`image` must be a PIL image, a path or bytes, got {type(image).__name__}."
        )
    return image.convert("RGB")


def _codes(values: Sequence[str]) -> Tensor:
    """(rows,) equal numbers for equal values, counted from 0 in order of appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def _pad(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, tokens, hidden) zero-padded, and (rows, tokens) True where a token is real."""
    lengths = torch.tensor([len(state) for state in states])
    padded = pad_sequence(states, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
