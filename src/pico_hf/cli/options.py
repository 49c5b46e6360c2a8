"""Arguments and options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Storage(StrEnum):
    """How tokens are stored."""

    float16 = "float16"
    float32 = "float32"
    int8 = "int8"


# ---- models ------------------------------------------------------------------------------------

Base = Annotated[str | None, typer.Option(help="For an adapter that does not name its base.")]

# ---- rows --------------------------------------------------------------------------------------

Images = Annotated[
    str, typer.Argument(help="Folder of images, one image, a table of rows, or a data set.")
]
Split = Annotated[str, typer.Option(help="Of a named data set.")]
ImageColumn = Annotated[str | None, typer.Option(help="Default: found by its type.")]
CaptionColumn = Annotated[str | None, typer.Option(help="Default: found by its name.")]
IdColumn = Annotated[str | None, typer.Option(help="Default: an image is known by its content.")]
ImagesAtATime = Annotated[int, typer.Option(min=1, help="Images at a time.")]

# ---- an index ----------------------------------------------------------------------------------

Index = Annotated[
    str,
    typer.Argument(
        help="Folder of the index, or a collection on a Qdrant server: "
        "http://localhost:6333/photos."
    ),
]
Model = Annotated[str | None, typer.Option(help="Model; default: the one the index was made with.")]
NewStorage = Annotated[
    Storage | None, typer.Option("--storage", help="Of a new index; default: float16.")
]
TokenMerging = Annotated[
    int | None,
    typer.Option(min=1, max=16, help="Of a new index: 2 or 4 keeps a half or a quarter."),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")
]
