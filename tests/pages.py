"""Markdown pages of the repository: their code blocks, and a way to run them as a reader would.

`run_pages` belongs into a process whose Hub is the loopback server: there the repositories that the
pages name hold tiny models, and every page finds the files that it names in its working folder.
"""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "RESULTS.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CLIP = "openai/clip-vit-base-patch32"
TOWERS = {"vision": "google/vit-base-patch16-224", "text": "google-bert/bert-base-uncased"}
# As many training rows as a batch of the default size, and enough for the default dev split.
FILES = {"train.parquet": 128, "dev.parquet": 12, "test.parquet": 12, "icons.parquet": 8}
IMAGES = ("cat.jpg", "street.jpg", "photo.jpg")
PHOTOS = {"car.jpg": "red", "sea.jpg": "blue", "wood.png": "green"}  # in a folder


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line of its first line, code) of every code block in a language."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(2)) + 1, found[2])
        for found in FENCED.finditer(text)
        if found[1] == language
    ]


def run_pages(names: list[str], folder: Path) -> dict[str, str]:
    """Runs the Python blocks of each page in order, in one namespace and folder per page.

    Returns:
        Page → the traceback of its first block that failed, empty if all ran.
    """
    from tiny import tiny_encoder, tiny_processor

    for part in (tiny_encoder(), tiny_processor()):
        part.push_to_hub(CLIP)
    apart, processor = tiny_encoder("vit+bert"), tiny_processor()
    for part in (apart.vision_model, processor.image_processor):
        part.push_to_hub(TOWERS["vision"])
    for part in (apart.text_model, processor.tokenizer):
        part.push_to_hub(TOWERS["text"])
    failures = {}
    for name in names:
        os.chdir(_prepared(folder / Path(name).stem))
        failures[name] = _failure(ROOT / name)
    return failures


def _prepared(folder: Path) -> Path:
    from PIL import Image

    from tiny import tiny_rows

    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")  # as from the root of the repository
    for name, images in FILES.items():
        tiny_rows(images).to_parquet(folder / name)
    for name in IMAGES:
        Image.new("RGB", (48, 40), "red").save(folder / name)
    (folder / "photos").mkdir()
    for name, colour in PHOTOS.items():
        Image.new("RGB", (48, 40), colour).save(folder / "photos" / name)
    return folder


def _failure(page: Path) -> str:
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        try:  # blank lines before the code, so that a traceback shows lines of the page
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
        except Exception:
            return traceback.format_exc()
    return ""
