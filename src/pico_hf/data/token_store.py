"""Token features on disk: rows of two memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from pico_hf.core.token_features import TokenFeatures

# Under which name a row gives the state of the token that the encoder pools.
POOLED_KEYS = {
    "image_hidden_states": "image_pooled_state",
    "text_hidden_states": "text_pooled_state",
}


class TokenStore(Dataset):
    """Rows of token features in memory-mapped arrays: all tokens in a row, and where rows end.

    Args:
        folder: Holds `tokens.f16`, the raw float16 values, and `ends.npy` (rows,) int64; and
            `pooled.f16` (rows, hidden) where one token of each row is what the encoder pools.
        key: Under which name a row gives its features, `"image_hidden_states"` or
            `"text_hidden_states"`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._ends = np.load(folder / "ends.npy", allow_pickle=False)
        flat = np.memmap(folder / "tokens.f16", dtype=np.float16, mode="r")
        self._tokens = flat.reshape(self._ends[-1], -1)  # (all tokens, hidden)
        self._pooled: np.ndarray | None = None
        if (pooled := folder / "pooled.f16").exists():
            self._pooled = np.memmap(pooled, dtype=np.float16, mode="r").reshape(len(self), -1)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Features (tokens, hidden) of one image or caption; special tokens are already gone.

        With the state (hidden,) of the token that the encoder pools, if it is one.
        """
        start = self._ends[row - 1] if row else 0
        found = {self.key: torch.from_numpy(np.array(self._tokens[start : self._ends[row]]))}
        if self._pooled is not None:
            found[POOLED_KEYS[self.key]] = torch.from_numpy(np.array(self._pooled[row]))
        return found

    @staticmethod
    def write(folder: Path, batches: Iterator[TokenFeatures]) -> None:
        """Writes real tokens batch by batch, so that memory holds one batch at a time."""
        folder.mkdir(parents=True)
        ends: list[int] = []
        pooled: list[np.ndarray] = []
        with (folder / "tokens.f16").open("wb") as file:
            for batch in batches:
                file.write(_half(batch.features[batch.mask]).tobytes())
                ends.extend(batch.mask.sum(dim=1).tolist())
                pooled += [] if batch.pooled is None else [_half(batch.pooled)]
        if pooled:
            (folder / "pooled.f16").write_bytes(np.concatenate(pooled).tobytes())
        np.save(folder / "ends.npy", np.cumsum(ends))


def _half(states: torch.Tensor) -> np.ndarray:
    """States in float16; ValueError if that cannot hold them."""
    half = states.to(torch.float16).cpu().numpy()
    if not np.isfinite(half).all():
        raise ValueError(
            "The tower's hidden states contain NaN, infinity or values beyond float16. Check the "
            "encoder's weights, or train without `freeze_encoder`."
        )
    return half
