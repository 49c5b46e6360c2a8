"""What an index costs per image and per query, and by arithmetic what a million and more cost.

Run: python benchmarks/search_cost.py
     python benchmarks/search_cost.py --images 500 --depth 200
Made-up images and queries of `search.py`. Bytes are those of the files of an index that holds
`--images` images, without its records. Times are CPU time of one thread, medians over 10 queries,
given as ratios to the exact scan of the same images; the scan itself is given in ms per 1,000
images, of the machine that this runs on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from pico_hf import PicoIndex
from pico_hf.search.queries import Queries
from search import COLUMNS, PATCHES, Gallery

SCALES = {"1 M": 10**6, "100 M": 10**8, "1 B": 10**9}
MACHINE = 10**12  # bytes that one machine holds, for the number of shards
TIMED = 10


def filled(folder: Path, images: int, **options: object) -> tuple[PicoIndex, Gallery]:
    gallery = Gallery(images, TIMED, 2.0)
    index = PicoIndex.create(folder, **options)  # type: ignore[arg-type]
    for ids, features in gallery.blocks():
        index.add_features(features, ids)
    return index, gallery


def cpu(call: Callable[[int], object]) -> float:
    """Median CPU seconds of a call per query."""
    seconds = []
    for number in range(TIMED):
        start = time.process_time()
        call(number)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def bytes_table(images: int, place: Path) -> None:
    print(f"| tokens | bytes per image | {' | '.join(SCALES)} | shards of 1 TB at 1 B |")
    print("|---|---|---|---|---|---|")
    for dtype in ("float32", "float16", "int8"):
        for merging in (1, 2, 4):
            folder = place / f"{dtype}-{merging}"
            filled(folder, images, dtype=dtype, token_merging=merging)
            each = size(folder) / images
            sizes = " | ".join(readable(each * number) for number in SCALES.values())
            shards = -(-each * SCALES["1 B"] // MACHINE)
            name = dtype if merging == 1 else f"{dtype}, 1 of {merging} tokens"
            print(f"| {name} | {each:,.0f} | {sizes} | {shards:.0f} |", flush=True)
    each = COLUMNS * 4
    sizes = " | ".join(readable(each * number) for number in SCALES.values())
    print(f"| of these, one pooled vector | {each:,} | {sizes} | |")


def readable(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"


def time_table(images: int, depth: int, place: Path) -> None:
    index, gallery = filled(place / "timed", images)
    words = gallery.queries()
    view = index._store.view(None)
    scan = cpu(lambda n: index.search(words[n : n + 1], exact=True))
    per_million = 10**6 / images
    first = cpu(lambda n: list(view.nearest(Queries(words[n : n + 1]), depth)))
    both = cpu(lambda n: index.search(words[n : n + 1], exact=False, depth=depth))
    print(f"scan of 1,000 images: {1000 * scan * 1000 / images:.1f} ms of CPU")
    print("| what a query does | CPU time / scan of as many images |")
    print("|---|---|")
    print(f"| scan | 1 = {scan * per_million:.1f} s per million images |")
    print(f"| stage 1: every pooled vector | {first / scan:.4f} |")
    print(f"| stage 2: {depth} images exactly | {(both - first) / scan:.4f} |")
    if find_spec("qdrant_edge") is None:
        print("| Qdrant in this process | qdrant-edge-py is not installed |")
        return
    engine, _ = filled(place / "edge", images, store="qdrant")
    points = engine._store._points  # type: ignore[attr-defined]
    from pico_hf.search.qdrant_points import POOLED, TOKENS, Condition

    means = words.mean()
    near = cpu(lambda n: points.nearest(POOLED, means[n].numpy(), Condition(), depth))
    keys = points.nearest(POOLED, means[0].numpy(), Condition(), depth)
    fetch = cpu(lambda n: points.get(keys, (TOKENS,)))
    whole = cpu(lambda n: engine.search(words[n : n + 1], exact=False, depth=depth))
    print(f"| Qdrant in this process: stage 1 | {near / scan:.4f} |")
    print(f"| … reading the tokens of {depth} images | {fetch / scan:.4f} |")
    print(f"| … the whole query | {whole / scan:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--depth", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.images:,} images of {PATCHES} tokens with {COLUMNS} columns")
    with tempfile.TemporaryDirectory() as place:
        time_table(args.images, args.depth, Path(place))
        bytes_table(min(args.images, 100), Path(place))


if __name__ == "__main__":
    main()
