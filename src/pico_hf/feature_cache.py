"""Token features of frozen towers, computed once, kept on disk, read back row by row."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from pico_hf import encoders
from pico_hf.data import ImageTextDataset
from pico_hf.evaluation import IMAGE_INPUTS, TEXT_INPUTS, SplitEncoder
from pico_hf.similarity import TokenFeatures

logger = logging.getLogger(__name__)


class TokenStore(Dataset):
    """Rows of token features in two memory-mapped arrays: all tokens in a row, and where rows end.

    Args:
        folder: Holds `tokens.npy` (total tokens, hidden) float16 and `ends.npy` (rows,) int64.
        key: Under which name a row gives its features, `"image_hidden_states"` or
            `"text_hidden_states"`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._ends = np.load(folder / "ends.npy", allow_pickle=False)
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)

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
        width = 0
        with (folder / "tokens.raw").open("wb") as raw:
            for batch in batches:
                tokens = batch.features[batch.mask].to(torch.float16).cpu().numpy()
                if not np.isfinite(tokens).all():
                    raise ValueError(
                        "The tower's hidden states contain NaN, infinity or values beyond float16. "
                        "Check the encoder's weights, or train without `freeze_encoder`."
                    )
                raw.write(tokens.tobytes())
                width = tokens.shape[1]
                ends.extend(batch.mask.sum(dim=1).tolist())
        np.save(folder / "ends.npy", np.cumsum(ends))
        _raw_to_npy(folder / "tokens.raw", folder / "tokens.npy", (sum(ends), width))


def _raw_to_npy(raw: Path, target: Path, shape: tuple[int, int]) -> None:
    """Puts the header in front of the raw values; its length is only known at the end."""
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    with target.open("wb") as out, raw.open("rb") as values:
        np.lib.format.write_array_header_1_0(out, header)
        shutil.copyfileobj(values, out)
    raw.unlink()


class CachedImageTextDataset(ImageTextDataset):
    """An [`ImageTextDataset`] whose rows carry tower outputs instead of pixels and words.

    Args:
        source: The dataset the features were computed from.
        folder: Where `cache_token_features` put them.
    """

    def __init__(self, source: ImageTextDataset, folder: Path) -> None:
        self.__dict__.update(source.__dict__)
        self.folder = folder
        self._stores = (
            TokenStore(folder / "images", "image_hidden_states"),
            TokenStore(folder / "captions", "text_hidden_states"),
        )

    def images(self) -> Dataset:
        """All images once, as hidden states."""
        return self._stores[0]

    def captions(self) -> Dataset:
        """All captions once, as hidden states."""
        return self._stores[1]


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
    if not done.exists():
        partial = folder / f"{done.name}.partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        images = encoder.hidden_batches(dataset.images(), "Caching image features")
        TokenStore.write(partial / "images", (image for image, _ in images))
        captions = encoder.hidden_batches(dataset.captions(), "Caching text features")
        TokenStore.write(partial / "captions", (text for _, text in captions))
        partial.rename(done)
    else:
        logger.info("Token features found in %s.", done)
    return CachedImageTextDataset(dataset, done)


def cache_key(encoder: SplitEncoder, dataset: ImageTextDataset) -> str:
    """Name of the cache: changes with the towers' weights, the data, or the preprocessing."""
    digest = hashlib.sha256()
    model = encoder.model.encoder
    heads = set(encoders.projection_parameters(model))
    for name, tensor in sorted(model.state_dict().items()):
        if name not in heads:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(dataset.fingerprint.encode())
    digest.update(encoder.collate.fingerprint.encode())
    return digest.hexdigest()[:16]
