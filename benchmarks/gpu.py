"""Cost of the late interaction on a GPU: fused kernels, plain torch operations and the einsum.

Run: python benchmarks/gpu.py --batch 64 256 512
Times are ratios, measured in one run, to the matrix product of the forward in the same precision;
the share of its speed that the forward reaches is 1 / ratio. Memory is the peak above the inputs.
With --check the scores and gradients of the fused kernels and of plain torch are first compared
with float64; the run ends with exit status 1 if one of them is off by more than LIMITS.
The script switches the fused kernels on and off by itself, whatever PICO_FUSED_KERNELS is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable

import torch

from measurement import tokens
from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.kernels import fused_interaction
from scorers import Scorer, compiled, naive

PATCHES, WORDS, COLUMNS = 196, 32, 512
# Largest difference of a score, and of a gradient relative to its norm (a few maxima are so close
# that rounding decides which token gets the gradient).
LIMITS = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-3, 2e-2)}


def fused(images: TokenFeatures, texts: TokenFeatures) -> torch.Tensor:
    os.environ[fused_interaction.SWITCH] = "1"
    if not fused_interaction.applies(images.features, texts.features):
        raise RuntimeError("The fused kernels need triton. Install pico-hf[triton].")
    return similarity(images, texts)


def plain(images: TokenFeatures, texts: TokenFeatures) -> torch.Tensor:
    os.environ[fused_interaction.SWITCH] = "0"
    return similarity(images, texts)


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
    scores.backward(torch.linspace(-1, 1, scores.numel(), device=scores.device).view_as(scores))


def results(scorer: Scorer, images: TokenFeatures, texts: TokenFeatures) -> list[torch.Tensor]:
    """Scores and both gradients in float64."""
    step(scorer, images, texts)
    with torch.no_grad():
        scores = scorer(images, texts)
    return [part.double() for part in (scores, images.features.grad, texts.features.grad)]


def errors(scorer: Scorer, images: TokenFeatures, texts: TokenFeatures) -> tuple[float, float]:
    """Largest difference of a score to float64, and of a gradient relative to its norm."""
    wide = [
        TokenFeatures(side.features.detach().double().requires_grad_(), side.mask)
        for side in (images, texts)
    ]
    scores, *gradients = results(scorer, images, texts)
    exact, *exact_gradients = results(plain, *wide)
    pairs = zip(gradients, exact_gradients, strict=True)
    relative = max(float((got - want).norm() / want.norm()) for got, want in pairs)
    return float((scores - exact).abs().max()), relative


def check(images: TokenFeatures, texts: TokenFeatures) -> bool:
    """Print how far scores and gradients are from float64; True if all are within LIMITS."""
    passed = True
    limits = LIMITS[images.features.dtype]
    for name, scorer in (("fused kernels", fused), ("plain torch", plain)):
        found = errors(scorer, images, texts)
        good = all(error <= limit for error, limit in zip(found, limits, strict=True))
        passed &= good
        print(f"{name}: scores {found[0]:.1e}, gradients {found[1]:.1e} from float64", end=": ")
        print("passed" if good else f"FAILED, limits {limits[0]:.0e} and {limits[1]:.0e}")
    return passed


def measure(batch: int, dtype: torch.dtype, args: argparse.Namespace) -> bool:
    """Print the table of one batch size and precision; False if its check failed."""
    images, texts = inputs(batch, dtype)
    flat = images.features.detach().flatten(0, 1), texts.features.detach().flatten(0, 1)
    floor = milliseconds(lambda: flat[0] @ flat[1].T, args.rounds)
    print(f"\nB = {batch}, {str(dtype)[6:]}, product {floor:.2f} ms")
    passed = check(images, texts) if args.check else True
    print("\n| scorer | forward | forward+backward | peak MB |\n|---|---|---|---|")
    scorers: dict[str, Scorer] = {"fused kernels": fused, "plain torch": plain}
    scorers["naive einsum"] = naive
    if args.compile:
        scorers["torch.compile"] = compiled()
    for name, scorer in scorers.items():
        with torch.no_grad():
            forward = milliseconds(lambda s=scorer: s(images, texts), args.rounds)
        both = milliseconds(lambda s=scorer: step(s, images, texts), args.rounds)
        peak = peak_megabytes(lambda s=scorer: step(s, images, texts))
        print(f"| {name} | {forward / floor:.2f} | {both / floor:.2f} | {peak:.0f} |", flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--check", action="store_true", help="compare with float64 first")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; `similarity.py` measures the CPU path")
    passed = [
        measure(batch, dtype, args)
        for batch in args.batch
        for dtype in (torch.float32, torch.bfloat16)
    ]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
