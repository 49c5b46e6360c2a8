"""The files of a Space that shows the demo page."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from pico_hf.demo.library import gradio
from pico_hf.search.sources import images_of

PACKAGE = Path(__file__).resolve().parents[1]
README = """---
title: {title}
emoji: 🔎
colorFrom: green
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
pinned: false
tags:
- pico_hf
- image-text-retrieval
---

# {title}

Type words or drop an image; click a found image to see which patch met which word, and which
columns carried the score. The model is in `model`, the images are in `images`, and the code is in
`pico_hf` and `app.py`.
"""
APP = '''"""Search images, and see why: the demo page of pico_hf."""

import pico_hf.registration  # noqa: F401
from pico_hf.cli.commands.demo import demo_page
from pico_hf.demo.library import gradio
from pico_hf.demo.serving import looks

demo = demo_page("model", "{images}")

if __name__ == "__main__":
    demo.launch(ssr_mode=False, **looks(gradio()))
'''


def write_space(
    folder: Path, model: Path, model_files: Iterable[str], images: Path, title: str
) -> None:
    """Writes all files of a Space; it needs nothing but packages from an index.

    Args:
        folder: New or empty.
        model: Folder of the model.
        model_files: Names in it that are published.
        images: A folder of images, or a table that holds them.
        title: Of the Space.

    Raises:
        ValueError: If the folder holds no images.
        ImportError: If gradio is not installed: its version is that of the Space.
    """
    for name in model_files:
        _copy(model / name, folder / "model" / name)
    place = "images"
    if images.is_dir():
        for image in images_of(images):
            source = Path(str(image.path))
            _copy(source, folder / place / source.relative_to(images.absolute()))
    else:
        place = f"images/{images.name}"
        _copy(images, folder / place)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(PACKAGE, folder / "pico_hf", ignore=ignored)
    texts = {
        "README.md": README.format(title=title, gradio=gradio().__version__),
        "app.py": APP.format(images=place),
        "requirements.txt": "\n".join(requirements()) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def requirements() -> list[str]:
    """What the package needs besides gradio, with matplotlib for the heat maps."""
    from packaging.requirements import Requirement

    found: list[Any] = [Requirement(text) for text in metadata.requires("pico-hf") or ()]
    needed = [own for own in found if own.marker is None or own.marker.evaluate({"extra": "plots"})]
    return sorted({f"{own.name}{own.specifier}" for own in needed})


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
