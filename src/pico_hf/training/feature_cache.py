"""Token features of frozen towers, computed once, kept on disk, read back row by row."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import PIL
import torch
import transformers
from filelock import FileLock, Timeout
from torch.utils.data import Subset

from pico_hf.core.processes import Processes
from pico_hf.data import collator, image_files, image_modes, images, token_store
from pico_hf.data.cached_dataset import CachedImageTextDataset
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.token_store import TokenStore
from pico_hf.encoders import (
    one_sided,
    padding,
    projection,
    projection_modules,
    spec,
    special_tokens,
    table,
    text_lengths,
)
from pico_hf.encoders import tokens as encoder_tokens
from pico_hf.training.cache_folder import ABOUT_FILE, PARTIAL, clear_leftovers
from pico_hf.training.encoding import SplitEncoder, tower_states

logger = logging.getLogger(__name__)

# Entries of a configuration that say where it came from and not what it does.
_NAMES = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")


def _read_cache(
    source: ImageTextDataset, folder: Path, special_tokens: bool
) -> CachedImageTextDataset:
    """Stores are in canonical order, so that one cache serves all forms of the same data."""
    stores = (
        TokenStore(folder / "images", "image_hidden_states"),
        TokenStore(folder / "captions", "text_hidden_states"),
    )
    for store, wanted in zip(stores, (source.images(), source.captions()), strict=True):
        if len(store) != len(wanted):
            raise ValueError(
                f"The cached features in '{folder}' are of {len(store)} rows in place of "
                f"{len(wanted)}. Delete them with `pico-hf cache --clear {folder.name}`."
            )
    orders = source.image_order, source.caption_order
    places = [order.argsort().tolist() for order in orders]
    images, captions = map(Subset, stores, places)
    return CachedImageTextDataset(source, images, captions, folder, special_tokens)


def cache_token_features(
    encoder: SplitEncoder, dataset: ImageTextDataset, folder: Path
) -> CachedImageTextDataset:
    """Runs the frozen towers over every image and caption once, or finds that this was done.

    Features are written to a temporary folder that is renamed at the end, under a lock: an
    interrupted run leaves no half cache, and of several runs the first one computes. Several
    processes of one run compute a part each, and the first one of each machine writes. What killed
    runs have left in `folder` is deleted.

    Args:
        encoder: Model, collator and batch size.
        dataset: What to encode; one with features already is given back as it is.
        folder: Parent folder of all caches.

    Returns:
        The dataset with features for pixels.

    Raises:
        ValueError: If the features that it has are not of the model's `keep_special_tokens`.
    """
    kept = encoder.model.config.keep_special_tokens
    if isinstance(dataset, CachedImageTextDataset):
        dataset.check_special_tokens(kept)
        return dataset
    done = folder / encoder.processes.same(cache_key(encoder, dataset))
    with _writer(done, encoder.processes) as writes:
        missing = encoder.processes.every(writes and not done.exists())
        if any(missing):
            _write(encoder, dataset, done, writes=missing[encoder.processes.rank])
        elif writes:
            logger.info("Token features found in %s.", done)
    return _read_cache(dataset, done, kept)


@contextmanager
def _writer(done: Path, processes: Processes) -> Iterator[bool]:
    """Holds a cache's lock and gives True in one process of every machine.

    Only the very first process waits for other runs: were there two, each could hold a lock that
    the other one needs. On a machine that shares the disk of the first one nobody else gets it.
    """
    lock = FileLock(done.with_name(f"{done.name}.lock"))
    local = int(os.environ.get("LOCAL_RANK", processes.rank))
    done.parent.mkdir(parents=True, exist_ok=True)
    if processes.first:
        clear_leftovers(done.parent)
        lock.acquire()
    processes.same(None)  # the first one has the lock
    if local == 0 and not processes.first:
        with suppress(Timeout):
            lock.acquire(timeout=0)
    try:
        yield lock.is_locked
        processes.every(None)  # nobody reads before all have written
    finally:
        lock.release()


def _write(encoder: SplitEncoder, dataset: ImageTextDataset, done: Path, *, writes: bool) -> None:
    """Encodes a split together with the other processes; those that write keep the features."""
    rows, texts = dataset.in_order()
    sides = (
        (
            "images",
            (image for image, _ in encoder.batches(rows, "Caching image features", tower_states)),
        ),
        (
            "captions",
            (text for _, text in encoder.batches(texts, "Caching text features", tower_states)),
        ),
    )
    if not writes:
        for _, batches in sides:
            deque(batches, maxlen=0)
        return
    partial = done.with_name(f"{done.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        for name, batches in sides:
            TokenStore.write(partial / name, batches)
        about = {
            "encoder": encoder.model.encoder.config.model_type,
            "images": len(dataset.images()),
            "captions": len(dataset.captions()),
        }
        (partial / ABOUT_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")
        partial.rename(done)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if all went well
    size = sum(file.stat().st_size for file in done.rglob("*"))
    logger.info("Token features written to %s: %.1f MB.", done, size / 1e6)


def cache_key(encoder: SplitEncoder, dataset: ImageTextDataset) -> str:
    """Name of a cache: changes with whatever its features depend on.

    That is the towers' weights and configuration, whether special tokens are kept, pixels and
    texts, processor and tokenizer, and the code that makes features of them, here and in
    transformers and Pillow.
    """
    digest = hashlib.sha256()
    model = encoder.model.encoder
    heads = set(projection_modules.projection_parameters(model))
    for name, tensor in sorted(model.state_dict().items()):
        if name not in heads:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NAMES}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(f"special tokens: {encoder.model.config.keep_special_tokens}".encode())
    digest.update(dataset.fingerprint.encode())
    digest.update(encoder.collate.fingerprint.encode())
    digest.update(f"{transformers.__version__} {PIL.__version__} {_code()}".encode())
    return digest.hexdigest()[:16]


@cache
def _code() -> str:
    """Digest of the modules that turn rows into hidden states."""
    digest = hashlib.sha256()
    for module in (
        collator,
        image_files,
        image_modes,
        images,
        token_store,
        encoder_tokens,
        padding,
        projection,
        projection_modules,
        one_sided,
        spec,
        special_tokens,
        table,
        text_lengths,
    ):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()
