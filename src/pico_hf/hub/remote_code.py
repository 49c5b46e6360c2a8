"""This package's modules as files of a repository, for people who have not installed it.

transformers loads custom code from a repository as a flat set of modules that import each other
relatively, and fetches those that it sees in `from .name import`. Here modules lie in folders and
import each other absolutely, so the copies are renamed (`core/similarity.py` becomes
`core_similarity.py`) and their imports are rewritten.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_HERE = Path(__file__)
_INSTALLED = _HERE.stem == "remote_code"  # False in such a copy, which is flat already
_ROOT = _HERE.parent.parent if _INSTALLED else _HERE.parent
_ABSOLUTE = re.compile(r"^([ \t]*)from pico_hf\.([\w.]+) import (.*)$", flags=re.MULTILINE)
_RELATIVE = re.compile(r"^[ \t]*from \.(\w+) import", flags=re.MULTILINE)


def write_modules(folder: str | os.PathLike, entry: str = "modeling_pico") -> list[Path]:
    """Writes a module and all modules it needs, with relative imports.

    Args:
        folder: Where they go; files of the same names are replaced.
        entry: The module that is loaded first.

    Returns:
        The files written.
    """
    modules = _flat_names()
    written, waiting, seen = [], [entry], {entry}
    while waiting:
        name = waiting.pop()
        text = flattened(modules[name].read_text(encoding="utf-8"), modules)
        needed = set(_RELATIVE.findall(text)) - seen
        waiting += sorted(needed)
        seen |= needed
        path = Path(folder) / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def flattened(text: str, modules: Mapping[str, Path]) -> str:
    """A module's text with relative imports of flat names; a copy's text stays as it is.

    Args:
        text: Source code.
        modules: Flat name → file of every module of the package.

    Example:
        >>> flattened("from pico_hf.core.losses import LOSSES", {"core_losses": Path()})
        'from .core_losses import LOSSES'
    """

    def relative(found: re.Match[str]) -> str:
        indent, origin, names = found[1], found[2].replace(".", "_"), found[3]
        if origin in modules:
            return f"{indent}from .{origin} import {names}"
        module, _, alias = names.partition(" as ")  # a module of a folder
        flat = f"{origin}_{module}"
        fetch = f"{indent}from .{flat} import __name__ as _"  # what transformers looks for
        return f"{fetch}\n{indent}from . import {flat} as {alias or module}"

    return _ABSOLUTE.sub(relative, text)


def _flat_names() -> dict[str, Path]:
    return {
        "_".join(path.relative_to(_ROOT).with_suffix("").parts): path
        for path in _ROOT.rglob("*.py")
        if path.name != "__init__.py"
    }
