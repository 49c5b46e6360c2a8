"""Writes the model card of a run in Markdown, without anything private."""

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

from pico_hf.cards.plots import plot_feedback, plot_spectrum
from pico_hf.cards.redaction import (
    HIDDEN,
    dataset_id,
    is_hub_id,
    public_command,
    public_name,
    public_value,
)

METRICS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum")
HEADINGS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "rSum")
HOME_LABELS = ("homepage", "source", "source code", "repository")

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class ModelFacts:
    """What a model card shows.

    Local paths, tokens and passwords in any of these texts are removed before they are written.

    Attributes:
        name: Name of the model.
        results: Split → model → metrics, the published model last,
            `{"seen": {"encoder": {"rsum": …}, "base": {…}, "PICO": {…}}}`.
        column_weights: (D,) weights of the published model.
        semantic_probability: (D,) in [0, 1], from which the weights are computed.
        pooled_share: m in [0, 1], how much of the score the encoder's own pooled features are.
        refinements: What every proposal brought, as `logged_refinements` reads it from the log.
        arguments: Training arguments to show.
        command: The command that trained the model, empty if unknown.
        commit: Commit of the code that ran it, empty if unknown.
        base_model: Hub id or name of the wrapped encoder.
        dataset: Hub id or name of the training data.
        adapter: True for a LoRA adapter, which needs its base model.
    """

    name: str
    results: Results
    column_weights: Tensor
    semantic_probability: Tensor
    pooled_share: float = 0.0
    refinements: Sequence[Mapping[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    commit: str = ""
    base_model: str | None = None
    dataset: str | None = None
    adapter: bool = False


def models_of_metrics(
    metrics: Mapping[str, float], prefix: str = "", name: str = "PICO"
) -> dict[str, dict[str, float]]:
    """Takes an evaluation apart into model → metrics: the encoder's own cosine, and the model.

    Args:
        metrics: What `PicoTrainer.evaluate` gives, or an entry of its log.
        prefix: Of the names, with the underscore.
        name: What the model is called.

    Example:
        >>> models_of_metrics({"dev_rsum": 9.0, "dev_encoder_rsum": 8.0}, "dev_")
        {'encoder': {'rsum': 8.0}, 'PICO': {'rsum': 9.0}}
    """
    found = {
        model: {m: metrics[start + m] for m in METRICS if start + m in metrics}
        for model, start in (("encoder", f"{prefix}encoder_"), (name, prefix))
    }
    return {model: values for model, values in found.items() if values}


def comparison_table(results: Results) -> str:
    """Returns a Markdown table with one row per split and model, R@k in percent.

    Args:
        results: Split → model → metrics, as in [`ModelFacts`].

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
        facts: What the model card shows.

    Returns:
        Path of the model card.
    """
    facts = public_facts(facts)
    plots = find_spec("matplotlib") is not None  # an optional dependency
    if plots:
        plot_spectrum(facts.semantic_probability, folder / "plots" / "spectrum.png")
    if plots and facts.refinements:
        plot_feedback(facts.refinements, folder / "plots" / "feedback.png")
    template = files("pico_hf.cards").joinpath("model_card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _metadata(facts),
        template_str=template,
        **_weights(facts.column_weights.float()),
        name=facts.name,
        pooled_percent=round(100 * facts.pooled_share),
        table=comparison_table(facts.results),
        refinements=list(facts.refinements),
        arguments=facts.arguments,
        command=facts.command,
        commit=facts.commit,
        plots=plots,
        base=facts.base_model or "a vision-text dual encoder",
        dataset=facts.dataset or "image-text pairs",
        adapter=facts.adapter,
        named_base=_hub_base(facts) is not None,
        package=package_link(),
    )
    path = folder / "README.md"
    card.save(path)
    return path


def public_facts(facts: ModelFacts) -> ModelFacts:
    """Returns the facts with file names in place of local paths, without tokens and passwords."""
    arguments = {key: public_value(key, value) for key, value in facts.arguments.items()}
    return replace(
        facts,
        name=public_name(facts.name) or "PICO model",
        results=_named({split: _named(models) for split, models in facts.results.items()}),
        arguments={key: value for key, value in arguments.items() if value != HIDDEN},
        command=public_command(facts.command),
        commit=public_name(facts.commit) or "",
        base_model=public_name(facts.base_model),
        dataset=public_name(facts.dataset),
    )


def _named(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries under public names; a number tells equal names apart."""
    named: dict[str, Any] = {}
    for key, value in entries.items():
        name = first = (public_name(key) or "unnamed").replace("|", "/")
        while name in named:
            name = f"{first} ({len(named) + 1})"
        named[name] = value
    return named


def package_link() -> str:
    """Returns the package's name, with a link if its metadata give a home page.

    The home page is a `Project-URL` with one of HOME_LABELS, or else `Home-page`.
    """
    try:
        about = metadata("pico-hf")
    except PackageNotFoundError:
        return "pico_hf"
    entries = [entry.partition(",") for entry in about.get_all("Project-URL") or []]
    urls = {label.strip().lower(): url.strip() for label, _, url in entries}
    found = [urls[label] for label in HOME_LABELS if label in urls]
    found += about.get_all("Home-page") or []
    pages = [url for url in found if url.startswith(("https://", "http://"))]
    return f"[pico_hf]({pages[0]})" if pages else "pico_hf"


def _weights(weights: Tensor) -> dict[str, Any]:
    return {
        "weight_std": f"{float(weights.std(correction=0)):.3f}",
        "weight_min": f"{float(weights.min()):.3f}",
        "weight_max": f"{float(weights.max()):.3f}",
        "columns": len(weights),
    }


def _metadata(facts: ModelFacts) -> ModelCardData:
    dataset = dataset_id(facts.dataset)
    results = [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=dataset or "custom",
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
    base = _hub_base(facts)
    origin: dict[str, Any] = {"base_model": base} if base else {}
    if facts.adapter and origin:
        origin["base_model_relation"] = "adapter"
    return ModelCardData(
        model_name=facts.name,
        datasets=[dataset] if dataset else None,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=[*tags, "lora"] if facts.adapter else tags,
        **origin,
        license="apache-2.0",
        eval_results=results,
    )


def _hub_base(facts: ModelFacts) -> str | None:
    """The base model's id if it has the form `owner/name`, which a description never has."""
    base = facts.base_model
    return base if base and "/" in base and is_hub_id(base) else None
