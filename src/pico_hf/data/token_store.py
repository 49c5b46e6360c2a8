"""Token features on disk: rows of two memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from pico_hf.core.token_features import TokenFeatures


class TokenStore(Dataset):
    """Rows of token features in two memory-mapped arrays: all tokens in a row, and where rows end.

    Args:
        folder: Holds `tokens.f16`, the raw float16 values, and `ends.npy` (rows,) int64.
        key: Under which name a row gives its features, `"image_hidden_states"` or
            `"text_hidden_states"`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._ends = np.load(folder / "ends.npy", allow_pickle=False)
        flat = np.memmap(folder / "tokens.f16", dtype=np.float16, mode="r")
        self._tokens = flat.reshape(self._ends[-1], -1)  # (all tokens, hidden)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Features (tokens, hidden) of one image or caption; special tokens are already gone."""
        start = self._ends[row - 1] if row else 0
        return {self.key: torch.from_numpy(np.array(self._tokens[start : self._ends[row]]))}

    @staticmethod
    def write(folder: Path, batches: Iterator[TokenFeatures]) -> None:
        """Writes real tokens batch by batch, so that memory holds one batch at a time."""
        folder.mkdir(parents=True)
        ends: list[int] = []
        with (folder / "tokens.f16").open("wb") as file:
            for batch in batches:
                tokens = batch.features[batch.mask].to(torch.float16).cpu().numpy()
                if not np.isfinite(tokens).all():
                    raise ValueError(
                        "The tower's hidden states contain NaN, infinity or values beyond float16. "
                        "Check the encoder's weights, or train without `freeze_encoder`."
                    )
                file.write(tokens.tobytes())
                ends.extend(batch.mask.sum(dim=1).tolist())
        np.save(folder / "ends.npy", np.cumsum(ends))
