"""The demo page: a gradio application, without an address outside itself."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pico_hf.data.image_files import short
from pico_hf.demo.library import gradio

SIDE = 320  # pixels of a thumbnail
INTRODUCTION = """# Search images, and see why
Type words or drop an image, then click a found image to see which patch met which word."""
LABELS = {"pooled cosine": "encoder", "base, w = 1": "base, w = 1", "PICO": "PICO"}
SCORINGS = "The encoder's own cosine, its tokens with equal column weights, or the model as it is."
EXPLAINED = """**{score:.3f}** for “{caption}”: how much each patch is like each word (maps), which
pairs of them count (strip), and what every column of the embedding adds (bars)."""


@dataclass
class Found:
    """The last search of a visitor.

    Attributes:
        query: A text, or the path of an image; None before the first search.
        scoring: How it was scored.
        ids: Of the found images, best first.
    """

    query: Any = None
    scoring: str = ""
    ids: list[str] = field(default_factory=list)


def build_page(finder: Any) -> Any:
    """The page over an index.

    Args:
        finder: The `Finder` that it asks.

    Returns:
        `gradio.Blocks`, which `launch` serves; see `pico_hf.demo.serving`.

    Raises:
        ImportError: If gradio is not installed.
    """
    gr = gradio()
    actions = _Actions(finder, gr)
    with gr.Blocks(title="pico_hf", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        found = gr.State(Found())
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                words, picture, button, scoring, filters = _inputs(gr, finder)
            with gr.Column(scale=4):
                status, gallery, why, maps = _outputs(gr, len(finder))
        shown = [found, gallery, status, maps, why]
        one = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
        settings = [scoring, filters]
        for event in (words.submit, button.click):
            event(actions.by_words, [words, *settings], shown, **one)
        picture.upload(actions.by_image, [picture, *settings], shown, **one)
        for event in (scoring.input, filters.input):
            event(actions.again, [found, *settings], shown, **one)

        def explain(found: Found, words: str, place: Any) -> tuple[Any, str]:
            return actions.explain(found, words, place.index)

        # By this type gradio knows where to put what was clicked.
        explain.__annotations__["place"] = gr.SelectData
        gallery.select(explain, [found, words], [maps, why], **one)
    return page


def _inputs(gr: Any, finder: Any) -> tuple[Any, ...]:
    words = gr.Textbox(label="Words", placeholder="a dog on a beach", max_lines=3, elem_id="words")
    button = gr.Button("Search", variant="primary", elem_id="search")
    picture = gr.Image(
        label="or an image",
        type="filepath",
        sources=["upload", "clipboard"],
        height=170,
        elem_id="picture",
    )
    scoring = gr.Radio(
        [(LABELS[name], name) for name in finder.scorings],
        value=finder.scorings[-1],
        label="Scored by",
        info=SCORINGS,
        elem_id="scoring",
    )
    filters = gr.Dropdown(
        finder.filters,
        multiselect=True,
        label="Only",
        info="Such images; several values of one field: any of them.",
        visible=bool(finder.filters),
        elem_id="filters",
    )
    return words, picture, button, scoring, filters


def _outputs(gr: Any, count: int) -> tuple[Any, ...]:
    status = gr.Markdown(f"{count} images", elem_id="status")
    gallery = gr.Gallery(
        show_label=False,
        columns=6,
        object_fit="contain",
        allow_preview=False,
        buttons=[],
        interactive=False,
        elem_id="found",
    )
    why = gr.Markdown(elem_id="why")
    maps = gr.Image(
        show_label=False,
        buttons=[],
        interactive=False,
        visible=False,
        format="png",
        elem_id="maps",
    )
    return status, gallery, why, maps


class _Actions:
    """What happens on the page; every problem is a line on it."""

    def __init__(self, finder: Any, gr: Any) -> None:
        self.finder, self.gr = finder, gr

    def by_words(self, words: str, scoring: str, filters: list[str] | None) -> tuple[Any, ...]:
        """Searches with words."""
        return self._search(words or "", scoring, filters)

    def by_image(self, path: str, scoring: str, filters: list[str] | None) -> tuple[Any, ...]:
        """Searches with an image."""
        return self._search(Path(path), scoring, filters)

    def again(self, found: Found, scoring: str, filters: list[str] | None) -> tuple[Any, ...]:
        """The last search, scored or filtered in another way."""
        if found.query is None:
            return tuple(self.gr.skip() for _ in range(5))
        return self._search(found.query, scoring, filters)

    def _search(self, query: Any, scoring: str, filters: list[str] | None) -> tuple[Any, ...]:
        try:
            hits = self.finder.search(query, scoring, filters or ())
        except (ValueError, OSError) as error:
            raise self.gr.Error(str(error), print_exception=False) from error
        items = [(self._thumbnail(hit.id), f"{hit.score:.3f} · {_label(hit)}") for hit in hits]
        asked = f"“{_plain(query)}”" if isinstance(query, str) else "the image"
        status = f"The best {len(hits)} of {len(self.finder)} images for {asked}, scored by "
        status += LABELS[scoring] + (f", only {_plain('; '.join(filters))}" if filters else "")
        if not hits:
            status = "No image passes the filter."
        found = Found(query, scoring, [hit.id for hit in hits])
        return found, items, status, self._maps(None), ""

    def _maps(self, picture: Any) -> Any:
        """Heat maps, or no place for them."""
        return self.gr.Image(picture, visible=picture is not None)

    def _thumbnail(self, key: str) -> Image.Image:
        """A small picture; an empty one where the file is gone."""
        try:
            image = self.finder.picture(key)
        except (ValueError, OSError):
            return Image.new("RGB", (SIDE, SIDE), "#ddd")
        image.thumbnail((SIDE, SIDE))
        return image

    def explain(self, found: Found, words: str, place: int) -> tuple[Any, str]:
        """Heat maps of a found image as a picture, and a line about them."""
        caption = found.query if isinstance(found.query, str) else (words or "").strip()
        if not caption:
            return self._maps(None), "Heat maps are of words: type some, then click again."
        try:
            why = self.finder.explain(found.ids[place], caption, found.scoring)
        except (ValueError, OSError) as error:
            raise self.gr.Error(str(error), print_exception=False) from error
        file = io.BytesIO()
        why.figure().savefig(file, format="png", dpi=110)
        return self._maps(Image.open(file)), EXPLAINED.format(
            score=why.score, caption=_plain(caption)
        )


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, and not all of a long one."""
    return re.sub(r"([\\`*_{}\[\]<>()#+\-.!|~$&])", r"\\\1", short(text))


def _label(hit: Any) -> str:
    """The name of a file, else the first text beside the image."""
    if hit.path:
        return Path(hit.path).name
    texts = (v[0] if isinstance(v, list) and v else v for v in hit.payload.values())
    named = [text for text in texts if isinstance(text, str)]
    return (named[0] if named else hit.id)[:60]
