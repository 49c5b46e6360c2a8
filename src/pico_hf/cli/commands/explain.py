"""`pico-hf explain`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Table, say_if_cut
from pico_hf.cli.options import Base

PANEL = "Search"


def command(
    model: Annotated[str, typer.Argument(help="Model: a folder or repository.")],
    image: Annotated[str, typer.Argument(help="File of the image.")],
    caption: Annotated[str, typer.Argument(help="The text, in quotes.")],
    output: Annotated[
        str, typer.Option(help="File of the figure: .png, .pdf or .svg.")
    ] = "explanation.png",
    columns: Annotated[
        int, typer.Option(min=0, help="How many of the columns that carry most are listed.")
    ] = 10,
    processor: Annotated[
        str | None, typer.Option(help="Folder or repository, if the model's has none.")
    ] = None,
    base: Base = None,
) -> Answer:
    """Draw why an image and a caption match: heat maps, and what carried the score.

    pico-hf explain outputs/aligned photo.jpg "a dog on a beach" --output why.png

    Parts of the words, of all patches together and of the pooled features sum to the score; so do
    the parts of all columns.
    """
    from pico_hf.data.collator import PicoCollator
    from pico_hf.explanation import explain
    from pico_hf.model_and_processor import model_and_processor

    network, own = model_and_processor(model, processor, base=base)
    explanation = explain(network, own, image, caption)
    say_if_cut(caption, PicoCollator(own, config=network.config).max_length)
    explanation.save(output)
    parts = explanation.weighted
    words = list(zip(explanation.words, parts.words.tolist(), strict=True))
    patches, pooled = float(parts.patches.sum()), float(parts.pooled)
    lines: list[tuple[Any, ...]] = [(word, f"{part:.4f}") for word, part in words]
    lines.append(("all patches", f"{patches:.4f}"))
    if pooled:
        lines.append(("image and caption as a whole", f"{pooled:.4f}"))
    lines.append(("score", f"{explanation.score:.4f}"))
    best = parts.columns.argsort(descending=True)[:columns].tolist()
    carried = [
        (column, float(parts.columns[column]), float(explanation.column_weights[column]))
        for column in best
    ]
    values = {
        "score": explanation.score,
        "words": [{"word": word, "part": part} for word, part in words],
        "patches": patches,
        "pooled": pooled,
        "columns": [{"column": c, "part": part, "weight": w} for c, part, w in carried],
        "figure": output,
    }
    shown: list[Any] = [Table(("part of the score", "#"), lines)]
    if carried:
        rows = [(column, f"{part:.4f}", f"{weight:.2f}") for column, part, weight in carried]
        shown.append(Table(("#column", "#part of the score", "#weight"), rows))
    return Answer(values, [*shown, f"Drawn in {output}"])
