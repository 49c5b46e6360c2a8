"""Wrap a CLIP and score images with texts.

    python examples/01_wrap_and_score.py cat.jpg street.jpg --texts "a cat" "a busy street"

The first line of the output names the texts, every further line an image and its scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor

from pico_hf import PicoRetriever

CLIP = "openai/clip-vit-base-patch32"


def main(images: Sequence[str], texts: Sequence[str], encoder: str = CLIP) -> Tensor:
    """Prints and returns the scores (images, texts); more is better, 2 is the most.

    Args:
        images: Paths of image files.
        texts: What the images are compared with.
        encoder: Folder or Hub repository of a dual encoder with its processor.
    """
    retriever = PicoRetriever.from_pretrained(encoder)  # w = 1 until columns are estimated
    scores = retriever.score(images, texts)
    print("", *texts, sep="\t")
    for path, row in zip(images, scores.tolist(), strict=True):
        print(path, *(f"{score:.3f}" for score in row), sep="\t")
    return scores


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line; they are the arguments of `main`."""
    parser = argparse.ArgumentParser(description="Scores images with texts.")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--texts", nargs="+", required=True, help="texts to compare them with")
    parser.add_argument("--encoder", default=CLIP, help="folder or Hub repository")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(**vars(parse_arguments()))
