"""Embeds a folder with the processes that torchrun has started; run by test_bulk.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pico_hf import PicoRetriever
from pico_hf.search.bulk import embed
from tiny import tiny_processor, tiny_refined


def main(photos: str, folder: str, message: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tool = PicoRetriever(tiny_refined(), tiny_processor(), batch_size=4, show_progress=False)
    try:
        report = embed(photos, folder, tool, dtype="float32", commit_images=3, show_progress=False)
        copies = report.duplicates + report.updated  # which of both is a matter of time
        text = f"{report.added} {report.unchanged} {copies} {len(report.skipped)}"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    Path(f"{message}-{dist.get_rank()}").write_text(text)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
