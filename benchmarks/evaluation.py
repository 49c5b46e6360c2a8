"""Cost of scoring a gallery without gradients: captions of real lengths, both directions.

Run: python benchmarks/evaluation.py --images 200 --texts 1000 --rounds 5
     python benchmarks/evaluation.py --images 1000 --texts 5000 --alone
Ratios, measured in one run, to a matrix product of the same real words and patches. The peers and
the plain one-direction product score text → image only: half of what pico_hf returns.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("COLPALI_SCORES_BACKEND", "torch")  # the only one on a CPU

import torch

from measurement import cpu_times, floor, peak_megabytes, ratio, tokens
from pico_hf.core.score_form import column_weights
from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from scorers import Scorer, loop, peers

WORDS = 32


def weighted(images: TokenFeatures, texts: TokenFeatures) -> torch.Tensor:
    """Score with column weights, folded into the texts once per call."""
    width = images.features.shape[2]
    return similarity(images, texts, column_weights(torch.linspace(0.1, 0.9, width)))


def scorers() -> dict[str, Scorer]:
    plain = {"pico_hf": similarity, "pico_hf, weighted": weighted, "loop over texts": loop}
    return plain | {f"{name}, one direction": s for name, s in peers(False).items()}


def inputs(args: argparse.Namespace) -> tuple[TokenFeatures, TokenFeatures]:
    images = tokens(args.images, args.patches, args.columns, seed=0)
    return images, tokens(args.texts, WORDS, args.columns, seed=1, captions=True)


def prepare(name: str, args: argparse.Namespace):
    """Build one scoring in the process that measures its memory."""
    images, texts = inputs(args)
    scorer = scorers()[name]
    warm = images[:2], texts[:8]

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return scorer(images, texts)

    scorer(*warm)
    return call


def compare(args: argparse.Namespace) -> None:
    images, texts = inputs(args)
    chosen = scorers()
    calls = {"floor": lambda: floor(images, texts)}
    for name, scorer in chosen.items():
        calls[name] = lambda s=scorer: s(images, texts)
    with torch.inference_mode():
        times = cpu_times(calls, args.rounds)
    real = texts.mask.float().mean() * WORDS
    print(f"{args.images} images × {args.patches} patches, {args.texts} texts × {real:.1f} words\n")
    print("| scorer | × matrix product | pico_hf takes | peak MB |")
    print("|---|---|---|---|")
    for name in chosen:
        peak = peak_megabytes(prepare, name, args)
        share = ratio(times, "pico_hf", name)
        print(f"| {name} | {ratio(times, name, 'floor'):.2f} | {share:.2f} × | {peak:.0f} |")


def alone(args: argparse.Namespace) -> None:
    """Time pico_hf alone, with a progress bar, on galleries too large for the others."""
    images, texts = inputs(args)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    with torch.inference_mode():
        scores = similarity(images, texts, progress=True)
    seconds = time.perf_counter() - start
    work = 2 * int(texts.mask.sum()) * int(images.mask.sum()) * args.columns
    peak = peak_megabytes(prepare, "pico_hf", args) if args.memory else float("nan")
    print(
        f"{args.images} × {args.texts}: {seconds:.0f} s on {args.threads} threads, "
        f"{work / seconds / 1e9:.0f} GFLOP/s, scores {scores.nbytes / 2**20:.0f} MB, "
        f"peak above the inputs {peak:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="pico_hf only, wall time")
    parser.add_argument("--threads", type=int, default=2, help="with --alone")
    parser.add_argument("--memory", action="store_true", help="with --alone: score once more")
    args = parser.parse_args()
    (alone if args.alone else compare)(args)


if __name__ == "__main__":
    main()
