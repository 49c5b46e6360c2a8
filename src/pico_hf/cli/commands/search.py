"""`pico-hf search`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Failed, Table, say_if_cut
from pico_hf.cli.options import Index

PANEL = "Search"
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Reading(StrEnum):
    """What a query is."""

    auto = "auto"
    text = "text"
    image = "image"


class Scan(StrEnum):
    """Which images are scored exactly."""

    auto = "auto"
    exact = "exact"
    stages = "stages"


def command(
    index: Index,
    queries: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY...", help="Texts in quotes, or files of images."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Images per query.")] = 10,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="FIELD=VALUE",
            help="Only such images; several values of one field: any of them.",
        ),
    ] = None,
    depth: Annotated[
        int, typer.Option(min=1, help="Images that are scored exactly after the first stage.")
    ] = 100,
    scan: Annotated[
        Scan, typer.Option(help="Exact: score all; stages: the best by one vector; auto: by size.")
    ] = Scan.auto,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write a page with thumbnails.")
    ] = None,
    queries_file: Annotated[
        str | None, typer.Option("--queries", metavar="FILE", help="A text file, a query per line.")
    ] = None,
    reading: Annotated[
        Reading,
        typer.Option("--as", help="What queries are; auto: a file that is there or a text."),
    ] = Reading.auto,
    model: Annotated[
        str | None,
        typer.Option(help="Another model that encodes images alike, such as an aligned one."),
    ] = None,
) -> Answer:
    """Find the images of an index that match a text or an image.

    pico-hf search photos.index "a dog on a beach" --html found.html
    """
    from pico_hf.cli.indexes import model_of
    from pico_hf.data.image_files import short
    from pico_hf.retriever import PicoRetriever
    from pico_hf.search.index import PicoIndex

    if html is not None and os.path.exists(html) and not os.path.isfile(html):
        raise Failed(f"`--html` must be a file, got {html!r}, which is a folder or a device.")
    asked = [*(queries or []), *_lines(queries_file)]
    if not asked:
        raise Failed("Give a query: a text in quotes or a file of an image.")
    items = [_query(text, reading) for text in asked]
    chosen = parse_filters(filters or [])
    retriever = PicoRetriever.from_pretrained(model_of(index, model))
    opened = PicoIndex.open(index, retriever, verify=False)
    exact = {Scan.auto: None, Scan.exact: True, Scan.stages: False}[scan]
    options = {"top_k": top_k, "filter": chosen or None, "depth": depth, "exact": exact}
    results, facts = [], []
    for text, item in zip(asked, items, strict=True):
        hits, seconds = _timed(opened, item, options)
        results.append((text, hits))
        facts.append(
            {"query": text, "hits": [_fact(*one) for one in enumerate(hits, 1)], **seconds}
        )
    if html is not None:
        from pico_hf.cli.html_page import write_page

        write_page(html, results)
    shown: list[str | Table] = []
    for text, hits in results:
        shown += [short(text)] if len(results) > 1 else []
        rows = [(n, f"{hit.score:.4f}", hit.path or hit.id) for n, hit in enumerate(hits, 1)]
        shown.append(
            Table(("#", "#score", "image"), rows) if rows else "no image passes the filter"
        )
    shown += [f"Page with thumbnails: {html}"] if html else []
    return Answer({"index": index, "images": len(opened), "results": facts, "html": html}, shown)


def _timed(opened: Any, query: Any, options: dict[str, Any]) -> tuple[list[Any], dict[str, float]]:
    """The hits of one query, and seconds of its encoding and of the search after it."""
    retriever = opened.retriever
    if isinstance(query, str):
        say_if_cut(query, retriever.collate.max_length)
    start = time.perf_counter()
    encode = retriever.encode_texts if isinstance(query, str) else retriever.encode_images
    features = encode([query])
    encoded = time.perf_counter()
    hits = opened.search(features, **options)[0]
    end = time.perf_counter()
    return hits, {"encode_seconds": encoded - start, "search_seconds": end - encoded}


def _fact(place: int, hit: Any) -> dict[str, Any]:
    return {
        "rank": place,
        "id": hit.id,
        "score": hit.score,
        "path": hit.path,
        "payload": hit.payload,
    }


def _lines(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Failed(
            f"`--queries` must be a text file in UTF-8, got {file!r} ({error})."
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _query(text: str, reading: Reading) -> str | Path:
    """A text, or the path of an image."""
    if not text.strip():
        raise Failed("A query must have at least one word, got an empty one.")
    named = reading is Reading.auto and len(text) < 4096 and Path(text).suffix.lower() in _IMAGES
    if reading is Reading.image or (reading is Reading.auto and len(text) < 255 and _file(text)):
        return Path(text)
    if named and " " not in text:
        raise Failed(
            f"{text!r} reads like the file of an image, and there is none. Correct the path, or "
            "search for it as a text by --as text."
        )
    return text


def _file(text: str) -> bool:
    return "\0" not in text and os.path.isfile(text)


def parse_filters(given: Sequence[str]) -> dict[str, list[Any]]:
    """`FIELD=VALUE` of the command line: a value is a text, and what JSON reads in it.

    Raises:
        Failed: If there is no `=`.

    Example:
        >>> parse_filters(["year=2024", "album=pets", "album=zoo"])
        {'year': ['2024', 2024], 'album': ['pets', 'zoo']}
    """
    found: dict[str, list[Any]] = {}
    for text in given:
        field, equals, value = text.partition("=")
        if not equals or not field.strip():
            raise Failed(f"`--filter` must be FIELD=VALUE, got {text!r}.")
        values = found.setdefault(field.strip(), [])
        values.append(value)
        try:
            values.append(json.loads(value))
        except ValueError:
            continue
    return found
