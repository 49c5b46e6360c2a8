"""The figure of an explanation: words over patches, patches over words, and the columns."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pico_hf.core.attribution import Attribution

_PER_LINE = 6  # panels side by side, of all blocks
_NAMED_COLUMNS = 5  # of which the numbers are told
_INK = "#1f6f8b"


@dataclass(frozen=True)
class Block:
    """One part of the figure.

    Attributes:
        title: What it shows.
        parts: Where the score comes from.
    """

    title: str
    parts: Attribution


def draw_blocks(
    blocks: Sequence[Block],
    words: Sequence[str],
    grid: tuple[int, int] | None,
    image: np.ndarray,
) -> Any:
    """Draws blocks side by side: maps of words over the image, products, and a bar per column.

    Args:
        blocks: At least one.
        words: Labels of the W words.
        grid: Rows and columns of the patches; None draws them as one row beside the image.
        image: (height, width, 3) in [0, 1].

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no global state, no display
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib, which is not installed: `pip install "pico-hf[plots]"`. The '
            "arrays of an explanation do not need it."
        ) from error
    per_line = _PER_LINE // len(blocks)
    lines = math.ceil((len(words) + 1) / per_line)
    heights = [1.9 * lines, 0.8 + 0.22 * len(words), 1.9]
    figure = Figure(figsize=(11, sum(heights) + 0.6), layout="constrained")
    parts: Any = figure.subfigures(1, len(blocks), squeeze=False)
    for part, block in zip(parts.flatten(), blocks, strict=True):
        part.suptitle(f"{block.title}: S = {block.parts.score:.3f}")
        maps, products, columns = part.subfigures(3, 1, height_ratios=heights)
        panels = maps.subplots(lines, per_line, squeeze=False).flatten()
        shown = _draw_word_maps(panels, block.parts, words, grid, image)
        label = "s[patch, word]" if grid else "s[query, word]"
        maps.colorbar(shown, ax=list(panels), label=label, shrink=0.8)
        _draw_products(products, block.parts, words)
        _draw_columns(columns, block.parts)
    return figure


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Writes a figure beside its place and renames it, so that no half-written file is ever there.

    Args:
        figure: A `matplotlib.figure.Figure`.
        path: The file; its folder is created if need be.

    Raises:
        ValueError: If matplotlib knows no format of that ending.
    """
    path = Path(path)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"`path` must end in one of {', '.join(f'.{name}' for name in sorted(known))}, got "
            f"'{path}'. Name the file with such an ending."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(partial, dpi=130)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw_word_maps(
    panels: Any,
    parts: Attribution,
    words: Sequence[str],
    grid: tuple[int, int] | None,
    image: np.ndarray,
) -> Any:
    """The image, and every word's similarity to its patches in one scale of colours."""
    products = parts.products.numpy()
    for panel in panels:
        panel.set_axis_off()
    panels[0].imshow(image)
    panels[0].set_title("as the tower saw it", fontsize=8)
    scale = {"vmin": products.min(), "vmax": products.max(), "cmap": "viridis"}
    height, width = image.shape[:2]
    for panel, word, similarity in zip(panels[1:], words, products.T, strict=False):
        if grid is None:
            shown = panel.imshow(similarity[None], aspect="auto", **scale)
        else:
            extent = (0, width, height, 0)
            panel.imshow(image, extent=extent)
            shown = panel.imshow(similarity.reshape(grid), extent=extent, alpha=0.6, **scale)
        panel.set_title(word, fontsize=8, parse_math=False)
    return shown


def _draw_products(figure: Any, parts: Attribution, words: Sequence[str]) -> None:
    """Every patch over the words; dots are the products that the score counts."""
    products, axes = parts.products.numpy(), figure.subplots()
    axes.imshow(products.T, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.plot(parts.best_patches, range(len(words)), "x", color="#d1495b", markersize=6)
    axes.plot(range(len(products)), parts.best_words, ".", color="white", markersize=3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yticks(range(len(words)), words, fontsize=7, parse_math=False)
    axes.set_xlabel("patch   (• best word of a patch, × best patch of a word)", fontsize=8)


def _draw_columns(figure: Any, parts: Attribution) -> None:
    """A bar per column, the largest first, and the numbers of the first ones."""
    values, axes = parts.columns.numpy(), figure.subplots()
    order = np.argsort(-values, kind="stable")
    axes.bar(range(len(values)), values[order], width=1.0, color=_INK)
    first = ", ".join(map(str, order[:_NAMED_COLUMNS]))
    axes.text(
        0.98,
        0.93,
        f"first columns: {first}",
        transform=axes.transAxes,
        fontsize=8,
        ha="right",
        va="top",
    )
    axes.axhline(0, color="black", linewidth=0.5)
    axes.margins(x=0.01, y=0.15)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("columns, sorted; their parts sum to S", fontsize=8)
    axes.set_ylabel("part of S", fontsize=8)
