"""The encoder table for readers: the list in the guide to encoders."""

from __future__ import annotations

from pico_hf.encoders.spec import POOLED_BY
from pico_hf.encoders.table import ENCODERS, PAIR


def supported_encoders_table() -> str:
    """The table as Markdown: labelled rows, whole models before pairs of towers."""
    rows = sorted(
        ENCODERS.items(), key=lambda item: (item[0].startswith(PAIR), item[1].label.casefold())
    )
    lines = ["| encoder | key | image pooled by | text pooled by | note |", "|---|---|---|---|---|"]
    for key, row in rows:
        if not row.label:
            continue  # registered from outside
        pooled = (POOLED_BY[side.pooled_by] for side in (row.image, row.text))
        lines.append(f"| {' | '.join((row.label, f'`{key}`', *pooled, row.note))} |")
    return "\n".join(lines)
