"""The model's configuration: its fields, their defaults and their valid values."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import fields
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pico_hf.core.losses import LOSSES
from pico_hf.core.state import SOURCES

_LARGEST = 1e6  # of numbers that losses and weights are computed with
# Fields that belong to prototypes: files of prototypes alone have them under the same names.
PROTOTYPE_FIELDS = ("num_prototypes", "probe_size", "estimators", "feedback_temperature")


class PicoConfig(PreTrainedConfig):
    """Configuration of a [`PicoModel`]: the wrapped encoder's configuration and PICO's own fields.

    Args:
        encoder_config: Configuration of the wrapped vision-text dual encoder, as an object or as
            the dict of its `to_dict()`; None gives a default CLIP. It is always copied, because a
            composite config resets `_attn_implementation` on a shared one.
        num_prototypes: K, style prototypes per modality, from 1 to the number of columns D.
        probe_size: R, matched training pairs whose column means are the instance space of the
            prototypes, at least 2.
        estimators: What proposes how to score; feedback takes what helps. `"style"`: style
            prototypes, from which weights of the encoder columns follow, at every evaluation in
            training. `"canonical"`: columns that both modalities share and their weights, and
            `"pooled"`: how much of the score the encoder's own pooled vectors are, both when
            training is over. See `pico_hf.core.estimators`.
        feedback_temperature: τ of the normalised gain, in rSum points, in (0, 1e6].
        fallback_widths: Widths of image hidden states, text hidden states and common space, if
            the model learns projections for an architecture without token features of its own.
            `PicoModel.from_encoder(…, fallback_projection=True)` sets it.
        loss: Training loss, a key of `pico_hf.core.losses.LOSSES`.
        margin: Margin of the hinge loss, in units of the score (which lies in [-2, 2]), in
            (0, 1e6].
        column_dropout: Share of columns of the image tower's output that are left out of an
            image in training, in all its patches at once, in [0, 1): projections then lean on no
            column alone, whether it carries semantics or style.
        keep_special_tokens: True lets the encoder's own special tokens take part in the
            interaction, as LAPS does, on which PICO builds: the vision tower's prefix (CLS,
            registers) beside the patches, the text tower's BOS and EOS, or [CLS] and [SEP], beside
            the words; padding never. Encoders that were pretrained by pooled vectors are aligned in
            just those. Swin, ALIGN and attention pools (SigLIP, AIMv2) have nothing to keep among
            the patches. Pooled features do not depend on it.
        kwargs: What every `PreTrainedConfig` takes.

    Raises:
        ValueError: If a value is out of its range, or if a key is nearly one of these names. Other
            keys pass, since transformers and other tools add theirs to a config.json.

    Example:
        >>> PicoConfig(num_prototypes=4).num_prototypes
        4
    """

    model_type = "pico"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["image_features", "text_features"]
    sub_configs: ClassVar[dict[str, type]] = {"encoder_config": AutoConfig}

    encoder_config: PreTrainedConfig | dict | None = None
    num_prototypes: int = 8
    probe_size: int = 1024
    estimators: list[str] | tuple[str, ...] = tuple(SOURCES)
    feedback_temperature: float = 5.0
    loss: str = "hinge"
    margin: float = 0.2
    column_dropout: float = 0.0
    keep_special_tokens: bool = False
    fallback_widths: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuses misspelt keys and values out of range, then builds the encoder's config."""
        _refuse_misspellings(kwargs, own_fields())
        self.validate_ranges()
        self.estimators = list(self.estimators)
        self.encoder_config = _encoder_config(self.encoder_config)
        super().__post_init__(**kwargs)

    def validate_ranges(self) -> None:
        """Raises ValueError if a field has a value out of its range."""
        _at_least("num_prototypes", self.num_prototypes, 1)
        _at_least("probe_size", self.probe_size, 2)
        for name in ("feedback_temperature", "margin"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= _LARGEST:
                raise ValueError(
                    f"`{name}` must be a number > 0 and at most {_LARGEST:.0f}, got {value!r}."
                )
        if not 0 <= self.column_dropout < 1:
            raise ValueError(f"`column_dropout` must be in [0, 1), got {self.column_dropout!r}.")
        if not isinstance(self.keep_special_tokens, bool):
            raise ValueError(
                f"`keep_special_tokens` must be true or false, got {self.keep_special_tokens!r}."
            )
        if self.fallback_widths is not None and len(self.fallback_widths) != 3:
            raise ValueError(
                "`fallback_widths` must be three widths (image, text, common space), got "
                f"{self.fallback_widths!r}."
            )
        if not isinstance(self.estimators, list | tuple):
            raise ValueError(
                f"`estimators` must be a list of {', '.join(SOURCES)}, got {self.estimators!r}."
            )
        for name in self.estimators:
            _one_of("estimators", name, tuple(SOURCES))
        _one_of("loss", self.loss, LOSSES)


def own_fields() -> list[str]:
    """Names of the fields that PicoConfig adds to those of every configuration."""
    common = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(PicoConfig) if field.name not in common]


def split_config_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates fields of [`PicoConfig`] from loading options.

    Args:
        kwargs: Both, mixed.

    Returns:
        (fields of PicoConfig, `fallback_projection` and `pooled_share`, the rest).
    """
    own = {*own_fields(), "fallback_projection", "pooled_share"} - {
        "encoder_config",
        "fallback_widths",
    }
    # A key that is nearly one of ours goes to PicoConfig, which says what it should have been.
    ours = {key for key in kwargs if difflib.get_close_matches(key, own, n=1, cutoff=0.85)}
    pico = {key: value for key, value in kwargs.items() if key in ours}
    return pico, {key: value for key, value in kwargs.items() if key not in ours}


def _encoder_config(config: PreTrainedConfig | dict | None) -> PreTrainedConfig:
    values = dict(config) if isinstance(config, dict) else (config.to_dict() if config else {})
    model_type = values.pop("model_type", "clip")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`encoder_config` has model_type {model_type!r}, which is not known here. Import the "
            "module that registers it with `AutoConfig.register` first (on the command line: "
            "pico-hf --import FILE.py …), or upgrade transformers."
        )
    return AutoConfig.for_model(model_type, **values)


def _refuse_misspellings(kwargs: Collection[str], known: list[str]) -> None:
    """Raises ValueError for a key that is nearly one of ours; other tools' keys pass."""
    for key in kwargs:
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise ValueError(f"`{key}` is not a key of PicoConfig. Did you mean `{near[0]}`?")


def _at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"`{name}` must be an integer >= {low}, got {value!r}.")


def _one_of(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(sorted(choices))}, got {value!r}.")
