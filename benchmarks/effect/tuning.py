"""How an encoder is tuned for drawings in a style that is new to it, in full or by LoRA.

Run: python benchmarks/effect/tuning.py   # after features.py and pretrained.py; tuning.yaml, folds
     python benchmarks/effect/tuning.py --config benchmarks/effect/tuned.yaml  # what was chosen
Two encoders meet the fluent family, which neither has seen: `clip`, the one of `pretrained.py`,
whose towers and projections are all tuned; and `lite0`, whose projections were trained on the
other families by `recipe("new_heads")` and whose text tower is tuned. On folds some of the known
concepts are left out for feedback and others for the test. The final comparison ranks concepts of
the official validation part: in the new style, and in the old ones, for what tuning forgets.
"""

from __future__ import annotations

import random
import time
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from safetensors.torch import load_model
from torch import Tensor
from torch.utils.data import Subset
from transformers import CLIPModel, Trainer, TrainingArguments, set_seed

from features import TEXTS
from pico_hf import (
    PicoCollator,
    PicoModel,
    PicoTrainer,
    PicoTrainingArguments,
    pico_lora_config,
    recipe,
)
from pico_hf.core.state import MOST_POOLED
from pico_hf.data.token_store import TokenStore
from pico_hf.training import model_calls
from pretrained import TOWER, pixels
from recipe import after, before
from study import Job, StoredSplit, Study, corpus_facts, from_command_line, row_numbers
from towers import processor

DATASET = "emoji/fluent"
HELD_OUT, FOLD_TEST = 123, 202  # concepts for feedback, and for the test of a fold
BATCH = 128


class MapSplit(StoredSplit):
    """Rows whose images are the maps of Lite0, which `clip` takes for pixels."""

    def __init__(self, *made_of: Any) -> None:
        super().__init__(*made_of)
        name, _, _, folder = self._made_of[:4]
        cells = TokenStore(folder / f"{name}-lite0", "cells")
        self._stores = Subset(cells, self.chosen), self._stores[1]

    def part(self, rows: list[int]) -> MapSplit:
        return MapSplit(self._made_of[0], [self.chosen[row] for row in rows], *self._made_of[1:])


class MapCollator(PicoCollator):
    """Makes pixels of maps."""

    def __call__(self, rows: list) -> dict[str, Tensor]:
        cells = [pixels(row["cells"]) for row in rows if "cells" in row]
        others = [{key: row[key] for key in row if key != "cells"} for row in rows]
        batch = super().__call__(others) if any(key != "image_ids" for key in others[0]) else {}
        return batch | ({"pixel_values": torch.stack(cells)} if cells else {})


def row_parts(study: Study, seed: int) -> dict[str, list[int]]:
    """Rows of the new style to train on, for feedback and for tests."""
    rows = row_numbers(DATASET, study.data)
    known, ids = rows["known concepts, unseen"], corpus_facts("emoji", study.data).ids
    concepts = sorted({ids[row] for row in known})
    drawn = random.Random(200 + seed).sample(concepts, HELD_OUT + FOLD_TEST)
    feedback, tested = set(drawn[:HELD_OUT]), set(drawn[HELD_OUT:])
    parts = {"feedback": [row for row in known if ids[row] in feedback]}
    if study.config["official"]:
        tested = set()
        parts |= {"new style": rows["unseen"], "old styles": rows["seen"]}
    else:
        parts["new style"] = [row for row in known if ids[row] in tested]
    left_out = feedback | tested
    return {"train": [row for row in known if ids[row] not in left_out], **parts}


def splits_of(study: Study, job: Job) -> dict[str, StoredSplit]:
    """Live images and texts for `clip`, stored images and live texts for `lite0`."""
    column, folder = TEXTS["emoji"][0], study.output / "features"
    made_of = ("lite0", column, folder, study.data, job.seed, False)
    if job.tower == "clip":
        kind, live = MapSplit, ("image", "text")
    else:
        kind, live = StoredSplit, ("text",) if job.tuned else ()
    parts = row_parts(study, job.seed)
    return {part: kind("emoji", rows, *made_of, live) for part, rows in parts.items()}


# ---- models -------------------------------------------------------------------------------------


def start(study: Study, job: Job, knobs: dict[str, Any]) -> Any:
    """The encoder as it comes, wrapped, and adapted where LoRA tunes it."""
    set_seed(job.seed)
    if job.tower == "clip":
        encoder = CLIPModel.from_pretrained(study.output / "towers" / TOWER)
        model = PicoModel.from_encoder(encoder, **knobs)
    else:
        model = with_heads(study, job.seed, knobs)
    set_seed(job.seed)
    if job.tuned and job.tuned.endswith("lora"):
        return get_peft_model(model, pico_lora_config(model))
    if job.tower != "clip":
        model.encoder.vision_model.requires_grad_(False)  # its outputs are stored
    return model


def with_heads(study: Study, seed: int, knobs: dict[str, Any]) -> PicoModel:
    """`lite0` with projections that were trained on the other families, once per seed."""
    heads, file = recipe("new_heads"), study.output / "tuning" / f"heads-{seed}.safetensors"
    job = Job(DATASET, "lite0", "infonce", seed, dropout=0.3)
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        model = study.start(job, **heads.model)
        trainer_of(study, job, study.splits(job), model, heads.training).train()
        model.save_pretrained(part := file.with_suffix(f".{seed}"))
        (part / "model.safetensors").rename(file)
    model = study.start(job, **{**heads.model, **knobs})
    load_model(model, file)
    return model


def trainer_of(
    study: Study, job: Job, splits: dict[str, Any], model: Any, training: dict[str, Any]
) -> PicoTrainer:
    """A trainer that constructs nothing by itself: rows without feedback are scored first."""
    args = PicoTrainingArguments(
        output_dir=study.run_folder,
        per_device_train_batch_size=BATCH,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        refine_prototypes=False,
        logging_steps=1000,
        seed=job.seed,
        report_to="none",
        disable_tqdm=True,
        **{"lr_scheduler_type": "cosine", **training},
    )
    pico = model if isinstance(model, PicoModel) else model.get_base_model()
    collate = MapCollator if job.tower == "clip" else PicoCollator
    return PicoTrainer(
        model,
        args,
        data_collator=collate(processor("lite0"), config=pico.config),
        train_dataset=splits["train"],
        eval_dataset=splits["feedback"],
        processing_class=processor("lite0"),
    )


def train_by_own_loss(trainer: PicoTrainer) -> None:
    """What a user does without us: the stock trainer and the encoder's own loss."""
    collate = trainer.data_collator

    def its_inputs(rows: list) -> dict[str, Any]:
        batch = collate(rows)
        names = ("pixel_values", "input_ids", "attention_mask")
        return {name: batch[name] for name in names} | {"return_loss": True}

    stock = TrainingArguments(
        output_dir=trainer.args.output_dir,
        per_device_train_batch_size=BATCH,
        learning_rate=trainer.args.learning_rate,
        num_train_epochs=trainer.args.num_train_epochs,
        max_grad_norm=trainer.args.max_grad_norm,
        weight_decay=trainer.args.weight_decay,
        lr_scheduler_type="cosine",
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="no",
        seed=trainer.args.seed,
        report_to="none",
        disable_tqdm=True,
    )
    encoder, pairs = trainer.pico_model.encoder, trainer.train_dataset
    Trainer(encoder, stock, data_collator=its_inputs, train_dataset=pairs).train()


def run(study: Study, job: Job, name: str) -> None:
    """Tunes by one recipe and scores without feedback and with it."""
    started, knobs = time.time(), study.config["recipes"][name]
    splits = splits_of(study, job)
    model = start(study, job, knobs.get("model", {}))
    trainer = trainer_of(study, job, splits, model, knobs.get("training", {}))
    if knobs.get("own_loss"):
        train_by_own_loss(trainer)
    elif "training" in knobs:
        with patch.object(model_calls, "MOST_POOLED", knobs.get("most_pooled", MOST_POOLED)):
            trainer.train()
    rows, share = before(trainer, splits)
    for row, metrics in rows.items():
        study.write(job, row, started, metrics=metrics, recipe=name, share=share)
    values = {"metrics": after(trainer, splits)}
    values |= {"share": trainer.pico_model.pooled_share}
    study.write(job, "feedback", started, recipe=name, **values)


def main() -> None:
    study, mine = from_command_line(__doc__, __file__)
    for seed in filter(mine, study.config["seeds"]):
        for name, knobs in study.config["recipes"].items():
            job = Job(DATASET, knobs["encoder"], "infonce", seed, tuned=knobs.get("tuned"))
            if not study.has(row="feedback", recipe=name, **vars(job)):
                run(study, job, name)


if __name__ == "__main__":
    main()
