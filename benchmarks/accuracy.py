"""Accuracy of the float32 scores beside float64, on features of real images and captions.

Run: python benchmarks/accuracy.py [--file pairs.parquet]   # default: the embedded drawings
Features are those of the embedded pair of encoders, projected at random to 512 columns.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from pico_hf import ImageTextDataset, PicoCollator, PicoModel, TokenFeatures
from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.metrics import image_to_text_ranks, text_to_image_ranks
from pico_hf.core.similarity import similarity
from pico_hf.data.loading import load_image_text
from pico_hf.training.encoding import SplitEncoder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DRAWINGS = EXAMPLES / "data" / "emoji-styles" / "validation_seen.parquet"


def encoded(file: Path, images: int, columns: int) -> EncodedSplit:
    """Token features of the first images of a file and of all their captions."""
    sys.path.insert(0, str(EXAMPLES))
    from lite_clip import load_lite_clip

    encoder, processor = load_lite_clip(columns)
    rows = ImageTextDataset(load_image_text(files=file, max_samples=images))
    model = PicoModel.from_encoder(encoder, pooled_share=0.0)
    split = SplitEncoder(model, PicoCollator(processor), batch_size=64)
    return split.split(rows, "Features")


def same_order(one: Tensor, other: Tensor) -> float:
    """Percent of rows whose whole ranking is the same."""
    return 100 * float((one.argsort(dim=1) == other.argsort(dim=1)).all(dim=1).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=DRAWINGS)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--columns", type=int, default=512)
    args = parser.parse_args()
    split = encoded(args.file, args.images, args.columns)
    sides = split.images[:], split.texts[:]
    wide = [TokenFeatures(side.features.double(), side.mask) for side in sides]
    scores, exact = similarity(*sides), similarity(*wide)
    owner = split.text_to_image
    print(f"{len(split.images)} images × {len(split.texts)} texts")
    print(f"largest difference of a score: {float((scores - exact).abs().max()):.1e}")
    for name, ranks in (("images", image_to_text_ranks), ("texts", text_to_image_ranks)):
        same = torch.equal(ranks(scores, owner), ranks(exact, owner))
        print(f"ranks of the matches, by {name}: {'identical' if same else 'DIFFERENT'}")
    for name, one, other in (("images", scores, exact), ("texts", scores.T, exact.T)):
        top = torch.equal(one.topk(10).indices, other.topk(10).indices)
        print(f"top 10 of the {name}: {'identical' if top else 'DIFFERENT'}")
        print(f"whole rankings of the {name}: {same_order(one, other):.1f} % identical")


if __name__ == "__main__":
    main()
