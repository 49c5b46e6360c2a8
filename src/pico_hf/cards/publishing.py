"""What a training run publishes: the files of a checkpoint and a model card of the run so far."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainerState

from pico_hf.cards.model_card import METRICS, ModelFacts, write_model_card
from pico_hf.cards.privacy import is_hub_id, public_name
from pico_hf.modeling_pico import PicoModel
from pico_hf.training_args import PicoTrainingArguments

MARK = "<!-- Written by PicoTrainer at every push. Delete this line to keep the card as it is. -->"
_PUBLISHED = (".safetensors", ".json", ".py")
_SHOWN = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "seed")


def copy_model_files(checkpoint: Path, folder: Path) -> None:
    """Copies what a checkpoint holds of the model, and nothing of the optimizer's state.

    The stock Trainer copies a fixed list of names, which has neither prototypes nor the package's
    modules.

    Args:
        checkpoint: A checkpoint's folder.
        folder: The folder that is pushed.
    """
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in _PUBLISHED and path.name != "trainer_state.json":
            shutil.copy(path, folder / path.name)


def write_run_card(
    folder: Path,
    model: PicoModel,
    args: PicoTrainingArguments,
    state: TrainerState,
    *,
    best: bool = False,
    name: str | None = None,
    **metadata: Any,
) -> bool:
    """Writes README.md and plots about a run, unless somebody else wrote the card.

    Args:
        folder: The folder that is pushed.
        model: The model in it.
        args: The run's knobs.
        state: The trainer's state.
        best: True if the model is the best checkpoint rather than the last one.
        name: Title; None takes the repository's name.
        metadata: More entries of the card's metadata, such as `language`; None is left out.

    Returns:
        False if the card was left as it is.
    """
    path = folder / "README.md"
    if path.exists() and not _replaceable(path.read_text(encoding="utf-8")):
        return False
    title = name or (args.hub_model_id or str(args.output_dir)).rstrip("/").rsplit("/", 1)[-1]
    write_model_card(folder, run_facts(model, args, state, title, best=best))
    card = ModelCard.load(path)
    for key, value in metadata.items():
        if key == "tags" and value:
            given = [value] if isinstance(value, str) else value
            card.data.tags = list(dict.fromkeys([*card.data.tags, *map(public_name, given)]))
        elif value is not None:
            setattr(card.data, key, value)
    card.text = f"{card.text.rstrip()}\n\n{MARK}\n"
    card.save(path)
    return True


def _replaceable(card: str) -> bool:
    """True for a card of ours, and for peft's empty form, which every saved adapter comes with."""
    return MARK in card or "[More Information Needed]" in card


def run_facts(
    model: PicoModel,
    args: PicoTrainingArguments,
    state: TrainerState,
    name: str,
    *,
    best: bool = False,
) -> ModelFacts:
    """What is known of a run from its log; see `write_run_card` for the arguments."""
    step = state.best_global_step if best and state.best_global_step else state.global_step
    kept = int(model.prototypes.iteration)
    # Aligned after the last step, whichever step the network is of, and scored after that.
    scored = state.global_step if model.prototypes.canonical and kept else step
    shown = {key: getattr(args, key) for key in _SHOWN}
    return ModelFacts(
        name=name,
        results=_results([entry for entry in state.log_history if entry["step"] <= scored]),
        column_weights=model.column_weights,
        semantic_probability=model.semantic_probability,
        iterations=[e for e in state.log_history if e.get("pico_iteration", kept + 1) <= kept],
        arguments={**shown, "loss": model.config.loss, "step": step},
        base_model=_origin(model),
        adapter=any(".lora_" in name for name, _ in model.named_parameters()),
    )


def _results(history: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The last metrics of every split that was evaluated, `{"dev": {"PICO": {"rsum": …}}}`."""
    results = {}
    for entry in history:
        for key in entry:
            if key.startswith("eval_") and key.endswith("_rsum"):
                prefix = key.removesuffix("_rsum")
                split = prefix.removeprefix("eval").strip("_") or "dev"
                results[split] = {"PICO": {m: entry[f"{prefix}_{m}"] for m in METRICS}}
    return results


def _origin(model: PicoModel) -> str:
    """The encoder's repository, but never a path of somebody's machine."""
    name = getattr(model.encoder.config, "_name_or_path", "") or ""
    known = is_hub_id(name) and not os.path.exists(name)
    return name if known else f"Encoder of type {model.encoder.config.model_type}"
