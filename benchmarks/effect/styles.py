"""What style costs on the embedded drawings, and what helps against it, over several seeds.

Run: python benchmarks/effect/styles.py --seeds 5
Every seed trains the embedded pair with uniform column weights and with PICO, each without and with
column dropout, then scores both validation splits as they are and with every gallery calibrated by
its own unlabelled pictures. All rows of a seed share the start and the order of the data. Results
go to results.jsonl in the output folder, one line per seed and model; seeds that are there already
are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import t as student
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import set_seed

from pico_hf import ImageTextDataset, PicoCollator, PicoModel, PicoTrainer, PicoTrainingArguments
from pico_hf.data_loading import load_image_text
from pico_hf.evaluation import EncodedSplit, SplitEncoder, evaluate_retrieval
from pico_hf.similarity import TokenFeatures

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DRAWINGS = EXAMPLES / "data" / "emoji-styles"
COLUMNS = {"image_column": "image", "image_id_column": "concept", "gallery_column": "style"}
REFERENCE = 1024  # training pictures whose moments are the reference
# Whether prototypes are refined, and the share of columns left out in training.
MODELS = {
    "base": (False, 0.0),
    "PICO": (True, 0.0),
    "base, dropout": (False, 0.3),
    "PICO, dropout": (True, 0.3),
}


def split(name: str) -> ImageTextDataset:
    return ImageTextDataset(load_image_text(files=DRAWINGS / f"{name}.parquet", **COLUMNS))


def trained(
    seed: int, knobs: tuple[bool, float], data: dict[str, ImageTextDataset], folder: Path
) -> PicoTrainer:
    """One training run of the embedded job."""
    from lite_clip import load_lite_clip

    set_seed(seed)
    encoder, processor = load_lite_clip(256)
    args = PicoTrainingArguments(
        output_dir=str(folder / "run"),
        feature_cache_dir=str(folder / "features"),
        freeze_encoder=True,
        refine_prototypes=knobs[0],
        num_train_epochs=12,
        learning_rate=2e-3,
        per_device_train_batch_size=128,
        lr_scheduler_type="cosine",
        save_strategy="no",
        load_best_model_at_end=False,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PicoTrainer(
        PicoModel.from_encoder(encoder, column_dropout=knobs[1]),
        args,
        train_dataset=data["train"],
        eval_dataset=data["seen"],  # feeds the prototypes
        processing_class=processor,
    )
    trainer.train()
    return trainer


def encoded(trainer: PicoTrainer, rows: ImageTextDataset, calibrate: bool) -> EncodedSplit:
    """A split as token features; with `calibrate`, every gallery in the style of training."""
    model = trainer.pico_model.eval()
    collate: PicoCollator = trainer.data_collator
    plain = SplitEncoder(model, collate, disable_tqdm=True).split(rows)
    if not calibrate:
        return plain

    def batches(pictures: Dataset) -> DataLoader:
        return DataLoader(pictures, batch_size=64, collate_fn=collate)

    reference = batches(Subset(trainer.train_dataset.images(), range(REFERENCE)))
    features = plain.images.features.clone()
    for gallery in plain.gallery.unique():
        chosen = (plain.gallery == gallery).nonzero().flatten()
        pictures = batches(Subset(rows.images(), chosen.tolist()))
        model.calibrate(pictures, reference=reference)
        with torch.no_grad():
            features[chosen] = torch.cat([model.encode_images(**b).features for b in pictures])
    model.calibrate(None)
    return replace(plain, images=TokenFeatures(features, plain.images.mask))


def run(seeds: int, folder: Path) -> list[dict]:
    """Results of all seeds; those in the file are taken from there."""
    file = folder / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    data = {"train": split("train")}
    data |= {name: split(f"validation_{name}") for name in ("seen", "unseen")}
    for seed in range(seeds):
        for name, knobs in MODELS.items():
            if any((row["seed"], row["model"]) == (seed, name) for row in done):
                continue
            trainer = trained(seed, knobs, data, folder)
            row = {"seed": seed, "model": name}
            row["weight_std"] = float(trainer.pico_model.column_weights.std(correction=0))
            for part in ("seen", "unseen"):
                rows = trainer.get_eval_dataloader(data[part]).dataset  # cached features
                for how in (False, True):
                    key = f"{part} {'calibrated' if how else 'plain'}"
                    split_ = encoded(trainer, rows, how)
                    row[key] = evaluate_retrieval(trainer.pico_model, split_)["rsum"]
            done.append(row)
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
    return [row for row in done if row["seed"] < seeds]


def interval(values: list[float]) -> str:
    """Mean ± half of the 95 % interval of the mean, by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def table(results: list[dict]) -> str:
    """Markdown: rSum per model and split, and its difference to the base as it is, by seed."""
    base = {row["seed"]: row for row in results if row["model"] == "base"}
    lines = ["| model | seen | unseen | unseen − base |", "|---|---:|---:|---:|"]
    for name in MODELS:
        rows = [row for row in results if row["model"] == name]
        for how in ("plain", "calibrated"):
            seen, unseen = ([row[f"{part} {how}"] for row in rows] for part in ("seen", "unseen"))
            more = [row[f"unseen {how}"] - base[row["seed"]]["unseen plain"] for row in rows]
            label = name if how == "plain" else f"{name}, calibrated"
            shown = " | ".join(interval(values) for values in (seen, unseen, more))
            lines.append(f"| {label} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/effect/styles"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(EXAMPLES))
    print(table(run(args.seeds, args.output)))


if __name__ == "__main__":
    main()
