"""Cost of a search in two stages beside an exact scan, and what it loses, in one run.

Run: python benchmarks/search.py
     python benchmarks/search.py --images 1000 --dtype int8 --depth 50 200
Made-up images of several concepts each; a query of some words about one of them has a right answer,
which R@10 looks for. Times are medians over queries, one at a time, from tokens to ranked images,
both ways in turn; files are in the page cache.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from measurement import CAPTION_LENGTHS
from pico_hf import PicoIndex, TokenFeatures

PATCHES, COLUMNS, CONCEPTS = 50, 512, 6
BARS = {1_000: 0.35, 20_000: 0.05}  # two stages over a scan, depth 100
LOSS = 0.005  # of R@10


class Gallery:
    """Made-up images, block by block, and queries about some of them.

    Every patch shows one of the image's concepts, or what all images have in common; every word
    names one of the concepts.
    """

    def __init__(self, images: int, queries: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images, self.noise, self.generator = images, noise, generator
        self.concepts = torch.randn(images // 2, COLUMNS, generator=generator)
        self.common = torch.randn(COLUMNS, generator=generator)
        self.chosen = torch.randint(images // 2, (images, CONCEPTS), generator=generator)
        self.about = torch.randperm(images, generator=generator)[:queries]

    def _noisy(self, tokens: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(tokens.shape, generator=self.generator)
        return torch.nn.functional.normalize(tokens + self.noise * drawn, dim=-1)

    def blocks(self, size: int = 500):
        """(ids, features) of every image."""
        for first in range(0, self.images, size):
            chosen = self.chosen[first : first + size]
            shown = torch.randint(CONCEPTS, (len(chosen), PATCHES), generator=self.generator)
            patches = self.concepts[chosen.gather(1, shown)] + self.common
            mask = torch.ones(patches.shape[:2], dtype=torch.bool)
            ids = [str(first + row) for row in range(len(chosen))]
            yield ids, TokenFeatures(self._noisy(patches), mask)

    def queries(self) -> TokenFeatures:
        """Texts as long as captions are."""
        shares = torch.tensor(CAPTION_LENGTHS, dtype=torch.float)
        drawn = torch.multinomial(shares, len(self.about), True, generator=self.generator)
        lengths = drawn + 2
        chosen = self.chosen[self.about]
        longest = int(lengths.max())
        named = torch.randint(CONCEPTS, (len(chosen), longest), generator=self.generator)
        words = self.concepts[chosen.gather(1, named)] + self.common
        return TokenFeatures(self._noisy(words), torch.arange(longest) < lengths.unsqueeze(1))


def measure(
    index: PicoIndex, gallery: Gallery, queries: TokenFeatures, depth: int
) -> dict[str, float]:
    """Times and hits of both ways."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    right: dict[bool, list[bool]] = {True: [], False: []}
    shared = []
    index.search(queries[:1], exact=True)  # reads the files
    for number, answer in enumerate(gallery.about.tolist()):
        ids = {}
        for exact in (True, False):
            start = time.perf_counter()
            hits = index.search(queries[number : number + 1], 10, exact=exact, depth=depth)[0]
            seconds[exact].append(time.perf_counter() - start)
            ids[exact] = {hit.id for hit in hits}
            right[exact].append(str(answer) in ids[exact])
        shared.append(len(ids[True] & ids[False]) / 10)
    times = {exact: statistics.median(own) for exact, own in seconds.items()}
    return {
        "scan": times[True],
        "ratio": times[False] / times[True],
        "recall": statistics.mean(right[True]),
        "two": statistics.mean(right[False]),
        "shared": statistics.mean(shared),
    }


def build(gallery: Gallery, folder: Path, dtype: str) -> PicoIndex:
    index = PicoIndex.create(folder, dtype=dtype)
    for ids, features in gallery.blocks():
        index.add_features(features, ids)
    index.compact()
    gc.collect()
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 20_000])
    parser.add_argument("--dtype", nargs="+", default=["float16"])
    parser.add_argument("--depth", type=int, nargs="+", default=[100])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--noise", type=float, default=1.5, help="beside concepts of length 1")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bar is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| images | storage | depth | two stages / scan | R@10 scan | two stages | same top 10 |")
    print("|---|---|---|---|---|---|---|")
    missed = False
    for images in args.images:
        for dtype in args.dtype:
            with tempfile.TemporaryDirectory() as folder:
                gallery = Gallery(images, args.queries, args.noise)
                index = build(gallery, Path(folder), dtype)
                queries = gallery.queries()
                for depth in args.depth:
                    found = measure(index, gallery, queries, depth)
                    print(
                        f"| {images:,} | {dtype} | {depth} | {found['ratio']:.3f} × "
                        f"| {found['recall']:.3f} | {found['two']:.3f} | {found['shared']:.3f} |",
                        flush=True,
                    )
                    slow = found["ratio"] > BARS.get(images, 1.0)
                    missed |= slow or found["recall"] - found["two"] > LOSS
    sys.exit(args.check and missed)


if __name__ == "__main__":
    main()
