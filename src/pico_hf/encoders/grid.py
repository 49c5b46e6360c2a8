"""Which grid the patches of an image form, for maps over the image."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.encoders.spec import TokenMap, tower_config
from pico_hf.encoders.table import encoder_spec


def patch_grid(
    encoder: PreTrainedModel, inputs: Mapping[str, Tensor], patches: int
) -> tuple[int, int] | None:
    """Rows and columns of the patches of one image, which are in order row by row.

    Args:
        encoder: The dual encoder.
        inputs: What it takes of that one image: `pixel_values` (1, channels, height, width), or
            those of a NaFlex tower with its `spatial_shapes`.
        patches: Real patches of the image.

    Returns:
        None if the tokens are no cells of a grid (queries, groups), or if no grid that the tower's
        config or row tells of has as many cells.
    """
    row = encoder_spec(encoder).image
    if row.grid is False:
        return None
    if "spatial_shapes" in inputs:
        sides = inputs["spatial_shapes"][0].tolist()
        candidates = [(int(sides[0]), int(sides[1]))]
    elif inputs["pixel_values"].ndim != 4:
        candidates = []
    else:
        height, width = inputs["pixel_values"].shape[-2:]
        candidates = _by_patch_size(encoder, row, height, width)
        if row.grid:
            candidates.append(_by_proportions(height, width, patches))
    return next((grid for grid in candidates if grid[0] * grid[1] == patches), None)


def _by_patch_size(
    encoder: PreTrainedModel, row: TokenMap, height: int, width: int
) -> list[tuple[int, int]]:
    """Patches of the size that the config names, and those merged two by two at every stage."""
    config = tower_config(encoder, row, "vision")
    size = getattr(config, "patch_size", None)
    if size is None:
        return []
    high, wide = (size, size) if isinstance(size, int) else size
    grids = [(height // high, width // wide)]
    rows, columns = math.ceil(height / high), math.ceil(width / wide)
    for _ in getattr(config, "depths", None) or ():
        grids.append((rows, columns))
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    return grids


def _by_proportions(height: int, width: int, patches: int) -> tuple[int, int]:
    """The grid of square cells that has so many of them; its product differs if there is none."""
    rows = round(math.sqrt(patches * height / width))
    columns = round(math.sqrt(patches * width / height))
    return (rows, columns) if rows * width == columns * height else (0, 0)
