"""A page of found images that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIDE = 240  # pixels of a thumbnail
_STYLE = """
body{font:16px/1.4 system-ui,sans-serif;margin:2rem;color:#222;background:#fafafa}
h2{margin:2rem 0 .6rem}ol{display:flex;flex-wrap:wrap;gap:1rem;list-style:none;padding:0}
li{width:240px}img,.none{width:240px;height:240px;object-fit:contain;background:#eee;display:block}
.none{display:flex;align-items:center;justify-content:center;color:#777}
b{font-variant-numeric:tabular-nums}small{overflow-wrap:anywhere;color:#555}
"""


def write_page(path: str | os.PathLike, results: Sequence[tuple[str, Sequence[Any]]]) -> None:
    """Writes found images with thumbnails; the page appears when it is complete.

    Args:
        path: The file, replaced if it is there; its folder is created if need be.
        results: (query, [`Hit`]s, best first) of each search.

    Raises:
        OSError: If it cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sections = "".join(_section(query, hits) for query, hits in results)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>pico-hf search</title><style>{_STYLE}</style></head>"
        f"<body>{sections}</body></html>\n"
    )
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        beside.write_text(page, encoding="utf-8", errors="replace")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _section(query: str, hits: Sequence[Any]) -> str:
    from pico_hf.data.image_files import short

    items = "".join(_item(place, hit) for place, hit in enumerate(hits, start=1))
    return f"<h2>{html.escape(short(query))}</h2><ol>{items or '<li>nothing found</li>'}</ol>"


def _item(place: int, hit: Any) -> str:
    name = html.escape(hit.path or hit.id)
    caption = f"<b>{place}</b> · {hit.score:.4f}<br><small>{name}</small>"
    return f"<li>{_picture(hit.path, name)}{caption}</li>"


def _picture(path: str | None, name: str) -> str:
    """A thumbnail, or what is wrong with the file: it may have moved since it was indexed."""
    from pico_hf.data.images import as_rgb, file_bytes

    if path is None:
        return '<div class="none">no file</div>'
    try:
        image = as_rgb(file_bytes(path))
    except (OSError, ValueError):
        return '<div class="none">file not readable</div>'
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{name}" src="data:image/jpeg;base64,{data}">'
