"""`pico-hf evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Failed, Table
from pico_hf.cli.options import CaptionColumn, ImageColumn, Split

PANEL = "Models"


def command(
    model: Annotated[str, typer.Argument(help="Model: a folder or repository.")],
    pairs: Annotated[
        str | None, typer.Argument(help="Table of pairs, an imagefolder or a data set.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--mteb", metavar="TASK", help="Run this task of mteb instead; repeatable."),
    ] = None,
    split: Split = "test",
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    image_id_column: Annotated[
        str | None, typer.Option(help="Images of one value do not compete.")
    ] = None,
    gallery_column: Annotated[
        str | None, typer.Option(help="Images of one value are ranked among themselves.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 32,
) -> Answer:
    """Rank pairs that took no part in training: R@1, 5, 10 both ways, and their sum.

    pico-hf evaluate outputs/mine test.parquet

    Three rows: the encoder's own pooled cosine, its tokens with equal weights (w = 1), and the
    model as it is.
    """
    if (pairs is None) == (not tasks):
        raise Failed("Give either pairs to rank, or tasks by --mteb.")
    if tasks:
        return _mteb(model, tasks, batch_size)
    from pico_hf.cards.model_card import HEADINGS, METRICS
    from pico_hf.cli.sources import load_pairs
    from pico_hf.data.dataset import ImageTextDataset
    from pico_hf.retriever import PicoRetriever

    columns = {
        "image_column": image_column,
        "caption_column": caption_column,
        "image_id_column": image_id_column,
        "gallery_column": gallery_column,
        "max_samples": limit,
    }
    rows = ImageTextDataset(load_pairs(str(pairs), split, **columns))
    retriever = PicoRetriever.from_pretrained(model, batch_size=batch_size)
    results = compare(retriever, rows)
    shown = [(name, *(f"{own[each]:.1f}" for each in METRICS)) for name, own in results.items()]
    count = f"{len(rows)} images, {len(rows.captions())} captions"
    values = {
        "model": model,
        "images": len(rows),
        "captions": len(rows.captions()),
        "pooled_share": retriever.model.pooled_share,
        "results": results,
    }
    return Answer(values, [Table(("scored by", *(f"#{text}" for text in HEADINGS)), shown), count])


def compare(retriever: Any, rows: Any) -> dict[str, dict[str, float]]:
    """Metrics by the encoder's pooled cosine, by equal weights, and by the model as it is.

    Args:
        retriever: A `PicoRetriever`.
        rows: An `ImageTextDataset`.
    """
    from pico_hf.core.score_form import compared_forms
    from pico_hf.training.encoding import SplitEncoder, encoder_columns
    from pico_hf.training.evaluation import evaluate_retrieval

    model = retriever.model
    encoder = SplitEncoder(model, retriever.collate, batch_size=retriever.batch_size)
    split = encoder.split(rows, "Encoding", encoder_columns)
    forms = compared_forms(model.prototypes.form)
    return {name: evaluate_retrieval(model, split, form) for name, form in forms.items()}


def _mteb(model: str, names: list[str], batch_size: int) -> Answer:
    import mteb

    from pico_hf.mteb_model import PicoMteb  # says what to install

    try:
        tasks = mteb.get_tasks(tasks=names)
    except KeyError as error:
        raise Failed(f"mteb knows no such task: {error.args[0]}") from error
    found = mteb.evaluate(
        PicoMteb(model, name=_name(model)),
        tasks,
        encode_kwargs={"batch_size": batch_size},
        cache=None,
    )
    scores = {result.task_name: result.get_score() for result in found.task_results}
    metric = {task.metadata.name: task.metadata.main_score for task in tasks}
    rows = [(name, metric.get(name, ""), f"{score:.4f}") for name, score in scores.items()]
    values = {
        "model": model,
        "tasks": {n: {"score": s, "metric": metric.get(n)} for n, s in scores.items()},
    }
    return Answer(values, [Table(("task", "metric", "#score"), rows)])


def _name(model: str) -> str:
    """`owner/name` as mteb wants it."""
    from pico_hf.cards.redaction import is_hub_id, last_part

    return model if is_hub_id(model) and "/" in model else f"pico-hf/{last_part(model) or 'pico'}"
