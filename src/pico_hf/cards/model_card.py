"""Writes a model card in Markdown from the facts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, metadata
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor

from pico_hf.cards.plots import plot_iterations, plot_spectrum
from pico_hf.cards.privacy import data_set_id, is_hub_id, public_command, public_name

METRICS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum")
HEADINGS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "rSum")


@dataclass(frozen=True)
class ModelFacts:
    """What a model card tells.

    Attributes:
        name: Name of the model.
        results: Split → model → metrics, `{"seen": {"base": {"rsum": …}, "PICO": {…}}}`.
        column_weights: (D,) weights of the published model.
        semantic_probability: (D,) what they come from.
        iterations: The trainer's log entries of refinements.
        arguments: Training arguments worth printing.
        command: The command that made the model.
        commit: Commit of the code that ran it, empty if unknown.
        base_model: Repository or name of the wrapped encoder.
        dataset: Name of the training data.
        adapter: True for a LoRA adapter, which needs its base.
    """

    name: str
    results: Mapping[str, Mapping[str, Mapping[str, float]]]
    column_weights: Tensor
    semantic_probability: Tensor
    iterations: Sequence[dict[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    commit: str = ""
    base_model: str | None = None
    dataset: str | None = None
    adapter: bool = False


def comparison_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown table: one row per split and model, R@k in percent.

    Args:
        results: See [`ModelFacts`].

    Example:
        >>> zero = dict.fromkeys(METRICS, 50.0)
        >>> print(comparison_table({"dev": {"base": zero}}).splitlines()[-1])
        | dev | base | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |
    """
    lines = [
        "| split | model | " + " | ".join(HEADINGS) + " |",
        "|---|---|" + "---:|" * len(METRICS),
    ]
    for split, models in results.items():
        for model, metrics in models.items():
            values = " | ".join(f"{metrics[name]:.1f}" for name in METRICS)
            lines.append(f"| {split} | {model} | {values} |")
    return "\n".join(lines)


def write_model_card(folder: Path, facts: ModelFacts) -> Path:
    """Writes README.md and its plots into a model folder.

    Args:
        folder: The saved model's folder.
        facts: What to tell.

    Returns:
        Path of the card.
    """
    facts = _public(facts)
    plots = find_spec("matplotlib") is not None  # an extra: a card without it has no plots
    if plots:
        plot_spectrum(facts.semantic_probability, folder / "plots" / "spectrum.png")
    if plots and facts.iterations:
        plot_iterations(facts.iterations, folder / "plots" / "iterations.png")
    weights = facts.column_weights.float()
    template = files("pico_hf.cards").joinpath("model_card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _metadata(facts),
        template_str=template,
        name=facts.name,
        table=comparison_table(facts.results),
        weight_std=f"{float(weights.std(correction=0)):.3f}",
        weight_min=f"{float(weights.min()):.3f}",
        weight_max=f"{float(weights.max()):.3f}",
        columns=len(weights),
        iterations=list(facts.iterations),
        arguments=dict(facts.arguments),
        command=facts.command,
        commit=facts.commit,
        plots=plots,
        base=facts.base_model or "a vision-text dual encoder",
        dataset=facts.dataset or "image-text pairs",
        adapter=facts.adapter,
        named_base=_is_repository(facts.base_model),
        package=_package_link(),
    )
    path = folder / "README.md"
    card.save(path)
    return path


def _public(facts: ModelFacts) -> ModelFacts:
    """The facts without paths of a machine and without secrets."""
    return replace(
        facts,
        name=public_name(facts.name),
        command=public_command(facts.command),
        base_model=facts.base_model and public_name(facts.base_model),
        dataset=facts.dataset and public_name(facts.dataset),
        arguments={
            name: public_name(value) if isinstance(value, str) else value
            for name, value in facts.arguments.items()
        },
    )


def _package_link() -> str:
    """The package's name, as a link if its metadata name a home page."""
    try:
        about = metadata("pico-hf")
    except PackageNotFoundError:  # a source folder
        return "pico_hf"
    pages = [*(about.get_all("Home-page") or []), *(about.get_all("Project-URL") or [])]
    page = next((page.rpartition(",")[2].strip() for page in pages if page), None)
    return f"[pico_hf]({page})" if page else "pico_hf"


def _metadata(facts: ModelFacts) -> ModelCardData:
    data_set = facts.dataset and data_set_id(facts.dataset)
    results = [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=data_set or "custom",
            dataset_name=f"{facts.dataset or 'custom'} ({split})",
            dataset_split=split,
            metric_type=metric,
            metric_name=heading,
            metric_value=round(list(models.values())[-1][metric], 2),
        )
        for split, models in facts.results.items()
        for metric, heading in (("i2t_r1", "i2t R@1"), ("t2i_r1", "t2i R@1"), ("rsum", "rSum"))
    ]
    tags = ["pico", "image-text-retrieval", "late-interaction"]
    origin: dict[str, Any] = (
        {"base_model": facts.base_model} if _is_repository(facts.base_model) else {}
    )
    if facts.adapter and origin:
        origin["base_model_relation"] = "adapter"
    return ModelCardData(
        model_name=facts.name,
        datasets=data_set and [data_set],
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=[*tags, "lora"] if facts.adapter else tags,
        **origin,
        license="apache-2.0",
        eval_results=results,
    )


def _is_repository(name: str | None) -> bool:
    """True for `owner/name`: neither a description nor a folder of somebody's machine."""
    return bool(name and "/" in name and is_hub_id(name) and not Path(name).exists())
