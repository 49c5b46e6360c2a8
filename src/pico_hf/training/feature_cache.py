"""Token features of frozen towers, computed once, kept on disk, read back row by row."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.encoders import tokens as encoder_tokens
from pico_hf.training.evaluation import SplitEncoder, tower_states

logger = logging.getLogger(__name__)


class TokenStore(Dataset):
    """Rows of token features in two memory-mapped arrays: all tokens in a row, and where rows end.

    Args:
        folder: Holds `tokens.f16`, the raw float16 values, and `ends.npy` (rows,) int64.
        key: Under which name a row gives its features, `"image_hidden_states"` or
            `"text_hidden_states"`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._ends = np.load(folder / "ends.npy", allow_pickle=False)
        flat = np.memmap(folder / "tokens.f16", dtype=np.float16, mode="r")
        self._tokens = flat.reshape(self._ends[-1], -1)  # (all tokens, hidden)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Features (tokens, hidden) of one image or caption; special tokens are already gone."""
        start = self._ends[row - 1] if row else 0
        return {self.key: torch.from_numpy(np.array(self._tokens[start : self._ends[row]]))}

    @staticmethod
    def write(folder: Path, batches: Iterator[TokenFeatures]) -> None:
        """Writes real tokens batch by batch, so that memory holds one batch at a time."""
        folder.mkdir(parents=True)
        ends: list[int] = []
        with (folder / "tokens.f16").open("wb") as file:
            for batch in batches:
                tokens = batch.features[batch.mask].to(torch.float16).cpu().numpy()
                if not np.isfinite(tokens).all():
                    raise ValueError(
                        "The tower's hidden states contain NaN, infinity or values beyond float16. "
                        "Check the encoder's weights, or train without `freeze_encoder`."
                    )
                file.write(tokens.tobytes())
                ends.extend(batch.mask.sum(dim=1).tolist())
        np.save(folder / "ends.npy", np.cumsum(ends))


class CachedImageTextDataset(ImageTextDataset):
    """An [`ImageTextDataset`] whose rows carry tower outputs instead of pixels and words.

    Args:
        source: The dataset the features were computed from.
        images: Features of its images, in the order of `source.images()`.
        captions: Features of its captions, in the order of `source.captions()`.
        folder: Where they are kept, if in a folder of their own.
    """

    def __init__(
        self,
        source: ImageTextDataset,
        images: Dataset,
        captions: Dataset,
        folder: Path | None = None,
    ) -> None:
        super().__init__(source.rows, source.seed)
        self.set_epoch(source.epoch)
        self._stores = images, captions
        self.folder = folder

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
        return CachedImageTextDataset(
            super().part(rows), Subset(images, rows), Subset(texts, captions), self.folder
        )


def _read_cache(source: ImageTextDataset, folder: Path) -> CachedImageTextDataset:
    """Stores are in canonical order, so that one cache serves all forms of the same data."""
    stores = (
        TokenStore(folder / "images", "image_hidden_states"),
        TokenStore(folder / "captions", "text_hidden_states"),
    )
    orders = source.image_order, source.caption_order
    places = [order.argsort().tolist() for order in orders]
    images, captions = map(Subset, stores, places)
    return CachedImageTextDataset(source, images, captions, folder)


def cache_token_features(
    encoder: SplitEncoder, dataset: ImageTextDataset, folder: Path
) -> CachedImageTextDataset:
    """Runs the frozen towers over every image and caption once, or finds that this was done.

    The cache is keyed by the towers' weights, the data and the collator, and written to a temporary
    folder that is renamed at the end: an interrupted run leaves no half cache.

    Args:
        encoder: Model, collator and batch size.
        dataset: What to encode.
        folder: Parent folder of all caches.

    Returns:
        The dataset with features for pixels.
    """
    done = folder / cache_key(encoder, dataset)
    if done.exists():
        logger.info("Token features found in %s.", done)
        return _read_cache(dataset, done)
    partial = folder / f"{done.name}.partial-{os.getpid()}"
    try:
        rows, texts = dataset.in_order()
        images = encoder.batches(rows, "Caching image features", tower_states)
        TokenStore.write(partial / "images", (image for image, _ in images))
        captions = encoder.batches(texts, "Caching text features", tower_states)
        TokenStore.write(partial / "captions", (text for _, text in captions))
        partial.rename(done)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if all went well
    return _read_cache(dataset, done)


def cache_key(encoder: SplitEncoder, dataset: ImageTextDataset) -> str:
    """Name of the cache: changes with the towers' weights, the data, or the preprocessing."""
    digest = hashlib.sha256()
    model = encoder.model.encoder
    heads = set(encoder_tokens.projection_parameters(model))
    for name, tensor in sorted(model.state_dict().items()):
        if name not in heads:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(dataset.fingerprint.encode())
    digest.update(encoder.collate.fingerprint.encode())
    return digest.hexdigest()[:16]
