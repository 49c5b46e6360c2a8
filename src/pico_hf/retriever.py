"""A model with its processor: paths, images and strings in, token features and rankings out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.collator import PicoCollator
from pico_hf.data.raw_inputs import caption_rows, image_list, image_rows, text_list
from pico_hf.model_and_processor import model_and_processor
from pico_hf.training.encoding import SplitEncoder
from pico_hf.training.evaluation import packed_scores


@dataclass(frozen=True)
class Match:
    """One place of a ranking.

    Attributes:
        index: Which of the ranked images or texts it is, counted from 0.
        score: S, see [`PicoModel.score`]; comparable for one query, not between queries.
        item: The image or text as it was given, None if features were given.
    """

    index: int
    score: float
    item: Any = None


class PicoRetriever:
    """Encodes, scores and ranks raw images and texts.

    Images are paths, PIL images, bytes or arrays of pixels, read exactly as in training; texts are
    strings. Wherever a list of them is taken, [`TokenFeatures`] that were encoded before may be
    given instead. Nothing changes the model.

    Args:
        model: Encodes and scores, on the device where it is.
        processor: What `AutoProcessor` gives: a tokenizer and an image processor.
        batch_size: Images or texts at a time, >= 1.
        num_workers: Processes that decode images.
        max_length: Longest text in tokens; a longer one is cut. None: what the tower takes.
        background: Colour behind transparent pixels.
        show_progress: False shows no progress bar; one batch never shows one.

    Raises:
        ValueError: If the processor lacks a tokenizer or an image processor, or if a number is out
            of its range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        max_length: int | None = None,
        background: str | tuple[int, int, int] = "white",
        show_progress: bool = True,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer >= 1, got {batch_size!r}.")
        self.model, self.processor = model, processor
        self.batch_size, self.num_workers = batch_size, num_workers
        self.show_progress = show_progress
        self.collate = PicoCollator(
            processor, max_length, config=model.config, background=background
        )

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, device: str | torch.device | None = None, **kwargs: Any
    ) -> PicoRetriever:
        """Loads model and processor of a folder or Hub repository.

        Args:
            source: A Pico model, or any dual encoder, which is wrapped; see
                [`PicoModel.from_pretrained`].
            device: Where to run; None: a GPU if there is one.
            kwargs: Of the constructor.

        Raises:
            OSError: If there is no model or no processor.
        """
        model, processor = model_and_processor(source)
        return cls(model if device is None else model.to(device), processor, **kwargs)

    # ---- features ----------------------------------------------------------------------------

    def encode_images(self, images: Any) -> TokenFeatures:
        """Images to patch features (images, patches, D) of unit length, see `PicoModel`.

        Args:
            images: A list of images, or one.

        Raises:
            ValueError: If there are none, or if one cannot be read: it is named by its place.
        """
        return self._packed_images(image_list(images))[:]

    def encode_texts(self, texts: str | Sequence[str]) -> TokenFeatures:
        """Texts to word features (texts, words, D) of unit length, see `PicoModel`.

        Args:
            texts: A list of strings, or one.

        Raises:
            ValueError: If there are none, or if one is empty or no string.
        """
        return self._packed_texts(text_list(texts))[:]

    def image_batches(self, images: Sequence[Any]) -> Iterator[TokenFeatures]:
        """Encodes images batch by batch, for lists whose features would fill the memory."""
        rows = image_rows(images, self.collate.background)
        for batch, _ in self._encoder(len(rows)).batches(rows, "Encoding images"):
            assert batch is not None
            yield batch

    def _packed_images(self, images: Sequence[Any]) -> PackedTokens:
        return PackedTokens.collect(self.image_batches(images))

    def _packed_texts(self, texts: Sequence[str]) -> PackedTokens:
        rows = caption_rows(texts)
        batches = self._encoder(len(rows)).batches(rows, "Encoding texts")
        return PackedTokens.collect(words for _, words in batches if words is not None)

    def _encoder(self, count: int) -> SplitEncoder:
        return SplitEncoder(
            self.model,
            self.collate,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            disable_tqdm=not self.show_progress or count <= self.batch_size,
        )

    # ---- scores ------------------------------------------------------------------------------

    def score(self, images: Any, texts: Any) -> Tensor:
        """S (images, texts) fp32 of every image and text; see `PicoModel.score`.

        Args:
            images: A list of images, or their features.
            texts: A list of strings, or their features.
        """
        sides = (
            self._packed(images, self._packed_images, image_list),
            self._packed(texts, self._packed_texts, text_list),
        )
        return packed_scores(self.model, *sides, show_progress=self.show_progress)

    def rank(
        self, images: Any, texts: Any, top_k: int = 10, *, by: str = "text"
    ) -> list[list[Match]]:
        """The best images for every text, or the best texts for every image.

        Args:
            images: A list of images, or their features.
            texts: A list of strings, or their features.
            top_k: Places of a ranking, >= 1; fewer if there are fewer items.
            by: `"text"` gives one ranking of images per text, `"image"` one of texts per image.

        Returns:
            A ranking per query, best first; equal scores in the order of the items.

        Raises:
            ValueError: If `top_k` or `by` is none of these, or see `encode_images` and
                `encode_texts`.
        """
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"`top_k` must be an integer >= 1, got {top_k!r}.")
        if by not in ("text", "image"):
            raise ValueError(f"`by` must be 'text' or 'image', got {by!r}.")
        scores = self.score(images, texts)
        scores, ranked = (scores.t(), images) if by == "text" else (scores, texts)
        listed = image_list if by == "text" else text_list
        items = None if isinstance(ranked, TokenFeatures) else listed(ranked)
        best, order = scores.cpu().sort(dim=1, descending=True, stable=True)
        return [
            [
                Match(index, score, None if items is None else items[index])
                for score, index in zip(row[:top_k], places[:top_k], strict=True)
            ]
            for row, places in zip(best.tolist(), order.tolist(), strict=True)
        ]

    @staticmethod
    def _packed(
        side: Any, encode: Callable[[Any], PackedTokens], listed: Callable[[Any], Sequence[Any]]
    ) -> PackedTokens:
        if isinstance(side, TokenFeatures):
            return PackedTokens.collect([side])
        return encode(listed(side))
