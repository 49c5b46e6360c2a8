"""Image → image retrieval on the embedded drawings: w = 1 against PICO's weights.

Run: python benchmarks/image_retrieval.py  # five minutes of one core's time
Every drawing looks for drawings of its concept by other hands. The gallery is all other drawings,
or only those in other styles. No concept of the gallery occurs in training; the unseen family is a
hand that does not, either. The drawings in seen styles, with their captions, gave PICO's feedback.
Rows of one seed are one network, but for the last, which was trained on pairs of drawings in place
of drawings and captions.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import set_seed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from lite_clip import load_lite_clip  # noqa: E402
from pico_hf import (  # noqa: E402
    EncodedImagePairs,
    ImageTextDataset,
    PicoModel,
    PicoTrainer,
    PicoTrainingArguments,
    SplitEncoder,
    load_image_text,
)
from pico_hf.core.match_metrics import match_metrics  # noqa: E402
from pico_hf.training.feature_cache import cache_token_features  # noqa: E402
from pico_hf.training.image_retrieval import image_pair_scores  # noqa: E402

DATA = ROOT / "examples" / "data" / "emoji-styles"
SPLITS = {"seen styles": "validation_seen", "unseen family": "validation_unseen"}
METRICS = ("r1", "r5", "map")
RECIPE = {"learning_rate": 2e-3, "lr_scheduler_type": "cosine", "num_train_epochs": 12}


def trained_on_captions(seed: int, size: int, folder: Path) -> PicoTrainer:
    """A trainer whose model was trained by the recipe of `examples/run_pico.py`, and aligned."""
    train, dev = (images_and_captions(part, seed) for part in ("train", "validation_seen"))
    set_seed(seed)
    encoder, processor = load_lite_clip(256, image_size=size)
    arguments = PicoTrainingArguments(
        output_dir=str(folder / f"run{seed}"),
        seed=seed,
        freeze_encoder=True,
        feature_cache_dir=str(folder / "cache"),
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **RECIPE,
    )
    model = PicoModel.from_encoder(encoder, num_prototypes=8, column_dropout=0.3, pooled_share=0.0)
    trainer = PicoTrainer(
        model, arguments, train_dataset=train, eval_dataset=dev, processing_class=processor
    )
    trainer.train()
    return trainer


def train_on_drawings(model: PicoModel, drawings: ImageTextDataset) -> None:
    """Trains the projection of frozen towers on pairs of drawings of one concept.

    Args:
        model: Newly made.
        drawings: With tower outputs for pixels; its captions are not looked at.
    """
    model.freeze_towers()
    states = torch.stack([row["image_hidden_states"] for row in drawings.images()])
    ids, batch = drawings.image_ids, 128
    steps = RECIPE["num_train_epochs"] * (len(ids) // batch)
    heads = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(heads, RECIPE["learning_rate"], weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        queries = torch.randperm(len(ids))[:batch]
        targets = torch.stack([_another(ids, int(query)) for query in queries])
        output = model(
            image_hidden_states=states[torch.cat([queries, targets])],
            image_pairs=True,
            image_ids=ids[queries],
        )
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(heads, 2.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _another(ids: Tensor, query: int) -> Tensor:
    """A random image of the query's class besides itself, or the query if there is none."""
    matches = ((ids == ids[query]) & (torch.arange(len(ids)) != query)).nonzero().flatten()
    return matches[torch.randint(len(matches), ())] if len(matches) else torch.tensor(query)


def measured(
    seed: int, size: int, folder: Path
) -> Iterator[tuple[tuple[str, str, str], dict[str, float]]]:
    """((split, gallery, row of the table), metrics) of one seed."""
    trainer = trained_on_captions(seed, size, folder)
    encoder = trainer.split_encoder
    fresh = PicoModel.from_encoder(
        load_lite_clip(256, image_size=size)[0],
        column_dropout=0.3,
        loss="infonce",
        pooled_share=0.0,
    )
    torch.nn.init.constant_(fresh.logit_scale, math.log(10))
    train_on_drawings(fresh, trainer.train_dataset)
    other = replace(encoder, model=fresh)
    for split, part in SPLITS.items():
        drawings = cache_token_features(encoder, images_and_captions(part, seed), folder / "cache")
        captions, pairs = (encoded(one, drawings) for one in (encoder, other))
        for name, model, images, equal in (
            ("w = 1", encoder.model, captions, True),
            ("PICO", encoder.model, captions, False),
            ("w = 1, trained on drawings", fresh, pairs, True),
        ):
            weights = torch.ones_like(model.column_weights) if equal else None
            scores = image_pair_scores(model, images, weights)
            styles = drawings.gallery
            others = scores.masked_fill(styles.unsqueeze(1) == styles, -torch.inf)
            codes = images.query_ids, images.target_ids, images.query_images, images.target_images
            yield (split, "all others", name), match_metrics(scores, *codes)
            yield (split, "other styles", name), match_metrics(others, *codes)


def encoded(encoder: SplitEncoder, drawings: ImageTextDataset) -> EncodedImagePairs:
    """Every drawing as query and as target; its class is its concept."""
    batches = encoder.batches(drawings.images(), "Drawings")
    features = encoder.packed(images for images, _ in batches if images is not None)
    ids, numbers = drawings.image_ids, torch.arange(len(drawings))
    return EncodedImagePairs(features, features, ids, ids, numbers, numbers)


def images_and_captions(part: str, seed: int) -> ImageTextDataset:
    """One file of the embedded drawings; drawings of one concept have one identity."""
    columns = {"image_id_column": "concept", "gallery_column": "style"}
    return ImageTextDataset(load_image_text(files=DATA / f"{part}.parquet", **columns), seed)


def main() -> None:
    """Measures the seeds that the file of results lacks, and prints means and deviations of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("outputs/image-retrieval"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for seed in args.seeds:
        file = args.output / f"{args.image_size}-{seed}.json"
        if not file.exists():
            found = list(measured(seed, args.image_size, args.output))
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(found))
            partial.rename(file)
        for key, metrics in json.loads(file.read_text()):
            results.setdefault(tuple(key), []).append(metrics)
    print("| drawings | gallery | weights | R@1 | R@5 | mAP |\n|---|---|---|---:|---:|---:|")
    for names, runs in results.items():
        print(f"| {' | '.join(names)} | {' | '.join(_mean(runs, name) for name in METRICS)} |")


def _mean(runs: list[dict[str, float]], name: str) -> str:
    values = [metrics[name] for metrics in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
