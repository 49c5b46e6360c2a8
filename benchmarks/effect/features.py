"""Outputs of frozen towers over the study's data, computed once: one store per corpus and tower.

Run: python benchmarks/effect/features.py --corpora flickr8k emoji --towers lite0 lite2
It needs the data in `--data` (see TABLES.md for their form) and takes about a quarter of an hour
per corpus and tower on one core. An image's 7 × 7 cells are averaged to a 4 × 4 grid, as in the
first measurements of the method, which makes every later run three times as fast.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import torch
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Dataset

from pico_hf import PicoCollator
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.token_store import TokenStore
from pico_hf.training.encoding import SplitEncoder, tower_states
from towers import ROOT, pico_model, processor

FILES = {
    "flickr8k": ("flickr8k/train-0.parquet", "flickr8k/train-1.parquet", "flickr8k/val.parquet"),
    "emoji": ("emoji-styles/train.parquet", "emoji-styles/validation.parquet"),
    "drawings": tuple(
        f"emoji-styles/{part}.parquet" for part in ("train", "validation_seen", "validation_unseen")
    ),
    "icons": ("icons/validation.parquet",),
}
BUILT = ROOT / "outputs" / "effect"
# Of corpora that are not in `--data`: the repository has the one, `icon_themes.py` makes the other.
FOLDERS = {"drawings": ROOT / "examples" / "data", "icons": BUILT}
# Text columns of a corpus, the usual one first; a list of tags is one text.
TEXTS = {
    "flickr8k": ("captions",),
    "emoji": ("label", "tags"),
    "drawings": ("caption",),
    "icons": ("label",),
}
GRID = 4


def corpus(name: str, data: Path) -> datasets.Dataset:
    """All rows of a corpus, its files in their order."""
    return datasets.load_dataset("parquet", data_files=files(name, data), split="train")


def files(name: str, data: Path) -> list[str]:
    """Paths of a corpus's files, those for training first."""
    return [str(FOLDERS.get(name, data) / file) for file in FILES[name]]


def texts(rows: datasets.Dataset, column: str) -> list[list[str]]:
    """The texts of every row: its captions, or its label or tags as a single one."""
    values = rows[column]
    if column == "captions":
        return [list(captions) for captions in values]
    return [[value if isinstance(value, str) else ", ".join(value)] for value in values]


class _Column(Dataset):
    def __init__(self, key: str, values: Sequence) -> None:
        self.key, self.values = key, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> dict:
        return {self.key: self.values[row]}


def to_grid(tokens: TokenFeatures) -> TokenFeatures:
    """Cells of a square map averaged to GRID × GRID."""
    images, cells, columns = tokens.features.shape
    side = int(cells**0.5)
    cube = tokens.features.transpose(1, 2).reshape(images, columns, side, side)
    pooled = adaptive_avg_pool2d(cube, GRID).flatten(2).transpose(1, 2)
    return TokenFeatures(pooled, torch.ones(pooled.shape[:2], dtype=torch.bool))


def write_once(folder: Path, batches: Iterator[TokenFeatures]) -> None:
    """Writes a store under a temporary name; an interrupted run leaves no half store."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        TokenStore.write(partial, batches)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def compute(name: str, tower: str, data: Path, folder: Path, image_size: int) -> None:
    """Stores `NAME-TOWER` (images) and `NAME-COLUMN` (texts), each if it is not there yet."""
    rows = corpus(name, data)
    model = pico_model(tower, 256, folder.parent, image_size).eval()
    collate = PicoCollator(processor(tower, image_size), config=model.config)
    split_encoder = SplitEncoder(model, collate)
    for column in TEXTS[name]:
        if not (folder / f"{name}-{column}").exists():
            flat = [text for row in texts(rows, column) for text in row]
            batches = split_encoder.batches(_Column("caption", flat), column, tower_states)
            write_once(folder / f"{name}-{column}", (text for _, text in batches))
    if not (folder / f"{name}-{tower}").exists():
        batches = split_encoder.batches(_Column("image", rows["image"]), tower, tower_states)
        write_once(folder / f"{name}-{tower}", (to_grid(image) for image, _ in batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--corpora", nargs="+", default=["flickr8k", "emoji"], choices=FILES)
    parser.add_argument("--towers", nargs="+", default=["lite0", "lite2"])
    parser.add_argument("--image-size", type=int, default=224, help="pixels; 128 is quick")
    parser.add_argument("--output", type=Path, default=Path("outputs/effect/features"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for tower in args.towers:
        for name in args.corpora:
            compute(name, tower, args.data, args.output, args.image_size)


if __name__ == "__main__":
    main()
