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


# Chosen on folds of the training parts: new heads, of photos and drawings, by
# `benchmarks/effect/explore.py`; the others, of drawings in a new style, by `tuning.py` beside it.
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
        "fine_tuning": Recipe(
            {"loss": "infonce"},
            {
                "learning_rate": 5e-5,
                "tower_learning_rate": 5e-5,
                "lr_scheduler_type": "cosine",
                "num_train_epochs": 8,
            },
        ),
        "lora": Recipe(
            {"loss": "infonce"},
            {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "num_train_epochs": 8},
        ),
    }
)


def recipe(kind: str = "new_heads") -> Recipe:
    """Settings for a kind of run; each may be changed before it is passed on.

    Args:
        kind: `"new_heads"`: untrained projections behind frozen towers. `"fine_tuning"`: all of a
            pretrained encoder. `"lora"`: one behind `get_peft_model(…, pico_lora_config(…))`.

    Raises:
        ValueError: If there is no such recipe.

    Example:
        >>> recipe("new_heads").training["projection_start"]
        'closed_form'
    """
    if kind not in _RECIPES:
        raise ValueError(f"`kind` must be one of {', '.join(_RECIPES)}, got {kind!r}.")
    return Recipe(*(dict(part) for part in _RECIPES[kind]))
