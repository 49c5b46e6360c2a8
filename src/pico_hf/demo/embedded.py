"""The drawings of a checkout and the model that is trained on them."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

# Only the checkout that this code runs from: code of another folder is not run.
CHECKOUT = Path(__file__).resolve().parents[3]
MODEL = Path("outputs") / "emoji-styles"


def embedded_images(checkout: Path = CHECKOUT) -> Path | None:
    """Drawings in styles that training has not seen; None without a checkout.

    Args:
        checkout: Where it would be.
    """
    table = checkout / "examples" / "data" / "emoji-styles" / "validation_unseen.parquet"
    return table if table.is_file() else None


def embedded_model(checkout: Path = CHECKOUT) -> Path | None:
    """The folder of the embedded model, whose classes are registered; None if it is not trained.

    Args:
        checkout: Where it would be.
    """
    folder = checkout / MODEL
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return None
    examples = str(checkout / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    import_module("lite_clip")
    return folder


def train_embedded(checkout: Path = CHECKOUT) -> None:
    """Trains the embedded model, as `make demo` does: minutes on two cores, nothing is downloaded.

    Args:
        checkout: With its examples.

    Raises:
        OSError: If it ends without a model.
    """
    words = [sys.executable, str(checkout / "examples" / "run_pico.py")]
    done = subprocess.run(words, cwd=checkout, stdout=sys.stderr.fileno(), check=False)
    if done.returncode:
        raise OSError(
            f"The embedded model could not be trained (exit code {done.returncode}). See above, or "
            "name a model."
        )
