"""The index that a command names, in a folder or on a server, and the model it was made with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pico_hf.cli.answers import Failed

MODEL_FILE = "model.json"  # beside the manifest of an index


def remember_model(index: str, model: str) -> None:
    """Notes with an index which model it was made with, for the commands that open it.

    Args:
        index: Folder, or address of a collection, which keeps it in its metadata.
        model: Folder or repository.

    Raises:
        OSError: If it cannot be written.
    """
    from pico_hf.search.files import write_file
    from pico_hf.search.qdrant_places import is_url, note_model

    name = str(Path(model).resolve()) if os.path.isdir(model) else model
    if is_url(index):
        note_model(index, name)
        return
    path, content = Path(index) / MODEL_FILE, json.dumps({"model": name}, indent=2) + "\n"
    if not path.is_file() or path.read_bytes() != content.encode():  # a full disk may be read
        write_file(path, content.encode())


def noted_model(index: str) -> str | None:
    """The model that was noted with an index; None if there is none.

    Args:
        index: Folder, or address of a collection.

    Raises:
        Failed: If the note cannot be read.
        ConnectionError: If no server answers.
    """
    from pico_hf.search.qdrant_places import is_url, model_note

    if is_url(index):
        return model_note(index)
    path = Path(index) / MODEL_FILE
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise Failed(
            f"{str(path)!r} cannot be read ({error}). Name the model by --model."
        ) from error


def model_of(index: str, given: str | None) -> str:
    """The model to open an index with: the one that is given, else the one it was made with.

    Args:
        index: Folder, or address of a collection.
        given: Folder or repository.

    Raises:
        Failed: If there is no index, its model is not known, or it is not here.
        ConnectionError: If no server answers.
    """
    from pico_hf.search.qdrant_places import is_there

    if not is_there(index):  # said before a model is loaded
        raise Failed(
            f"{index!r} holds no index. Make one: pico-hf index FOLDER {index} --model MODEL"
        )
    if given is not None:
        return given
    name = noted_model(index)
    if name is None:
        raise Failed(f"{index!r} does not say which model it was made with. Name it by --model.")
    if os.path.isabs(name) and not os.path.isdir(name):
        raise Failed(
            f"{index!r} was made with the model {name!r}, which is not there. Name the model by "
            "--model."
        )
    return name


def images_for(index: str, source: str, split: str, model: str | None) -> tuple[Any, str]:
    """What is to be added to an index, and the model that encodes it.

    Args:
        index: Folder, or address of a collection; it need not be there.
        source: Folder of images, image, table or data set.
        split: Of a named data set.
        model: Folder or repository; None: the one the index was made with.

    Returns:
        Rows, and the name of the model.

    Raises:
        Failed: If the model is not known, or there is no such source.
        ValueError: If a folder holds no image.
        ConnectionError: If no server answers.
    """
    from pico_hf.cli.sources import image_rows
    from pico_hf.search.qdrant_places import is_there
    from pico_hf.search.sources import images_of

    if not is_there(index) and model is None:
        raise Failed(
            f"{index!r} is a new index: name the model that encodes its images by --model."
        )
    rows = image_rows(source, split)
    if isinstance(rows, Path):
        images_of(rows)  # nothing is made for a folder without images
    return rows, model or model_of(index, None)
