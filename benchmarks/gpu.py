"""Cost of the late interaction on a GPU: the fused kernels beside a plain product and the einsum.

Run: python benchmarks/gpu.py --batch 64 256 512
Times are ratios, measured in one run, to the matrix product of the forward in the same precision;
the share of its speed that the forward reaches is 1 / ratio. Memory is the peak above the inputs.
With --check the scores are compared with float64 first.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable

import torch

from measurement import tokens
from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from scorers import Scorer, compiled, naive

PATCHES, WORDS, COLUMNS = 196, 32, 512
os.environ["PICO_FUSED_KERNELS"] = "1"  # this is what is measured


def inputs(batch: int, dtype: torch.dtype) -> tuple[TokenFeatures, TokenFeatures]:
    sides = tokens(batch, PATCHES, COLUMNS, seed=0), tokens(batch, WORDS, COLUMNS, seed=1)
    return tuple(
        TokenFeatures(s.features.to("cuda", dtype).requires_grad_(), s.mask.to("cuda"))
        for s in sides
    )


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Median time on the device, after two calls that compile and allocate."""
    for _ in range(2):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_megabytes(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def step(scorer: Scorer, images: TokenFeatures, texts: TokenFeatures) -> None:
    images.features.grad = texts.features.grad = None
    scores = scorer(images, texts)
    scores.backward(torch.linspace(-1, 1, scores.numel(), device="cuda").view_as(scores))


@torch.no_grad()
def largest_error(images: TokenFeatures, texts: TokenFeatures) -> float:
    wide = [TokenFeatures(s.features.double(), s.mask) for s in (images, texts)]
    return float((similarity(images, texts) - similarity(*wide)).abs().max())


def measure(batch: int, dtype: torch.dtype, args: argparse.Namespace) -> None:
    images, texts = inputs(batch, dtype)
    flat = images.features.detach().flatten(0, 1), texts.features.detach().flatten(0, 1)
    floor = milliseconds(lambda: flat[0] @ flat[1].T, args.rounds)
    print(f"\nB = {batch}, {str(dtype)[6:]}, product {floor:.2f} ms")
    if args.check:
        print(f"largest difference to float64 {largest_error(images, texts):.1e}")
    print("\n| scorer | forward | forward+backward | peak MB |\n|---|---|---|---|")
    scorers: dict[str, Scorer] = {"pico_hf": similarity, "naive einsum": naive}
    if args.compile:
        scorers["torch.compile"] = compiled()
    for name, scorer in scorers.items():
        with torch.no_grad():
            forward = milliseconds(lambda s=scorer: s(images, texts), args.rounds)
        both = milliseconds(lambda s=scorer: step(s, images, texts), args.rounds)
        peak = peak_megabytes(lambda s=scorer: step(s, images, texts))
        print(f"| {name} | {forward / floor:.2f} | {both / floor:.2f} | {peak:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--check", action="store_true", help="compare with float64")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; `similarity.py` measures the CPU path")
    for batch in args.batch:
        for dtype in (torch.float32, torch.bfloat16):
            measure(batch, dtype, args)


if __name__ == "__main__":
    main()
