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
        self._pooled: np.ndarray | None = None
        try:
            self._ends = _ends(folder / "ends.npy")
            self._tokens = _matrix(folder / "tokens.f16", int(self._ends[-1]))
            if (pooled := folder / "pooled.f16").exists():
                self._pooled = _matrix(pooled, len(self))
        except Exception as error:  # whatever numpy makes of a damaged file
            raise self._damaged(f"{type(error).__name__}: {error}") from error

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Features (tokens, hidden) of one image or caption, of what takes part in its score.

        With the state (hidden,) of the token that the encoder pools, if it is one.
        """
        start = self._ends[row - 1] if row else 0
        found = {self.key: np.array(self._tokens[start : self._ends[row]])}
        if self._pooled is not None:
            found[POOLED_KEYS[self.key]] = np.array(self._pooled[row])
        if not all(map(_finite, found.values())):
            raise self._damaged(f"row {row} has values that are not finite")
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def _damaged(self, reason: str) -> ValueError:
        line = " ".join(reason.split())[:300]
        return ValueError(
            f"The cached features in '{self.folder}' are damaged ({line}). Delete them with "
            "`pico-hf cache --clear`; they are computed again when they are needed."
        )

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


def _ends(path: Path) -> np.ndarray:
    """(rows,) int64, where each row's tokens end."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
        if kind != np.int64 or len(shape) != 1 or shape[0] * 8 != path.stat().st_size - file.tell():
            raise ValueError(f"ends.npy is of shape {shape} and type {kind}")
    ends = np.load(path, allow_pickle=False)
    if not len(ends) or int(np.diff(ends, prepend=0).min()) < 1:
        raise ValueError("a row has no tokens")
    return ends


def _matrix(path: Path, rows: int) -> np.ndarray:
    """(rows, hidden) float16 of a file, mapped into memory."""
    return np.memmap(path, dtype=np.float16, mode="r").reshape(rows, -1)


def _finite(values: np.ndarray) -> bool:
    """Whether float16 has neither NaN nor infinity: such numbers have all bits of the exponent."""
    bits = values.view(np.uint16)
    return bool((bits & np.uint16(0x7C00)).max(initial=0) < 0x7C00)


def _half(states: torch.Tensor) -> np.ndarray:
    """States in float16; ValueError if that cannot hold them."""
    half = states.to(torch.float16).cpu().numpy()
    if not np.isfinite(half).all():
        raise ValueError(
            "The tower's hidden states contain NaN, infinity or values beyond float16. Check the "
            "encoder's weights, or train without `freeze_encoder`."
        )
    return half
