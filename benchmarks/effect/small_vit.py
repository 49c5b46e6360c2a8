"""A small ViT, distilled from Lite0: its patches learn to predict the cells of Lite0's map.

Run: python benchmarks/effect/small_vit.py --data DATA
There are no weights of a ViT to be had without a Hub. It sees the training parts of photos and of
drawings without the fluent family, at 64 px, and takes a quarter of an hour on one core. The
features of `features.py` come first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTModel, set_seed

from features import GRID
from pico_hf.data.token_store import TokenStore
from study import corpus_facts, row_numbers
from towers import ROOT, SMALL, processor, vit_folder

CONFIG = ViTConfig(
    image_size=SMALL,
    patch_size=SMALL // GRID,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=768,
)
EPOCHS, BATCH, RATE = 20, 128, 1e-3
SEEN = ("flickr8k", "emoji/fluent")


class Student(nn.Module):
    """A ViT whose patches predict the teacher's cells, every column of them standardised.

    Args:
        columns: Of a cell.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.tower = ViTModel(CONFIG)
        self.head = nn.Linear(CONFIG.hidden_size, columns)
        self.level = nn.BatchNorm1d(columns, affine=False)

    def forward(self, pixels: Tensor, cells: Tensor) -> Tensor:
        """Squared error; 1 is what predicting the mean would give.

        Args:
            pixels: (images, 3, 64, 64).
            cells: (images, 16, columns), row by row.
        """
        patches = self.tower(pixels).last_hidden_state[:, 1:]
        wanted = self.level(cells.flatten(0, 1)).view_as(cells)
        return nn.functional.mse_loss(self.head(patches), wanted)


def mirrored(pixels: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the images left to right, and the teacher's maps with them."""
    chosen = (torch.rand(len(pixels)) < 0.5).view(-1, 1, 1, 1)
    maps = cells.unflatten(1, (GRID, GRID))
    return (
        torch.where(chosen, pixels.flip(3), pixels),
        torch.where(chosen, maps.flip(2), maps).flatten(1, 2),
    )


def training_pairs(output: Path, data: Path) -> ConcatDataset:
    """(image, teacher's cells) of every training image."""
    parts = []
    for dataset in SEEN:
        name = dataset.partition("/")[0]
        rows = row_numbers(dataset, data)["train"]
        pixels = pixels_of(corpus_facts(name, data).images.select(rows)["image"], dataset)
        cells = TokenStore(output / "features" / f"{name}-lite0", "cells")
        parts.append(StackDataset(pixels, Subset(cells, rows)))
    return ConcatDataset(parts)


def pixels_of(images: list, name: str) -> Tensor:
    """(images, 3, 64, 64) preprocessed, in half precision."""
    prepare = processor("vit").image_processor
    bar = tqdm(images, f"Images of {name}")
    return torch.cat([prepare(image, return_tensors="pt").pixel_values.half() for image in bar])


def collate(rows: list) -> tuple[Tensor, Tensor]:
    pixels, cells = zip(*rows, strict=True)
    return torch.stack(pixels).float(), torch.stack([cell["cells"] for cell in cells]).float()


def distil(pairs: DataLoader, columns: int) -> ViTModel:
    """Trains the student on batches of (pixels, cells)."""
    student = Student(columns)
    optimizer = torch.optim.AdamW(student.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * len(pairs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    bar = tqdm(total=steps, desc="Distilling")
    for _ in range(EPOCHS):
        for pixels, cells in pairs:
            loss = student(*mirrored(pixels, cells))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return student.tower.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=Path("outputs/effect"))
    args = parser.parse_args()
    set_seed(0)
    pairs = training_pairs(args.output, args.data)
    columns = pairs[0][1]["cells"].shape[1]
    loader = DataLoader(pairs, BATCH, shuffle=True, drop_last=True, collate_fn=collate)
    distil(loader, columns).save_pretrained(vit_folder(args.output))


if __name__ == "__main__":
    main()
