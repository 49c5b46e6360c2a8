"""How the benchmarks measure: interleaved rounds of one thread's CPU time, peak memory, inputs."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pico_hf.core.token_features import TokenFeatures

# WordPiece lengths of the 5,000 captions of Flickr8k's validation images, from 2 words on.
CAPTION_LENGTHS = (1, 1, 18, 57, 121, 268, 367, 447, 494, 546, 467, 486, 378, 336, 258, 221, 139,
                   118, 73, 54, 49, 24, 19, 18, 17, 6, 5, 3, 1, 4, 2, 0, 2)  # fmt: skip


def tokens(items: int, length: int, width: int, seed: int, captions: bool = False) -> TokenFeatures:
    """Random normalised tokens; with `captions`, as many real ones as captions have words."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(items, length, width, generator=generator)
    features = torch.nn.functional.normalize(features, dim=-1)
    lengths = torch.full((items,), length)
    if captions:
        shares = torch.tensor(CAPTION_LENGTHS, dtype=torch.float)
        drawn = torch.multinomial(shares, items, replacement=True, generator=generator) + 2
        lengths = drawn.clamp(max=length)
    return TokenFeatures(features, torch.arange(length) < lengths.unsqueeze(1))


def floor(images: TokenFeatures, texts: TokenFeatures) -> None:
    """Multiply all real words with all patches and do nothing else: the least work there is.

    Two images at a time, which is faster than one product of everything.
    """
    words = texts.features.detach()[texts.mask]
    features = images.features.detach()
    for first in range(0, len(features), 2):
        words @ features[first : first + 2].flatten(0, 1).T


def cpu_times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time per call and round; every round runs all calls, one after the other.

    On a shared machine only calls of the same round are comparable, and CPU time of one thread
    counts less of what others do than wall time.
    """
    torch.set_num_threads(1)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """Median over rounds of the time of `name` over that of `to`."""
    pairs = zip(times[name], times[to], strict=True)
    return statistics.median(one / other for one, other in pairs)


def peak_megabytes(prepare: Callable[..., Callable[[], object]], *args: object) -> float:
    """Peak memory of one call above what was resident before it, in a process of its own.

    `prepare(*args)` builds the inputs and returns the call; results count, inputs do not.
    Linux only: elsewhere NaN.
    """
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (prepare, args))


def _peak(prepare: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> float:
    torch.set_num_threads(1)
    call = prepare(*args)
    call()  # libraries allocate their own buffers once
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
