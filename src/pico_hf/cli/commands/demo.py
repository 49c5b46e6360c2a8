"""`pico-hf demo`."""

from __future__ import annotations

import os
import threading
from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Failed, say

PANEL = "Search"


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="Model; default: the one of an index, else the embedded one."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder, table or index of images, also on a Qdrant server; default: the embedded "
            "drawings."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")
    ] = None,
    browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = False,
) -> Answer:
    """Search images on a page in the browser, and see why each was found.

    pico-hf demo outputs/aligned --images photos

    The page is served to this machine alone until ^C, and asks no other host for anything. Without
    arguments, in a checkout: the embedded drawings, with the model of `make demo`, which is trained
    first if it is not there.
    """
    from pico_hf.demo.serving import serve

    page = demo_page(model, images)
    address = serve(page, port, browser)
    say(f"the page is at {address} until ^C")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
    return Answer({"url": address})


def demo_page(
    model: str | os.PathLike | None = None, images: str | os.PathLike | None = None
) -> Any:
    """The page as `gradio.Blocks`, which `launch` serves.

    Args:
        model: A folder or repository; None: that of the index, else the embedded one.
        images: A folder or table of images, a data set, or an index; None: the embedded drawings.

    Raises:
        Failed: If there are no embedded ones and none are named.
        ImportError: If gradio or matplotlib is not installed.
    """
    import matplotlib  # noqa: F401  # heat maps need it: better said now than at the first click

    from pico_hf.cli.indexes import model_of
    from pico_hf.demo.finder import Finder, add_images
    from pico_hf.demo.library import gradio
    from pico_hf.demo.page import build_page
    from pico_hf.retriever import PicoRetriever
    from pico_hf.search.index import PicoIndex
    from pico_hf.search.qdrant_places import is_there, is_url

    gradio()  # what is missing is said before minutes of work
    source = _images(images)
    if is_url(source) or is_there(source):
        name = model_of(source, None if model is None else os.fspath(model))
        opened = PicoIndex.open(source, PicoRetriever.from_pretrained(name), verify=False)
        return build_page(Finder(opened))
    rows = _rows(source)
    retriever = PicoRetriever.from_pretrained(_model(model))
    index = PicoIndex.create(None, retriever)
    return build_page(Finder(index, add_images(index, rows)))


def _rows(source: str) -> Any:
    from pico_hf.cli.sources import image_rows
    from pico_hf.search.sources import images_of

    rows = image_rows(source)
    images_of(rows)  # a folder without images is refused before a model is loaded
    return rows


def _images(given: str | os.PathLike | None) -> str:
    from pico_hf.demo.embedded import embedded_images

    found = embedded_images() if given is None else given
    if found is None:
        raise Failed(
            "The embedded drawings are not here: they come with a checkout of pico_hf. Name your "
            "own images: pico-hf demo MODEL --images FOLDER"
        )
    return os.fspath(found)


def _model(given: str | os.PathLike | None) -> str:
    """The model that is named, or the embedded one, trained if need be."""
    from pico_hf.demo.embedded import embedded_images, embedded_model, train_embedded

    if given is not None:
        return os.fspath(given)
    if embedded_images() is None:
        raise Failed("Name a model: pico-hf demo MODEL --images FOLDER")
    if (found := embedded_model()) is None:
        say("the embedded model is not trained yet: training it, once, for some minutes.")
        train_embedded()
        found = embedded_model()
    return str(found)
