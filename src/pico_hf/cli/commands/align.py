"""`pico-hf align`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Failed, Table
from pico_hf.cli.options import CaptionColumn, ImageColumn

PANEL = "Models"
FEEDBACK_FROM = 64  # images; feedback from fewer is noise
DEV_SHARE = 0.25


def command(
    model: Annotated[str, typer.Argument(help="Dual encoder or Pico model: folder or repository.")],
    pairs: Annotated[str, typer.Argument(help="Table of pairs, an imagefolder or a data set.")],
    output: Annotated[str, typer.Option(help="New folder of the aligned model.")],
    dev: Annotated[
        str | None, typer.Option(help="Pairs for feedback; default: a quarter of 64 or more.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Other pairs, scored before and after.")] = None,
    pooled_share: Annotated[
        float | None,
        typer.Option(help="Share of the score that the pooled features begin with; CLIP: 1."),
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs at a time.")] = 16,
) -> Answer:
    """Find columns that images and texts share in a few pairs of yours; nothing is trained.

    pico-hf align openai/clip-vit-base-patch32 pairs.csv --output outputs/aligned
    """
    from pico_hf.cli.sources import load_pairs
    from pico_hf.hub.new_folder import check_new, new_folder
    from pico_hf.retriever import PicoRetriever
    from pico_hf.training.job_sources import hold_out

    check_new(output)
    columns = {"image_column": image_column, "caption_column": caption_column}
    rows = load_pairs(pairs, **columns)
    if len(rows) < 2:
        raise Failed(f"`pairs` must hold at least 2 images, got {len(rows)}.")
    feedback = load_pairs(dev, "validation", **columns) if dev else None
    if feedback is None and len(rows) >= FEEDBACK_FROM:
        rows, feedback = hold_out(rows, DEV_SHARE)
    tested = load_pairs(test, "test", **columns) if test else None
    retriever = PicoRetriever.from_pretrained(model)
    if pooled_share is not None:
        retriever.model.prototypes.share_score(pooled_share)
    with new_folder(output) as folder:
        trainer = _trainer(retriever, str(folder), rows, feedback, min(batch_size, len(rows)))
        before = None if tested is None else trainer.evaluate(tested)["eval_rsum"]
        trainer.construct_prototypes()
        after = None if tested is None else trainer.evaluate(tested)["eval_rsum"]
        trainer.save_model()
        trainer.create_model_card()
    aligned = trainer.pico_model
    weights = aligned.column_weights
    values = {
        "output": output,
        "images": len(rows),
        "dev_images": 0 if feedback is None else len(feedback),
        "weight_std": float(weights.std(correction=0)),
        "pooled_share": aligned.pooled_share,
        "rsum_before": before,
        "rsum_after": after,
    }
    shown: list[Any] = [
        f"Aligned by {values['images']} images; {_feedback(values['dev_images'])}. Column weights "
        f"spread by {values['weight_std']:.3f}; pooled features give {aligned.pooled_share:.0%} of "
        f"the score. Written to {output}"
    ]
    if tested is not None:
        rows_shown = [("before", f"{before:.1f}"), ("after", f"{after:.1f}")]
        shown.insert(0, Table(("rSum on the test pairs", "#"), rows_shown))
    return Answer(values, shown)


def _feedback(images: int) -> str:
    if images:
        return f"{images} more gave feedback"
    return f"without feedback, which takes {FEEDBACK_FROM} or more, or --dev"


def _trainer(retriever: Any, folder: str, rows: Any, feedback: Any, batch_size: int) -> Any:
    from pico_hf.training.trainer import PicoTrainer
    from pico_hf.training_args import PicoTrainingArguments

    silent = (
        {}
        if feedback is not None
        else {
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
        }
    )
    args = PicoTrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch_size, report_to="none", **silent
    )
    return PicoTrainer(
        retriever.model,
        args,
        train_dataset=rows,
        eval_dataset=feedback,
        processing_class=retriever.processor,
    )
