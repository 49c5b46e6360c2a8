"""Cost of the method itself: one refinement as a share of a training epoch, its parts apart.

Run: python benchmarks/refinement.py
The epoch is that of a frozen encoder with cached hidden states, the cheapest there is:
projections, scores, hardest-negative hinge, backward and optimizer step. Shares are medians of
interleaved rounds of one run. The trial on the dev split is left out: it is one more evaluation.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from measurement import ratio, tokens
from pico_hf.core.losses import LOSSES
from pico_hf.core.prototypes import StylePrototypes
from pico_hf.core.score_form import column_weights
from pico_hf.core.semantic import ColumnStatistics, column_statistics
from pico_hf.core.similarity import similarity
from pico_hf.core.style import StyleClusters
from pico_hf.core.token_features import TokenFeatures

WORDS, IMAGE_WIDTH, TEXT_WIDTH = 32, 1280, 384  # EfficientNet-Lite0 and MiniLM


class Heads(nn.Module):
    """Linear projections of cached hidden states into the common space."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.image = nn.Linear(IMAGE_WIDTH, columns, bias=False)
        self.text = nn.Linear(TEXT_WIDTH, columns, bias=False)

    def forward(self, batch: tuple[TokenFeatures, TokenFeatures]) -> list[TokenFeatures]:
        return [
            TokenFeatures(nn.functional.normalize(head(side.features), dim=-1), side.mask)
            for head, side in zip((self.image, self.text), batch, strict=True)
        ]


class Parts:
    """What an epoch and a refinement consist of, each as a call."""

    style = StyleClusters()

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.heads = Heads(args.columns)
        self.optimizer = torch.optim.AdamW(self.heads.parameters())
        self.batch = (
            tokens(args.batch, args.patches, IMAGE_WIDTH, seed=0),
            tokens(args.batch, WORDS, TEXT_WIDTH, seed=1, captions=True),
        )
        self.weights = column_weights(torch.linspace(0.1, 0.9, args.columns))
        self.prototypes = StylePrototypes(args.columns, args.prototypes, args.probe)
        self.pairs = self.encode()
        batches = [self.statistics() for _ in range(args.probe // args.batch)]
        self.probe = _with_noise(ColumnStatistics.concatenate(batches))
        self.refine()

    def step(self) -> None:
        self.optimizer.zero_grad()
        scores = similarity(*self.heads(self.batch), self.weights)
        LOSSES["hinge"](scores, None, margin=0.2, ramp=None).backward()
        self.optimizer.step()

    @torch.no_grad()
    def encode(self) -> list[TokenFeatures]:
        return self.heads(self.batch)

    def statistics(self) -> ColumnStatistics:
        return column_statistics(*self.pairs)

    def first_clustering(self) -> object:
        fresh = StylePrototypes(self.args.columns, self.args.prototypes, self.args.probe)
        return self.style.propose(fresh, self.probe)

    def clustering(self) -> object:
        return self.style.propose(self.prototypes, self.probe)

    def refine(self) -> None:
        """Commits the first prototypes, from which later ones start."""
        memory, (proposal,) = self.style.memory(self.prototypes), self.first_clustering()
        memory = memory.fused(proposal, 1.0, 0.0)
        form = self.style.form(self.prototypes, self.probe, proposal)
        self.prototypes.commit(form, **self.style.stored(memory))


def _with_noise(statistics: ColumnStatistics) -> ColumnStatistics:
    """The batches repeat one another; different columns make the clustering work as in life."""
    noise: list[Tensor] = [
        side + side.std() * torch.randn(side.shape, generator=torch.Generator().manual_seed(2))
        for side in (statistics.image_columns, statistics.text_columns)
    ]
    return ColumnStatistics(*noise, statistics.positive, statistics.total)


def wall_times(parts: Parts, rounds: int) -> dict[str, list[float]]:
    """Seconds per epoch or refinement: what is done per batch is scaled to all batches."""
    args = parts.args
    repeats = {
        "step": args.images / args.batch,
        "encode": args.probe / args.batch,
        "statistics": args.probe / args.batch,
        "clustering": 1,
        "first_clustering": 1,
    }
    times: dict[str, list[float]] = {name: [] for name in repeats}
    for round_ in range(rounds + 1):
        for name, repeat in repeats.items():
            start = time.perf_counter()
            getattr(parts, name)()
            if round_ > 0:  # the first warms up
                times[name].append(repeat * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6000, help="training images per epoch")
    parser.add_argument("--probe", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--patches", type=int, default=49)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--prototypes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = wall_times(Parts(args), args.rounds)
    refinement = [sum(part) for part in zip(times["statistics"], times["clustering"], strict=True)]
    times["statistics and clustering"] = refinement
    times["all with encoding"] = [
        sum(part) for part in zip(refinement, times["encode"], strict=True)
    ]
    print(f"{args.images} images, epoch {sorted(times['step'])[args.rounds // 2]:.1f} s\n")
    print("| part of a refinement | share of the epoch |\n|---|---|")
    for name in list(times)[1:]:
        print(f"| {name.replace('_', ' ')} | {100 * ratio(times, name, 'step'):.2f} % |")


if __name__ == "__main__":
    main()
