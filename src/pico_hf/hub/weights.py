"""Which files hold the weights of a model: found, checked, and kept free of stale ones."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import Tensor

from pico_hf.hub.errors import shortened
from pico_hf.hub.files import find_file, read_json, refuse_pickle
from pico_hf.hub.tensors import checked_tensors

_INDEX = "model.safetensors.index{}.json"
_WHOLE = "model{}.safetensors"


@dataclass
class Stored:
    """What a model's files hold.

    Attributes:
        shapes: Name → shape of every tensor.
        prototypes: Name → tensor of those of its prototypes.
        file: Name of the file that was found first: the whole one or the index.
    """

    file: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    prototypes: dict[str, Tensor] = field(default_factory=dict)

    def read(self, path: Path) -> set[str]:
        """Adds a safetensors file that passes all checks; returns the names in it."""
        names = set()
        for name, tensor in checked_tensors(path):
            names.add(name)
            self.shapes[name] = tuple(tensor.shape)
            if name.startswith("prototypes."):
                self.prototypes[name.removeprefix("prototypes.")] = tensor
        return names


def read_model_files(path: str | os.PathLike, options: dict[str, Any], named: Any = None) -> Stored:
    """Reads a model's weights once and checks them, before anything is built from them.

    Args:
        path: Folder or repository.
        options: The caller's keywords (Hub options, `variant`).
        named: The weights' file if the configuration names one itself.

    Raises:
        OSError: If there are no safetensors.
        ValueError: If a file is cut short, differs from what the Hub announced, holds NaN or
            infinity, or if a file outside of the folder is named. If there are a whole file and
            shards: nobody knows which of them was meant.
    """
    variant = f".{options['variant']}" if options.get("variant") else ""
    names = (named,) if named else (_WHOLE.format(variant), _INDEX.format(variant))
    for name in names:
        _check_name(name, "config.json", (".safetensors", ".safetensors.index.json", ".json"))
    found = [file for name in names if (file := find_file(path, name, options)) is not None]
    if not found:
        refuse_pickle(path, names[0])
    if len(found) > 1:
        raise ValueError(
            f"'{os.fspath(path)}' holds {found[0].name} and {found[1].name}, one of which is left "
            "over from an earlier save. Delete the one that is not meant, or save the model again."
        )
    stored = Stored(found[0].name)
    if found[0].suffix == ".safetensors":
        stored.read(found[0])
        return stored
    for name, promised in _shards(found[0]).items():
        shard = find_file(path, name, options)
        if shard is None:
            raise OSError(f"'{os.fspath(path)}' lacks {name}, which {found[0].name} names.")
        if odd := stored.read(shard) ^ promised:
            raise ValueError(
                f"{found[0].name} does not fit {name}: only one of them has `{min(odd)}`. They are "
                "of different saves; download or save all of them again."
            )
    return stored


def remove_stale(
    folder: str | os.PathLike, variant: str | None = None, sharded: bool | None = None
) -> None:
    """Removes what an earlier save of a model has left in a folder, once the new one is complete.

    Stock code removes old shards only: a whole file beside new shards would be read instead of
    them, and an index beside a new whole file names shards that are gone. Other files stay.

    Args:
        folder: Where a model was just saved.
        variant: That of the save.
        sharded: True if it was saved in shards. None: it was if there are all that the index names.
    """
    ending = f".{variant}" if variant else ""
    whole, index = Path(folder) / _WHOLE.format(ending), Path(folder) / _INDEX.format(ending)
    if not (whole.is_file() and index.is_file()):
        return
    shards = [Path(folder) / name for name in _shards(index)]
    if all(map(Path.is_file, shards)) if sharded is None else sharded:
        whole.unlink()
    else:
        for path in (index, *shards):
            path.unlink(missing_ok=True)


def is_sharded(folder: str | os.PathLike) -> bool:
    """True for a folder with a model in shards."""
    return (Path(folder) / _INDEX.format("")).is_file()


def refuse_mixture(folder: str | os.PathLike, *, adapter: bool) -> None:
    """Refuses to save an adapter beside a whole model, or the reverse: neither could be read.

    Args:
        folder: Where it is to be saved; it need not exist.
        adapter: True if an adapter is to be saved.

    Raises:
        ValueError: If the folder holds the other kind.
    """
    other = ("model.safetensors", _INDEX.format("")) if adapter else ("adapter_config.json",)
    for name in other:
        if (Path(folder) / name).is_file():
            here, new = ("a whole model", "an adapter") if adapter else ("an adapter", "a model")
            raise ValueError(
                f"'{os.fspath(folder)}' holds {here} ({name}): with {new} beside it neither could "
                "be read. Choose another folder."
            )


def _shards(index: Path) -> dict[str, set[str]]:
    """File → names of the weights that it must hold."""
    values = read_json(index)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.name} must have a `weight_map` from weights to files.")
    if not isinstance(values.get("metadata"), dict):
        raise ValueError(f"{index.name} must have an object of `metadata`. Save the model again.")
    shards: dict[str, set[str]] = {}
    for weight, name in weight_map.items():
        _check_name(name, index.name, (".safetensors",))
        shards.setdefault(name, set()).add(weight)
    return dict(sorted(shards.items()))


def _check_name(name: Any, origin: str, suffixes: tuple[str, ...]) -> None:
    """Refuses a file name that leads out of the model's folder, on any system."""
    if isinstance(name, str) and name.endswith(suffixes):
        windows, posix = PureWindowsPath(name), PurePosixPath(name)
        inside = not windows.anchor and not posix.anchor
        if inside and ".." not in {*windows.parts, *posix.parts}:
            return
    raise ValueError(
        f"{origin} names the weights' file {shortened(repr(name))}, which is not a "
        "safetensors file inside the model's own folder. Do not trust this repository."
    )
