"""What the demo page asks: found images in three scorings, their pictures, and heat maps."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pico_hf.core.score_form import compared_forms
from pico_hf.data.images import as_rgb
from pico_hf.explanation import Explanation, explain
from pico_hf.search.sources import SourceImage, images_of

PATH_FIELDS = ("path", "paths")
MOST_VALUES = 30  # of a field that is offered as a filter


class Finder:
    """Searches one index with the encoder, with equal weights, and with the model as it is.

    The three share one encoder and one index: column weights go into the query.

    Args:
        index: A `PicoIndex` that was opened with a retriever.
        pictures: The images of ids that have no file, see `add_images`.
    """

    def __init__(self, index: Any, pictures: Mapping[str, Any] | None = None) -> None:
        self._index, self._pictures = index, pictures or {}
        self._indexes = {
            name: index if model is index.retriever.model else index.with_model(model)
            for name, model in compared_models(index.retriever.model).items()
        }
        self._filters = filter_values(index.payloads().values())

    def __len__(self) -> int:
        return len(self._index)

    @property
    def scorings(self) -> list[str]:
        """Names of the scorings, the model as it is last."""
        return list(self._indexes)

    @property
    def filters(self) -> list[str]:
        """`field: value` of every field that tells groups of images apart."""
        return list(self._filters)

    def search(
        self, query: Any, scoring: str, filters: Sequence[str] = (), top_k: int = 18
    ) -> list[Any]:
        """The best images as `Hit`s.

        Args:
            query: A text, or an image as a `Path` or a PIL image.
            scoring: One of `scorings`.
            filters: Of `filters`; several values of one field: any of them.
            top_k: How many, >= 1.

        Raises:
            ValueError: If the query is empty or cannot be read.
        """
        if isinstance(query, str) and not query.strip():
            raise ValueError("Type at least one word.")
        chosen: dict[str, list[Any]] = {}
        for name in filters:
            field, value = self._filters[name]
            chosen.setdefault(field, []).append(value)
        return self._indexes[scoring].search(query, top_k, filter=chosen or None)

    def picture(self, key: str) -> Image.Image:
        """The image of an id in RGB.

        Raises:
            ValueError: If its file is not there or cannot be read, or if it never had one.
        """
        path = self._index.payload(key).get("path")
        content = self._pictures.get(key, Path(path) if path else None)
        if content is None:
            raise ValueError(f"The image {key!r} is in the index as vectors alone: it has no file.")
        return as_rgb(content.value if isinstance(content, SourceImage) else content)

    def explain(self, key: str, caption: str, scoring: str) -> Explanation:
        """Why an image and a caption match in a scoring.

        Raises:
            ValueError: If the image cannot be read, or if the caption is empty.
        """
        retriever = self._indexes[scoring].retriever
        return explain(retriever.model, retriever.processor, self.picture(key), caption)


def compared_models(model: Any) -> dict[str, Any]:
    """Models that share one encoder and differ in how they score.

    Args:
        model: A `PicoModel`, which stays as it is and comes last.
    """
    found = {}
    for name, form in compared_forms(model.prototypes.form).items():
        if name == "PICO":
            found[name] = model
            continue
        found[name] = copy.deepcopy(model, {id(model.encoder): model.encoder})
        found[name].prototypes.commit(form)
    return found


def filter_values(payloads: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, Any]]:
    """`field: value` → (field, value) of fields with at least two and not too many values.

    Args:
        payloads: Of all images.

    Example:
        >>> filter_values([{"style": "ink", "id": 1}, {"style": "oil", "id": 1}])
        {'style: ink': ('style', 'ink'), 'style: oil': ('style', 'oil')}
    """
    values: dict[str, set[Any]] = {}
    for payload in payloads:
        for field, value in payload.items():
            own = value if isinstance(value, list) else [value]
            if field not in PATH_FIELDS:
                values.setdefault(field, set()).update(v for v in own if isinstance(v, str | int))
    return {
        f"{field}: {value}": (field, value)
        for field, known in values.items()
        if 2 <= len(known) <= MOST_VALUES
        for value in sorted(known, key=str)
    }


def add_images(index: Any, source: Any) -> dict[str, Any]:
    """Adds images to an index, with the subfolder of each file as its field `folder`.

    Args:
        index: A `PicoIndex`.
        source: A folder, or rows of a data set.

    Returns:
        The images that are no files, by their ids.

    Raises:
        ValueError: If there is no image that can be read.
    """
    images = images_of(source)
    payloads = None
    if isinstance(source, Path) and source.is_dir():
        parents = [Path(str(image.path)).parent for image in images]
        folders = [parent.relative_to(source.absolute()).as_posix() for parent in parents]
        payloads = [{"folder": folder} for folder in folders]
    index.add(source, payloads=payloads)
    pictures: dict[str, Any] = {}
    for image in images:
        if image.path is None and isinstance(image.value, bytes):
            pictures.setdefault(image.read()[0], image)
    return pictures
