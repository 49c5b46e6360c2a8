"""The two plots of a model card: semantic probability of the columns, and feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


def final_shares(fused_weights: Sequence[float]) -> list[float]:
    """Computes the weight of each proposal in the end: η_n · Π_{m>n} (1 - η_m).

    Args:
        fused_weights: η_n in [0, 1] of every proposal, in order.

    Example:
        >>> final_shares([1.0, 0.5])
        [0.5, 0.5]
    """
    shares: list[float] = []
    for share in fused_weights:
        shares = [earlier * (1 - share) for earlier in shares] + [share]
    return shares


def plot_spectrum(probability: Tensor, path: Path) -> None:
    """Draws the semantic probability p of all columns, sorted.

    Args:
        probability: (D,) semantic probability in [0, 1].
        path: PNG file to write.
    """
    _save(spectrum_figure(probability), path)


def spectrum_figure(probability: Tensor) -> Any:
    """The figure of `plot_spectrum`.

    Args:
        probability: (D,) semantic probability in [0, 1].
    """
    figure, (axes,) = _figure()
    values = probability.detach().float().cpu().sort(descending=True).values
    axes.plot(range(1, len(values) + 1), values, color="#1f6f8b", linewidth=2)
    axes.fill_between(range(1, len(values) + 1), values, color="#1f6f8b", alpha=0.15)
    axes.set(
        xlabel="columns, sorted",
        ylabel="semantic probability",
        ylim=(0, 1.02),
        title="Semantic probability of the columns",
    )
    return figure


def plot_feedback(refinements: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws Δ and the final weight of every proposal, one panel per source.

    Args:
        refinements: From `logged_refinements`, in order.
        path: PNG file to write.
    """
    sources = list(dict.fromkeys(entry["source"] for entry in refinements))
    figure, panels = _figure(len(sources))
    for source, axes in zip(sources, panels, strict=True):
        entries = [entry for entry in refinements if entry["source"] == source]
        numbers = range(1, len(entries) + 1)
        shares = final_shares([entry["fused_weight"] for entry in entries])
        axes.bar(numbers, shares, color="#1f6f8b", alpha=0.8)
        axes.set(xlabel=f"{source} proposal", ylabel="final weight", ylim=(0, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        gains = axes.twinx()
        gains.plot(numbers, [entry["feedback"] for entry in entries], "o-", color="#d1495b")
        gains.axhline(0, color="#d1495b", linewidth=0.6, linestyle=":")
        gains.set_ylabel("Δ dev rSum (points)", color="#d1495b")
    figure.suptitle("Final weight and gain of every proposal")
    _save(figure, path)


def _figure(panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(6.4 if panels == 1 else 4.6 * panels, 3.6), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
