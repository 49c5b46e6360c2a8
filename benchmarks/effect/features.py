"""Outputs of frozen towers over the study's data, computed once: one store per corpus and tower.

Run: python benchmarks/effect/features.py --corpora flickr8k emoji --towers lite0 lite2
It needs the data in `--data` (see TABLES.md for their form) and takes about a quarter of an hour
per corpus and tower on one core. An image's 7 × 7 cells are averaged to a 4 × 4 grid, as in the
first measurements of the method, which makes every later run three times as fast.
`--special-tokens` keeps the towers' own beside them, in stores of other names: [CLS] and [SEP] of
MiniLM, and CLS of the small ViT. EfficientNets have none.
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
from pico_hf.encoders.tokens import prefix_length
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
SPECIAL, MAPS = "-special", ("lite0", "lite2")  # convolutions, which have no special tokens


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


def to_grid(tokens: TokenFeatures, prefix: int = 0) -> TokenFeatures:
    """Cells of a square map averaged to GRID × GRID, after the tokens that come before it."""
    first, cells = tokens.features[:, :prefix], tokens.features[:, prefix:]
    images, count, columns = cells.shape
    side = int(count**0.5)
    cube = cells.transpose(1, 2).reshape(images, columns, side, side)
    pooled = adaptive_avg_pool2d(cube, GRID).flatten(2).transpose(1, 2)
    features = torch.cat([first, pooled], dim=1)
    return TokenFeatures(features, torch.ones(features.shape[:2], dtype=torch.bool))


def write_once(folder: Path, batches: Iterator[TokenFeatures]) -> None:
    """Writes a store under a temporary name; an interrupted run leaves no half store."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        TokenStore.write(partial, batches)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def store_names(name: str, tower: str, column: str, special: bool) -> tuple[str, str]:
    """Names of the stores of images and of texts, with special tokens or without.

    Args:
        name: Of the corpus.
        tower: Of images.
        column: Of texts.
        special: Whether special tokens are kept.
    """
    image = f"{name}-{tower}{SPECIAL if special and tower not in MAPS else ''}"
    return image, f"{name}-{column}{SPECIAL if special else ''}"


def compute(
    name: str, tower: str, data: Path, folder: Path, image_size: int, special: bool = False
) -> None:
    """Stores of images and texts, see [`store_names`], each if it is not there yet."""
    rows = corpus(name, data)
    model = pico_model(tower, 256, folder.parent, image_size, keep_special_tokens=special).eval()
    prefix = prefix_length(model.encoder) if special else 0
    collate = PicoCollator(processor(tower, image_size), config=model.config)
    split_encoder = SplitEncoder(model, collate)
    for column in TEXTS[name]:
        image_store, text_store = store_names(name, tower, column, special)
        if not (folder / text_store).exists():
            flat = [text for row in texts(rows, column) for text in row]
            batches = split_encoder.batches(_Column("caption", flat), column, tower_states)
            write_once(folder / text_store, (text for _, text in batches))
    if not (folder / image_store).exists():
        batches = split_encoder.batches(_Column("image", rows["image"]), tower, tower_states)
        write_once(folder / image_store, (to_grid(image, prefix) for image, _ in batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--corpora", nargs="+", default=["flickr8k", "emoji"], choices=FILES)
    parser.add_argument("--towers", nargs="+", default=["lite0", "lite2"])
    parser.add_argument("--image-size", type=int, default=224, help="pixels; 128 is quick")
    parser.add_argument("--special-tokens", action="store_true", help="keep them, as LAPS does")
    parser.add_argument("--output", type=Path, default=Path("outputs/effect/features"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for tower in args.towers:
        for name in args.corpora:
            sizes = args.image_size, args.special_tokens
            compute(name, tower, args.data, args.output, *sizes)


if __name__ == "__main__":
    main()
