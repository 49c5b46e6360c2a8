"""This package's modules as files of a repository, for people who have not installed it.

transformers loads custom code from a repository as a flat set of modules that import each other
relatively, and fetches those that it sees in `from .name import`; here they import each other
absolutely, so the copies are rewritten.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_IMPORT = re.compile(r"^([ \t]*)from (?:pico_hf)?\.(\w+) import", flags=re.MULTILINE)
_MODULE_IMPORT = re.compile(
    r"(?:^[ \t]*from \.\w+ import __name__ as _\n)?^([ \t]*)from (?:pico_hf|\.) import (\w+)$",
    flags=re.MULTILINE,
)


def write_modules(folder: str | os.PathLike, entry: str = "modeling_pico") -> list[Path]:
    """Writes a module and all modules it needs, with relative imports.

    Args:
        folder: Where they go; files of the same names are replaced.
        entry: The module that is loaded first.

    Returns:
        The files written.
    """
    written, waiting = [], [entry]
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        # As source, so that a second writing from such a copy gives the same text.
        text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        needed = {
            found[1] for pattern in (_IMPORT, _MODULE_IMPORT) for found in pattern.findall(text)
        }
        waiting += sorted(needed - seen)
        seen |= needed
        path = Path(folder) / f"{name}.py"
        text = _IMPORT.sub(r"\1from .\2 import", text)
        text = _MODULE_IMPORT.sub(r"\1from .\2 import __name__ as _\n\1from . import \2", text)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
