"""Cost of a search in two stages beside an exact scan, and what it loses, in one run.

Run: python benchmarks/search.py
     python benchmarks/search.py --images 1000 --dtype int8 --depth 50 200
     python benchmarks/search.py --pairs val.parquet --align train.parquet
Made-up images of several concepts each; a query of some words about one of them has a right answer,
which R@10 looks for. With `--pairs`: real images and one caption of each, features of the embedded
pair of encoders, aligned by other pairs. Times are medians over 20 queries, one at a time, from
tokens to ranked images, both ways in turn; files are in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from measurement import CAPTION_LENGTHS
from pico_hf import (
    PicoIndex,
    PicoModel,
    PicoRetriever,
    PicoTrainer,
    PicoTrainingArguments,
    TokenFeatures,
    load_image_text,
)

PATCHES, COLUMNS, CONCEPTS = 50, 512, 6
DEPTH = 100  # that the bars are for
BARS = {1_000: 0.35, 20_000: 0.05}  # two stages over a scan
LOSS = 0.005  # of R@10
TIMED = 20  # queries


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

    def blocks(self, size: int = 500) -> Iterator[tuple[list[str], TokenFeatures]]:
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
    index: PicoIndex, answers: list[str], queries: TokenFeatures, depths: list[int]
) -> Iterator[dict[str, float]]:
    """Times and hits of both ways, for each depth."""
    scan = [{hit.id for hit in hits} for hits in index.search(queries, 10, exact=True)]
    for depth in depths:
        two = index.search(queries, 10, exact=False, depth=depth)
        near = [{hit.id for hit in hits} for hits in two]
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(min(TIMED, len(queries))):
            for exact, own in seconds.items():
                start = time.perf_counter()
                index.search(queries[number : number + 1], 10, exact=exact, depth=depth)
                own.append(time.perf_counter() - start)
        times = {exact: statistics.median(own) for exact, own in seconds.items()}
        yield {
            "depth": depth,
            "ratio": times[False] / times[True],
            "recall": share(answer in ids for answer, ids in zip(answers, scan, strict=True)),
            "two": share(answer in ids for answer, ids in zip(answers, near, strict=True)),
            "shared": sum(len(a & b) for a, b in zip(scan, near, strict=True)) / 10 / len(scan),
        }


def share(found: Iterator[bool]) -> float:
    return statistics.mean(map(float, found))


def made_up(
    args: argparse.Namespace, folder: Path
) -> Iterator[tuple[PicoIndex, str, list[str], TokenFeatures]]:
    """(index, its storage, right answers, queries) of made-up galleries."""
    for images in args.images:
        for dtype in args.dtype:
            gallery = Gallery(images, args.queries, args.noise)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                index = PicoIndex.create(Path(place) / "index", dtype=dtype)
                for ids, features in gallery.blocks():
                    index.add_features(features, ids)
                index.compact()
                answers = [str(row) for row in gallery.about.tolist()]
                yield index, dtype, answers, gallery.queries()


def real(
    args: argparse.Namespace, folder: Path
) -> Iterator[tuple[PicoIndex, str, list[str], TokenFeatures]]:
    """Likewise of the images of a file, each of which one caption looks for."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from lite_clip import load_lite_clip

    encoder, processor = load_lite_clip(COLUMNS)
    model = PicoModel.from_encoder(encoder, pooled_share=0.0)
    settings = PicoTrainingArguments(
        str(folder / "run"),
        use_cpu=True,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        report_to="none",
    )
    pairs = load_image_text(files=args.align, max_samples=args.align_images)
    trainer = PicoTrainer(model, settings, train_dataset=pairs, processing_class=processor)
    trainer.construct_prototypes()
    retriever = PicoRetriever(model, processor)
    rows = load_image_text(files=args.pairs)
    images = retriever.encode_images([row["image"] for row in rows])
    texts = retriever.encode_texts([captions[0] for captions in rows["captions"]])
    ids = [str(row) for row in range(len(rows))]
    for dtype in args.dtype:
        index = PicoIndex.create(folder / dtype, retriever, dtype=dtype)
        index.add_features(images, ids)
        yield index, dtype, ids, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 20_000])
    parser.add_argument("--dtype", nargs="+", default=["float16"])
    parser.add_argument("--depth", type=int, nargs="+", default=[DEPTH])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--noise", type=float, default=2.0, help="beside concepts of length 1")
    parser.add_argument("--pairs", help="a file of images and captions instead")
    parser.add_argument("--align", help="with --pairs: a file of other pairs")
    parser.add_argument("--align_images", type=int, default=1000)
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bar is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| images | storage | depth | two stages / scan | R@10 scan | two stages | same top 10 |")
    print("|---|---|---|---|---|---|---|")
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for index, dtype, answers, queries in (real if args.pairs else made_up)(args, Path(folder)):
            for found in measure(index, answers, queries, args.depth):
                print(
                    f"| {len(index):,} | {dtype} | {found['depth']} | {found['ratio']:.3f} × "
                    f"| {found['recall']:.3f} | {found['two']:.3f} | {found['shared']:.3f} |",
                    flush=True,
                )
                if found["depth"] == DEPTH:
                    slow = found["ratio"] > BARS.get(len(index), 1.0)
                    missed |= slow or found["recall"] - found["two"] > LOSS
    sys.exit(args.check and missed)


if __name__ == "__main__":
    main()
