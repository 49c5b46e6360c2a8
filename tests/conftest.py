"""Shared set-up: no network, one thread, kernels without a GPU, and a bare bones trainer."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.setdefault("CUDA_VISIBLE_DEVICES", "") == "":
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for a GPU run on the CPU, step by step

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tiny import tiny_encoder, tiny_processor, tiny_rows
from tiny_trainer import TINY_RUN

if TYPE_CHECKING:
    from pico_hf.data.dataset import ImageTextDataset

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds features that another one, or the user, has cached."""
    monkeypatch.setenv("PICO_HF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def make_trainer(tmp_path: Path):
    """Builds a trainer on tiny pictures; two calls with equal arguments train alike."""

    def build(
        encoder: str = "clip",
        folder: str = "run",
        images: int = 32,
        dev: int | ImageTextDataset | None = 12,
        estimators: tuple[str, ...] = ("style",),
        model=None,
        callbacks=None,
        **knobs,
    ):
        from pico_hf import PicoModel, PicoTrainer, PicoTrainingArguments

        args = {"num_train_epochs": 3, "save_total_limit": 5, **TINY_RUN}
        torch.manual_seed(0)
        model = model or PicoModel.from_encoder(
            tiny_encoder(encoder),
            num_prototypes=3,
            probe_size=16,
            estimators=estimators,
            pooled_share=0.0,
        )
        return PicoTrainer(
            model,
            PicoTrainingArguments(output_dir=str(tmp_path / folder), **{**args, **knobs}),
            train_dataset=tiny_rows(images),
            eval_dataset=tiny_rows(dev) if isinstance(dev, int) else dev,
            processing_class=tiny_processor(encoder),
            callbacks=callbacks,
        )

    return build
