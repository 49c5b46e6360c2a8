"""Training cost of the late interaction: forward+backward, and with hardest negatives.

Run: python benchmarks/similarity.py --batch 32 64 128 --rounds 7
All columns but the last are ratios, measured in one run, to a matrix product of the same real
words and patches, forward only; "pico_hf takes" is its forward+backward over that of the scorer.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("COLPALI_SCORES_BACKEND", "torch")  # the only one on a CPU

import torch

from measurement import cpu_times, floor, peak_megabytes, ratio, tokens
from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from scorers import Scorer, compiled, loop, naive, peers

PATCHES, WORDS, COLUMNS = 196, 32, 512


def scorers(compile_too: bool) -> dict[str, Scorer]:
    found = {"pico_hf": similarity, "naive einsum": naive, "loop over texts": loop}
    if compile_too:
        found["torch.compile"] = compiled()
    return found | peers(both_directions=True)


def inputs(batch: int, captions: bool) -> tuple[TokenFeatures, TokenFeatures]:
    images = tokens(batch, PATCHES, COLUMNS, seed=0)
    texts = tokens(batch, WORDS, COLUMNS, seed=1, captions=captions)
    images.features.requires_grad_()
    texts.features.requires_grad_()
    return images, texts


def hardest_negatives(scores: torch.Tensor) -> torch.Tensor:
    cost = 0.2 + scores
    own = torch.eye(len(scores), dtype=torch.bool)
    by_image = (cost - scores.diag()[:, None]).clamp(min=0).masked_fill(own, 0)
    by_text = (cost - scores.diag()).clamp(min=0).masked_fill(own, 0)
    return by_image.amax(dim=1).sum() + by_text.amax(dim=0).sum()


def step(scorer: Scorer, images: TokenFeatures, texts: TokenFeatures, hardest: bool) -> None:
    """Forward, backward; the gradients are the result."""
    images.features.grad = texts.features.grad = None
    scores = scorer(images, texts)
    if hardest:
        hardest_negatives(scores).backward()
    else:  # a gradient for every pair, as of a contrastive loss
        incoming = torch.linspace(-1, 1, scores.numel()).view(scores.shape)
        scores.backward(incoming)


def prepare(name: str, batch: int, captions: bool, hardest: bool):
    """Build one step in the process that measures its memory."""
    scorer = scorers(compile_too=name == "torch.compile")[name]
    images, texts = inputs(batch, captions)

    def call() -> list[torch.Tensor | None]:
        step(scorer, images, texts, hardest)
        gradients = [images.features.grad, texts.features.grad]
        images.features.grad = texts.features.grad = None  # or they would count as inputs
        return gradients

    return call


def measure(batch: int, captions: bool, args: argparse.Namespace) -> None:
    images, texts = inputs(batch, captions)
    chosen = scorers(args.compile)
    if args.only:
        chosen = {name: chosen[name] for name in ["pico_hf", *args.only]}
    calls = {"floor": lambda: floor(images, texts)}
    for name, scorer in chosen.items():
        calls[name] = lambda s=scorer: step(s, images, texts, hardest=False)
        calls[f"{name}, hardest"] = lambda s=scorer: step(s, images, texts, hardest=True)
    times = cpu_times(calls, args.rounds)
    real = texts.mask.float().mean() * WORDS
    print(f"\nB = {batch}, {real:.1f} real words of {WORDS} on average\n")
    print("| scorer | forward+backward | hardest negatives | pico_hf takes | peak MB |")
    print("|---|---|---|---|---|")
    for name in chosen:
        dense, hard = (ratio(times, n, "floor") for n in (name, f"{name}, hardest"))
        share = ratio(times, "pico_hf", name)
        peak = peak_megabytes(prepare, name, batch, captions, False)
        print(f"| {name} | {dense:.2f} | {hard:.2f} | {share:.2f} × | {peak:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--only", nargs="+", help="measure these scorers and pico_hf only")
    parser.add_argument("--lengths", choices=["full", "captions", "both"], default="both")
    args = parser.parse_args()
    for batch in args.batch:
        if args.lengths != "captions":
            measure(batch, False, args)
        if args.lengths != "full":
            measure(batch, True, args)


if __name__ == "__main__":
    main()
