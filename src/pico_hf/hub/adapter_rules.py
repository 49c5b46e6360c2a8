"""What an adapter's configuration may say: one set of rules, for writing it and for reading it."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
# They take something out of the base, the same whenever it is done again on the same base.
BASE_CHANGING = ("olora", "pissa")
# They only say what the matrices were before training, which their file replaces.
_FORGOTTEN = ("eva", "gaussian", "orthogonal")
_INITS = (*_FORGOTTEN, *BASE_CHANGING, "mica")
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


def import_peft() -> Any:
    """Imports peft, which takes seconds and is an extra.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        # Not an import statement: transformers would ask for it wherever this module travels along.
        return import_module("peft")
    except ImportError as error:
        raise ImportError(
            "LoRA needs peft. Install it with `pip install pico-hf[lora]`."
        ) from error


def is_plain_name(value: Any) -> bool:
    """True for a module's dotted path: no pattern, which could take for ever to be matched."""
    return isinstance(value, str) and len(value) < 1000 and _NAME.fullmatch(value) is not None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # a whole number may be larger


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _optional(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kinds)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_plain_name, value))


def _indices(value: Any) -> bool:
    return value is None or _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


def _pattern(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None
        or (isinstance(value, dict) and _names(list(value)) and all(map(valid, value.values())))
    )


_NAMES = "a list of module names (`save_adapter` writes them for a pattern)"
_FLAG = "true or false"
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: _whole(value) and value >= 1, "a rank of at least 1"),
    "lora_alpha": (_number, "a finite number"),
    "lora_dropout": (lambda value: _number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "target_modules": (lambda value: bool(value) and _names(value), _NAMES),
    "exclude_modules": (lambda value: value is None or _names(value), _NAMES),
    "layers_pattern": (
        lambda value: value is None or is_plain_name(value) or _names(value),
        _NAMES,
    ),
    "layers_to_transform": (_indices, "an index or a list of indices"),
    "modules_to_save": (lambda value: value is None or _names(value), "a list of module names"),
    "rank_pattern": (
        _pattern(lambda value: _whole(value) and value >= 1),
        "an object of module names and ranks of at least 1",
    ),
    "alpha_pattern": (_pattern(_number), "an object of module names and finite numbers"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "init_lora_weights": (
        lambda value: _flag(value) or (isinstance(value, str) and value in _INITS),
        f"true, false or one of {', '.join(_INITS)}; others change the base by chance or by data "
        "that are not in the file",
    ),
    "fan_in_fan_out": (_flag, _FLAG),
    "use_rslora": (_flag, _FLAG),
    "use_dora": (_flag, _FLAG),
    "lora_bias": (_flag, _FLAG),
    "inference_mode": (_flag, _FLAG),
    "base_model_name_or_path": (_optional(str), "a text"),
    "revision": (_optional(str), "a text"),
    "peft_version": (_optional(str), "a text"),
    "auto_mapping": (_optional(dict), "an object"),
    # Of an option that is refused itself.
    "qalora_group_size": (_whole, "an integer"),
}
_HARMLESS = ("auto_mapping", "peft_version", "qalora_group_size")


def checked_lora(raw: Mapping[str, Any], where: str = CONFIG_FILE) -> dict[str, Any]:
    """Fields of `peft.LoraConfig` that this package writes and reads.

    Fields that import modules by name, or that change the base in ways that the adapter's weights
    do not tell, must have the value that peft gives them.

    Args:
        raw: The content of adapter_config.json, or what is to be written there.
        where: What holds it, for messages.

    Raises:
        ValueError: If this is no LoRA adapter, or if a field must not have its value.
    """
    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f"{where} must have the `peft_type` 'LORA', got {_shortened(raw.get('peft_type'))}. "
            "Other adapters are neither trained nor loaded here; use peft itself."
        )
    known = {field.name: field for field in fields(import_peft().LoraConfig)}
    for name, value in raw.items():
        if name in _RULES:
            valid, what = _RULES[name]
            if not valid(value):
                raise ValueError(f"`{name}` in {where} must be {what}, got {_shortened(value)}.")
        elif name in known and name != "peft_type" and not _is_default(known[name], value):
            raise ValueError(
                f"`{name}` in {where} must not be set, got {_shortened(value)}: such an adapter "
                "could not be read back."
            )
        elif name not in known and value not in (None, False, [], {}):
            logger.warning("`%s` in %s is unknown to the installed peft: ignored.", name, where)
    for name in ("r", "target_modules"):
        if name not in raw:
            raise ValueError(f"`{name}` in {where} must be {_RULES[name][1]}, got none.")
    kept = _RULES.keys() & known.keys() - set(_HARMLESS)
    result = {name: value for name, value in raw.items() if name in kept}
    if result.get("init_lora_weights") in _FORGOTTEN:
        result["init_lora_weights"] = True
    return result


def suffix_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first plain name that a module's path ends in, else the default.

    Args:
        patterns: Plain names and values.
        name: Dotted path of a module.
        default: Without one.
    """
    for key, value in patterns.items():
        if name == key or name.endswith(f".{key}"):
            return value
    return default


def json_fields(config: Any) -> dict[str, Any]:
    """A live `peft.LoraConfig` as its file has it.

    Args:
        config: The configuration.
    """
    return {name: _plain(value) for name, value in config.to_dict().items()}


def only_adapter(peft_model: Any) -> Any:
    """The configuration of a model's adapter.

    Raises:
        ValueError: If there are several, or if it has a name of its own: peft would save it in a
            folder of that name, where nobody looks for it.
    """
    if list(peft_model.peft_config) != ["default"]:
        raise ValueError(
            "The model must have one adapter with the name 'default', got "
            f"{', '.join(peft_model.peft_config)}. Merge or delete the others."
        )
    return peft_model.peft_config["default"]


def _is_default(field: Field, value: Any) -> bool:
    if value in (None, False, [], {}):
        return True
    if field.default_factory is not MISSING:
        value_of = field.default_factory()
        return value in (value_of, getattr(value_of, "__dict__", value_of))
    return bool(value == field.default)


def _plain(value: Any) -> Any:
    """Sets as sorted lists and enumerations as their values, as JSON has them."""
    if isinstance(value, set | tuple):
        return _plain(sorted(value, key=str) if isinstance(value, set) else list(value))
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return getattr(value, "value", value)


def _shortened(value: Any, limit: int = 80) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[:limit]}…"


def names_of(keys: Iterable[str]) -> str:
    """A few names for a message."""
    first = sorted(keys)
    more = f" and {len(first) - 5} more" if len(first) > 5 else ""
    return ", ".join(f"`{name}`" for name in first[:5]) + more
