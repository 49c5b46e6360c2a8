"""Settings that were chosen by measurement, by kind of run; `docs/recipe.md` says how."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """What a model and a run of one kind start with.

    Attributes:
        model: Keywords of `PicoModel.from_encoder` and `from_vision_text_pretrained`.
        training: Arguments of [`PicoTrainingArguments`].
    """

    model: dict[str, Any]
    training: dict[str, Any]


# Chosen on folds of the training parts of photos and drawings, by `benchmarks/effect/explore.py`.
_RECIPES = MappingProxyType(
    {
        "new_heads": Recipe(
            {"loss": "infonce", "column_dropout": 0.3, "pooled_share": 1 / 3},
            {
                "freeze_encoder": True,
                "projection_start": "closed_form",
                "learning_rate": 2e-3,
                "lr_scheduler_type": "cosine",
                "num_train_epochs": 8,
            },
        ),
    }
)


def recipe(kind: str = "new_heads") -> Recipe:
    """Settings for a kind of run; each may be changed before it is passed on.

    Args:
        kind: `"new_heads"`: untrained projections behind frozen towers.

    Raises:
        ValueError: If there is no such recipe.

    Example:
        >>> recipe("new_heads").training["projection_start"]
        'closed_form'
    """
    if kind not in _RECIPES:
        raise ValueError(f"`kind` must be one of {', '.join(_RECIPES)}, got {kind!r}.")
    return Recipe(*(dict(part) for part in _RECIPES[kind]))
