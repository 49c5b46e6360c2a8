"""Files that whoever may read the folder's other files may read too."""

from __future__ import annotations

import os
from pathlib import Path


def ordinary_permissions(folder: str | os.PathLike, names: str) -> None:
    """Gives weights in a folder the permissions of any new file, as the umask says.

    safetensors writes through a temporary file that nobody but its owner may read.

    Args:
        folder: Where they were saved.
        names: Pattern of their names.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).glob(names):
        if not path.is_symlink():
            path.chmod(0o666 & ~mask)
