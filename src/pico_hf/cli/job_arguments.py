"""From the words of a command line, or a file of options, to the arguments of a training job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from pico_hf.cli.answers import Failed

_CONFIGS = (".yaml", ".yml", ".json")


def job_arguments(words: Sequence[str], options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Arguments of a job from a file of options, pairs and options of every name."""
    from transformers import HfArgumentParser

    from pico_hf.recipes import recipe
    from pico_hf.training.job_options import DataArguments, ModelArguments
    from pico_hf.training_args import PicoTrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise typer.BadParameter(message)

    kinds = (ModelArguments, DataArguments, PicoTrainingArguments)
    parser = Parser(kinds, allow_abbrev=False)
    parser.add_argument("pairs", nargs="*")
    spoken, unknown = parser.parse_known_args(list(words))
    if unknown:
        raise typer.BadParameter(f"no such option: {' '.join(unknown)}")
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"]
    names = [name if hasattr(spoken, name) else name.removeprefix("no_") for name in flags]
    chosen = {name: getattr(spoken, name) for name in names}
    named: dict[str, Any] = {"do_train": True, "do_eval": True, "report_to": "none"}
    if len(spoken.pairs) == 1 and spoken.pairs[0].endswith(_CONFIGS):
        named |= _config(Path(spoken.pairs[0]))
    elif spoken.pairs:
        named |= _source(spoken.pairs)
    named |= options | chosen
    if named.get("vision_model"):  # towers that never met, with new heads
        heads = recipe("new_heads")
        frozen = {} if named.get("use_lora") else heads.training  # an adapter changes both
        named = {**heads.model, **frozen, **named}
    if "output_dir" not in named:
        raise Failed("Name the folder of the trained model by --output.")
    try:
        return parser.parse_dict(named)
    except ValueError as error:
        raise Failed(
            str(error).replace("by the HfArgumentParser", "as options of a run")
        ) from error


def _config(file: Path) -> dict[str, Any]:
    import yaml

    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Failed(f"{str(file)!r} is no file of options ({error}).") from error
    if not isinstance(read, dict):
        raise Failed(
            f"{str(file)!r} must hold options with their values, got {type(read).__name__}."
        )
    return read


def _source(pairs: list[str]) -> dict[str, Any]:
    """Files as files; one name that is no file as a data set."""
    alone = pairs[0] if len(pairs) == 1 else ""
    if alone and not Path(alone).exists() and "/" in alone and not Path(alone).suffix:
        return {"dataset_name": alone}
    return {"train_file": pairs}


def dataset_name(args: Any) -> str | None:
    """The named data set, or the folder that holds the training files."""
    from pico_hf.cards.redaction import last_part

    if not args.train_file:
        return args.dataset_name
    file = Path(args.train_file[0])
    return last_part(file if file.is_dir() else file.parent) or None
