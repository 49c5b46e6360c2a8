"""What a training run publishes: the files of a checkpoint and a model card of the run so far."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainerState

from pico_hf.cards.model_card import ModelFacts, models_of_metrics, write_model_card
from pico_hf.cards.redaction import is_hub_id, last_part, public_name
from pico_hf.core.state import SOURCES
from pico_hf.hub.weights import is_sharded, remove_stale
from pico_hf.modeling_pico import PicoModel
from pico_hf.training.feedback_log import logged_refinements
from pico_hf.training_args import PicoTrainingArguments

MARK = "<!-- Written by PicoTrainer at every push. Delete this line to keep your own text. -->"
_PUBLISHED = (".safetensors", ".json", ".py")
_OF_THE_RUN = ("trainer_state.json", "pico_checkpoint.json")
_SHOWN = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "seed")


def copy_model_files(checkpoint: Path, folder: Path) -> None:
    """Copies the files of the model from a checkpoint, without the optimizer's state.

    The stock Trainer copies a fixed list of file names, in which prototypes and the package's
    modules are missing.

    Args:
        checkpoint: Folder of the checkpoint.
        folder: The folder that is pushed.
    """
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in _PUBLISHED and path.name not in _OF_THE_RUN:
            shutil.copy(path, folder / path.name)
    remove_stale(folder, sharded=is_sharded(checkpoint))


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
    """Writes README.md and plots about a run, unless the folder has a model card of the user.

    Args:
        folder: The folder that is pushed.
        model: The model in it.
        args: The training arguments.
        state: The trainer's state, with its log.
        best: True if the model is the best checkpoint rather than the last one.
        name: Title; None takes the name of the repository or of the output folder.
        metadata: More entries of the card's metadata: `language`, `license`, `tags`. None is left
            out; `tags` are added to those of the package.

    Returns:
        False if README.md was left unchanged.
    """
    path = folder / "README.md"
    if path.exists() and not _replaceable(path.read_text(encoding="utf-8")):
        return False
    title = name or last_part(args.hub_model_id or Path(str(args.output_dir)).absolute())
    write_model_card(folder, run_facts(model, args, state, title, best=best))
    card = ModelCard.load(path)
    for key, value in metadata.items():
        public = _public_entry(value)
        if key == "tags" and public:
            given = [public] if isinstance(public, str) else public
            card.data.tags = list(dict.fromkeys([*card.data.tags, *given]))
        elif public:
            setattr(card.data, key, public)
    card.text = f"{card.text.rstrip()}\n\n{MARK}\n"
    card.save(path)
    return True


def _public_entry(value: Any) -> Any:
    """An entry of the metadata without local paths and secrets; None if nothing is left."""
    if value is None or isinstance(value, str):
        return public_name(value)
    return [name for name in map(public_name, value) if name]


def _replaceable(card: str) -> bool:
    """True for a model card of this package and for the empty one that peft saves."""
    return MARK in card or "[More Information Needed]" in card


def run_facts(
    model: PicoModel,
    args: PicoTrainingArguments,
    state: TrainerState,
    name: str,
    *,
    best: bool = False,
) -> ModelFacts:
    """Collects what the log of a run says; the arguments are those of `write_run_card`."""
    step = state.best_global_step if best and state.best_global_step else state.global_step
    history = [entry for entry in state.log_history if entry["step"] <= step]
    # What proposes at the end is built and scored after the last step, for the best checkpoint too.
    found = logged_refinements(state.log_history)
    ended = [entry for entry in found if SOURCES[entry["source"]] == "end"]
    # A checkpoint was saved before what its evaluation led to.
    kept = [entry for entry in found if entry not in ended and (not best or entry["step"] < step)]
    shown = {key: getattr(args, key) for key in _SHOWN} | {"loss": model.config.loss}
    if model.config.keep_special_tokens:
        shown["keep_special_tokens"] = True
    return ModelFacts(
        name=name,
        results=_results(state.log_history if ended else history),
        column_weights=model.column_weights,
        semantic_probability=model.semantic_probability,
        pooled_share=model.pooled_share,
        refinements=[*kept, *ended],
        arguments={**shown, "step": step},
        base_model=_origin(model),
        adapter=any(".lora_" in name for name, _ in model.named_parameters()),
    )


def _results(history: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The last metrics of every evaluated split, `{"dev": {"encoder": …, "PICO": {"rsum": …}}}`."""
    results = {}
    for entry in history:
        for key in entry:
            prefix = key.removesuffix("_rsum")
            if not key.startswith("eval_") or prefix == key:
                continue
            if f"{prefix.removesuffix('_encoder')}_rsum" in entry and prefix.endswith("_encoder"):
                continue  # of the encoder beside a model, not of a split of that name
            split = prefix.removeprefix("eval").strip("_") or "dev"
            results[split] = models_of_metrics(entry, f"{prefix}_")
    return results


def _origin(model: PicoModel) -> str:
    """The Hub id of the encoder, or a description if it was loaded from elsewhere."""
    name = getattr(model.encoder.config, "_name_or_path", "") or ""
    return name if is_hub_id(name) else f"Encoder of type {model.encoder.config.model_type}"
