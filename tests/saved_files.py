"""Saved files that are edited, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, **changes: Any) -> None:
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


def refusal(
    action: Callable[[], Any],
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, OSError),
) -> str:
    """The message of an action that must fail; one line is demanded of each."""
    with pytest.raises(error) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outcome(action: Callable[[], Any]) -> str:
    """The message of an action that may fail, if it does."""
    try:
        action()
    except (ValueError, OSError) as error:
        return str(error)
    return ""
