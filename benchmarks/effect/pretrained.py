"""An encoder pretrained on pooled embeddings, wrapped: does it ever rank worse than by itself?

Run: python benchmarks/effect/pretrained.py --data DATA
There are no weights of a CLIP to be had without a Hub, so this trains one: a stock `CLIPModel` with
its stock loss on pooled embeddings, CLS with EOS, on the training parts of photos and of drawings
without the fluent family. Its images are the maps of Lite0 that `features.py` keeps, a cell per
patch (a hybrid ViT, Dosovitskiy et al., ICLR 2021), so that a quarter of an hour on one core takes
pooled retrieval far above chance. Then it is wrapped and aligned with few pairs of photos that it
has not seen, or of drawing styles that it has not seen, and compared with its own cosine on the
pairs that are left, paired by seed. `--special-tokens` does it once more with CLS among the patches
and BOS and EOS among the words (`keep_special_tokens`), and pairs both.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, set_seed

from features import GRID, TEXTS, corpus, store_names, texts, write_once
from pico_hf import PicoModel, PicoTrainer, PicoTrainingArguments
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.token_store import TokenStore
from pico_hf.encoders.tokens import image_hidden_states, text_hidden_states
from report import interval
from study import StoredSplit, corpus_facts, row_numbers
from towers import ROOT, processor

WIDTH = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
EPOCHS, BATCH, RATE, WORDS = 8, 256, 1e-3, 32
TOWER = "pretrained"
FIXED = {"tokens": 0.0, "half": 0.5}  # shares of pooled features that are not chosen
TEST_IMAGES = 400
PHOTOS, STYLES = "flickr8k", ("fluent-emoji-flat", "fluent-3d", "fluent-emoji-high-contrast")


@dataclass(frozen=True)
class Few:
    """How many pairs an alignment has, and how many of them give the feedback."""

    name: str
    train: int
    dev: int


SETTINGS = (
    Few("64 pairs for feedback, 192 for the estimate", 192, 64),
    Few("64 pairs, 16 of them for feedback", 48, 16),
    Few("64 pairs, no feedback", 64, 0),
)


# ---- pretraining ------------------------------------------------------------------------------


class Maps(Dataset):
    """(map as pixels, one of its captions) of some rows of a corpus.

    Args:
        name: Of the corpus.
        rows: Their numbers.
        output: Folder of the study.
        data: Of the corpora.
    """

    def __init__(self, name: str, rows: list[int], output: Path, data: Path) -> None:
        self.store = TokenStore(output / "features" / f"{name}-lite0", "cells")
        self.rows = rows
        captions = texts(corpus(name, data), TEXTS[name][0])
        self.captions = [captions[row] for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        return pixels(self.store[self.rows[number]]["cells"]), random.choice(self.captions[number])


def pixels(cells: Tensor) -> Tensor:
    """(16, columns) cells as an image of 4 × 4 pixels, (columns, 4, 4)."""
    return cells.float().t().unflatten(1, (GRID, GRID))


def new_encoder(tokenizer: Any, columns: int = 1280) -> CLIPModel:
    """A small CLIP with random weights whose images are maps."""
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": WORDS,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    grid = {"num_channels": columns, "image_size": GRID, "patch_size": 1}
    config = CLIPConfig(
        text_config={**WIDTH, **words}, vision_config={**WIDTH, **grid}, projection_dim=256
    )
    return CLIPModel(config)


def tokens_of(tokenizer: Any, captions: list[str]) -> dict[str, Tensor]:
    """Token ids and mask of some captions."""
    return tokenizer(
        captions,
        padding=True,
        truncation=True,
        max_length=WORDS,
        return_tensors="pt",
        return_token_type_ids=False,
    )


def pretrain(output: Path, data: Path, tokenizer: Any) -> CLIPModel:
    """Trains the encoder by its own loss on pooled embeddings."""
    pairs = ConcatDataset(
        Maps(dataset.partition("/")[0], row_numbers(dataset, data)["train"], output, data)
        for dataset in (PHOTOS, "emoji/fluent")
    )

    def collate(rows: list) -> dict[str, Tensor]:
        maps, captions = zip(*rows, strict=True)
        return {"pixel_values": torch.stack(maps), **tokens_of(tokenizer, list(captions))}

    loader = DataLoader(pairs, BATCH, shuffle=True, drop_last=True, collate_fn=collate)
    encoder = new_encoder(tokenizer)
    optimizer = torch.optim.AdamW(encoder.parameters(), RATE, weight_decay=0.1)
    steps = EPOCHS * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    bar = tqdm(total=steps, desc="Pretraining", mininterval=5)
    for _ in range(EPOCHS):
        for batch in loader:
            loss = encoder(**batch, return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return encoder.eval()


@torch.no_grad()
def keep_features(
    encoder: CLIPModel, output: Path, data: Path, tokenizer: Any, special: bool
) -> None:
    """Writes the towers' outputs over both corpora, as `features.py` does."""
    folder, kept_tokens = output / TOWER, {"keep_special_tokens": special}
    for name in ("flickr8k", "emoji"):
        cells = TokenStore(output / "features" / f"{name}-lite0", "cells")
        column = TEXTS[name][0]
        flat = [text for row in texts(corpus(name, data), column) for text in row]

        def image_batches(cells: TokenStore = cells) -> Iterator[TokenFeatures]:
            for start in range(0, len(cells), BATCH):
                rows = range(start, min(start + BATCH, len(cells)))
                maps = torch.stack([pixels(cells[row]["cells"]) for row in rows])
                yield image_hidden_states(encoder, maps, **kept_tokens)

        def text_batches(flat: list[str] = flat) -> Iterator[TokenFeatures]:
            for start in range(0, len(flat), BATCH):
                words = tokens_of(tokenizer, flat[start:][:BATCH])
                yield text_hidden_states(encoder, **words, **kept_tokens)

        names = store_names(name, TOWER, column, special)
        for store, batches in zip(names, (image_batches, text_batches), strict=True):
            if not (folder / store).exists():
                write_once(folder / store, batches())


# ---- wrapped ----------------------------------------------------------------------------------


def targets(data: Path) -> dict[str, tuple[str, list[int]]]:
    """What is retrieved: name → (corpus, rows that the encoder has not seen)."""
    photos = row_numbers(PHOTOS, data)
    drawings = row_numbers("emoji/fluent", data)["known concepts, unseen"]
    styles = corpus_facts("emoji", data).galleries
    return {
        "photos": (PHOTOS, [*photos["feedback"], *photos["dev"]]),
        **{style: ("emoji", [row for row in drawings if styles[row] == style]) for style in STYLES},
    }


def has_features(name: str, rows: list[int], output: Path) -> bool:
    """Whether the maps of all of these rows were computed; a store may hold zeros for some."""
    cells = TokenStore(output / "features" / f"{name}-lite0", "cells")
    return all(bool(cells[row]["cells"].any()) for row in rows)


def measure(
    encoder: Path,
    name: str,
    rows: list[int],
    few: Few,
    seed: int,
    output: Path,
    data: Path,
    special: bool,
) -> dict[str, Any]:
    """Wraps, aligns with few pairs, and ranks the pairs that are left."""
    order = random.Random(f"{name} {seed}").sample(rows, len(rows))
    test, train, dev = order[:TEST_IMAGES], order[TEST_IMAGES:], []
    train, dev = train[: few.train], train[few.train : few.train + few.dev]
    kept = (TOWER, TEXTS[name][0], output / TOWER, data, seed)
    parts = {"train": train, "dev": dev, "test": test}
    splits = {
        part: StoredSplit(name, chosen, *kept, special=special)
        for part, chosen in parts.items()
        if chosen
    }
    trainer = PicoTrainer(
        PicoModel.from_encoder(CLIPModel.from_pretrained(encoder), keep_special_tokens=special),
        PicoTrainingArguments(
            output_dir=str(output / "run"),
            per_device_train_batch_size=16,
            freeze_encoder=True,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=splits["train"],
        eval_dataset=splits.get("dev"),
        processing_class=processor("lite0"),
    )
    model = trainer.pico_model
    found = {"wrapped": trainer.evaluate(splits["test"])}
    for row, share in FIXED.items():
        model.prototypes.share_score(share)
        found[row] = trainer.evaluate(splits["test"])
    model.prototypes.share_score(1.0)
    trainer.construct_prototypes()
    found["aligned"] = trainer.evaluate(splits["test"])
    return {
        "encoder": found["wrapped"]["eval_encoder_rsum"],
        "encoder_r1": found["wrapped"]["eval_encoder_t2i_r1"],
        "encoder_r10": found["wrapped"]["eval_encoder_t2i_r10"],
        **{row: metrics["eval_rsum"] for row, metrics in found.items()},
        "share": model.pooled_share,
        "spread": float(model.column_weights.std(correction=0)),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """One row per target and setting: means over seeds, gains paired, ± 95 %."""
    head = ("target", "pairs", "encoder", "R@1", "R@10", "tokens", "wrapped", "aligned", "gain")
    shown = [f"| {' | '.join(head)} | m |", "|---|---|" + "---:|" * 8]
    for target, few in dict.fromkeys((line["target"], line["few"]) for line in lines):
        own = [line for line in lines if (line["target"], line["few"]) == (target, few)]
        names = ("encoder", "encoder_r1", "encoder_r10", "tokens", "wrapped", "aligned")
        means = [f"{sum(line[n] for line in own) / len(own):.1f}" for n in names]
        gains = [line["aligned"] - line["encoder"] for line in own]
        shares = ", ".join(f"{line['share']:.2f}" for line in own)
        shown.append(f"| {target} | {few} | {' | '.join(means)} | {interval(gains)} | {shares} |")
    return "\n".join(shown)


def paired(lines: list[dict[str, Any]]) -> str:
    """One row per target and setting: rSum with special tokens dropped, and what keeping adds."""
    rows = (*FIXED, "aligned")
    shown = [f"| target | pairs | {' | '.join(f'{row} | kept' for row in rows)} |"]
    shown.append("|---|---|" + "---:|" * 2 * len(rows))
    for target, few in dict.fromkeys((line["target"], line["few"]) for line in lines):
        by_seed: dict[bool, dict[int, dict[str, Any]]] = {False: {}, True: {}}
        for line in lines:
            if (line["target"], line["few"]) == (target, few):
                by_seed[bool(line.get("special"))][line["seed"]] = line
        both = [(by_seed[False][n], by_seed[True][n]) for n in by_seed[True] if n in by_seed[False]]
        cells = []
        for row in rows:
            pairs = [(one[row], other[row]) for one, other in both if row in one]
            if pairs:
                cells.append(f"{sum(one for one, _ in pairs) / len(pairs):.1f}")
                cells.append(interval([other - one for one, other in pairs]))
        if cells:
            shown.append(f"| {target} | {few} | {' | '.join(cells)} |")
    return "\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=Path("outputs/effect"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--special-tokens", action="store_true", help="also with them kept")
    args = parser.parse_args()
    folder, tokenizer = args.output / "towers" / TOWER, processor("lite0").tokenizer
    if not folder.exists():
        set_seed(0)
        pretrain(args.output, args.data, tokenizer).save_pretrained(folder)
    settings = (False, True) if args.special_tokens else (False,)
    encoder = CLIPModel.from_pretrained(folder)
    for special in settings:
        keep_features(encoder, args.output, args.data, tokenizer, special)
    file = args.output / "pretrained.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {}
    for target, (name, rows) in targets(args.data).items():
        if has_features(name, rows, args.output):
            known[target] = (name, rows)
        else:
            print(f"{target}: left out, since features of some of its images are missing.")
    for seed, (target, (name, rows)), few, special in product(
        range(args.seeds), known.items(), SETTINGS, settings
    ):
        key = {"target": target, "few": few.name, "seed": seed, "special": special}
        if any(all(line.get(k, False) == v for k, v in key.items()) for line in lines):
            continue
        found = measure(folder, name, rows, few, seed, args.output, args.data, special)
        lines.append({**key, **found})
        with file.open("a") as out:
            out.write(json.dumps(lines[-1]) + "\n")
        print(lines[-1], flush=True)
    dropped = [line for line in lines if not line.get("special")]
    print(
        f"\nChance: R@1 {100 / TEST_IMAGES:.2f}, R@10 {1000 / TEST_IMAGES:.1f}.\n\n{table(dropped)}"
    )
    if args.special_tokens:
        print(f"\nSpecial tokens kept, rSum added to that without:\n\n{paired(lines)}")


if __name__ == "__main__":
    main()
