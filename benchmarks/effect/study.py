"""What every table of the study shares: splits of cached features, training, lines of results."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import yaml
from peft import get_peft_model
from pyarrow.parquet import read_metadata
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, Subset
from transformers import set_seed

from features import TEXTS, corpus, files, store_names, texts
from pico_hf import (
    ImageTextDataset,
    PicoModel,
    PicoTrainer,
    PicoTrainingArguments,
    pico_lora_config,
)
from pico_hf.data.cached_dataset import CachedImageTextDataset
from pico_hf.data.identity import content_digest
from pico_hf.data.token_store import TokenStore
from pico_hf.encoders.projection_modules import projection_parameters
from towers import ROOT, pico_model, processor

FAMILIES = {"google": "noto", "noto-v1": "noto"}  # two generations of one vendor
# Images, or concepts, of the training part that are left out of it and give feedback.
HELD_OUT = {"flickr8k": 500, "emoji": 123, "drawings": 100}


class StoredSplit(CachedImageTextDataset):
    """Some rows of a corpus, with features from the stores of `features.py`.

    Args:
        name: Of the corpus.
        chosen: Row numbers.
        tower: Name of the image tower.
        column: The text column.
        folder: Of the stores.
        data: Of the corpora.
        seed: Of the choice of captions.
        pooled: One token per item, its mean.
        live: Sides that come as they are, `"image"` and `"text"`, for towers that are trained.
        special: Features hold the towers' special tokens, too.
    """

    def __init__(
        self,
        name: str,
        chosen: list[int],
        tower: str,
        column: str,
        folder: Path,
        data: Path,
        seed: int,
        pooled: bool = False,
        live: tuple[str, ...] = (),
        special: bool = False,
    ) -> None:
        self._made_of = (name, tower, column, folder, data, seed, pooled, live, special)
        self.special_tokens = special
        self.chosen = chosen
        whole, captions = corpus_facts(name, data), _texts(name, column, data)
        starts = [0]
        for row in captions:
            starts.append(starts[-1] + len(row))
        columns = {"captions": [captions[row] for row in chosen]}
        columns["image_id"] = [whole.ids[row] for row in chosen]
        columns["gallery"] = [whole.galleries[row] for row in chosen]
        # Rows stay as they are, one per row of the stores: no two are joined as one image.
        columns["digest"] = [content_digest(f"{name} {row}") for row in chosen]
        rows = whole.images.select(chosen)
        for key, values in columns.items():
            rows = rows.add_column(key, values)
        ImageTextDataset.__init__(self, rows, seed)
        words = [n for row in chosen for n in range(starts[row], starts[row + 1])]
        sides = zip(store_names(name, tower, column, special), ("image", "text"), strict=True)
        stores = [TokenStore(folder / store, f"{side}_hidden_states") for store, side in sides]
        kept = [_Mean(store) if pooled else store for store in stores]
        self._stores = (
            ImageTextDataset.images(self) if "image" in live else Subset(kept[0], chosen),
            ImageTextDataset.captions(self) if "text" in live else Subset(kept[1], words),
        )

    def part(self, rows: list[int]) -> StoredSplit:
        """Some rows of this split."""
        chosen = [self.chosen[row] for row in rows]
        return StoredSplit(self._made_of[0], chosen, *self._made_of[1:])


class _Mean(Dataset):
    """Rows of one token each, the mean: heads are linear, so this is a pooled embedding."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> dict[str, Any]:
        ((key, tokens),) = self.store[row].items()
        return {key: tokens.float().mean(dim=0, keepdim=True).to(tokens.dtype)}


@dataclass(frozen=True)
class Corpus:
    """A corpus without its images' features: what a split needs to know of every row."""

    images: datasets.Dataset
    ids: list[str]
    galleries: list[str]
    official_validation: int  # first row of the official validation part


@cache
def corpus_facts(name: str, data: Path) -> Corpus:
    rows = corpus(name, data)
    trained_on = [file for file in files(name, data) if "train" in Path(file).name]
    first = sum(read_metadata(file).num_rows for file in trained_on)
    images = rows.select_columns(["image"])
    if name == "flickr8k":
        return Corpus(images, rows["image_id"], [""] * len(rows), first)
    return Corpus(images, rows["concept"], rows["style"], first)


@cache
def _texts(name: str, column: str, data: Path) -> list[list[str]]:
    return texts(corpus(name, data), column)


def family(style: str) -> str:
    """Drawing family of a style: the fluent-* share drawings, two styles share a vendor."""
    return "fluent" if style.startswith("fluent-") else FAMILIES.get(style, style)


def row_numbers(dataset: str, data: Path) -> dict[str, list[int]]:
    """Row numbers of train, feedback and test splits.

    Args:
        dataset: `"flickr8k"`, or `"emoji/FAMILY"` with the drawing family left out of training;
            `"drawings/fluent"`, the embedded ones, where that is done.
    """
    name, _, unseen = dataset.partition("/")
    whole = corpus_facts(name, data)
    official = range(whole.official_validation, len(whole.ids))
    names = sorted(set(whole.ids[: whole.official_validation]))
    feedback = set(random.Random(7).sample(names, HELD_OUT[name]))
    train = range(whole.official_validation)
    if name == "flickr8k":
        return {
            "train": [row for row in train if whole.ids[row] not in feedback],
            "feedback": [row for row in train if whole.ids[row] in feedback],
            "dev": list(official),
        }
    new = [family(style) == unseen for style in whole.galleries]
    parts = {
        "train": [row for row in train if whole.ids[row] not in feedback and not new[row]],
        "feedback": [row for row in train if whole.ids[row] in feedback and not new[row]],
        "seen": [row for row in official if not new[row]],
        "unseen": [row for row in official if new[row]],
        "known concepts, unseen": [
            row for row in train if whole.ids[row] not in feedback and new[row]
        ],
    }
    return {part: rows for part, rows in parts.items() if rows}


@dataclass(frozen=True)
class Job:
    """One network to be trained; every row of a table that shares it is paired by it.

    Attributes:
        dataset: See [`row_numbers`].
        tower: Image tower.
        loss: Training loss.
        seed: Of projections, data order and captions.
        column: Text column; None takes the data set's usual one.
        dropout: Share of the image tower's columns left out in training; None is 0.
        tuned: Which towers are trained, from the network of the same job with frozen ones: `"text"`
            or `"both"`, in full; `"text-lora"` or `"both-lora"`, by adapters. None freezes them.
        epochs: Of training; None takes the configuration's.
        special_tokens: Whether the towers' own take part; None drops them.
    """

    dataset: str
    tower: str
    loss: str
    seed: int
    column: str | None = None
    dropout: float | None = None
    tuned: str | None = None
    epochs: int | None = None
    special_tokens: bool | None = None


class Study:
    """Reads a config file, runs what is missing, and appends lines of results.

    Args:
        config: YAML file of a table.
        output: Folder of features, networks and results.
        data: Folder of the corpora.
    """

    def __init__(self, config: Path, output: Path, data: Path) -> None:
        self.config = yaml.safe_load(config.read_text(encoding="utf-8"))
        self.output, self.data = output, data
        self.file = output / f"{config.stem}.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        self._runs = TemporaryDirectory()  # nothing of a run is kept; several share an output

    @property
    def run_folder(self) -> str:
        """Where a trainer may write."""
        return self._runs.name

    # ---- results ---------------------------------------------------------------------------

    def done(self) -> list[dict[str, Any]]:
        """All lines so far."""
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def has(self, **key: Any) -> bool:
        """Whether there is a line with these values."""
        return any(all(line.get(k) == v for k, v in key.items()) for line in self.done())

    def missing(self, job: Job, rows: Iterable[str]) -> list[str]:
        """Those of the rows that a job has no line of."""
        return [row for row in rows if not self.has(row=row, **vars(job))]

    def write(self, job: Job, row: str, started: float, **values: Any) -> None:
        """Appends a line."""
        line = {**asdict(job), "row": row, **values}
        line |= {"seconds": round(time.time() - started, 1), "commit": commit()}
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        shown = {part: round(m["rsum"], 1) for part, m in values.get("metrics", {}).items()}
        print(*asdict(job).values(), f"{row}: {shown}", flush=True)

    def network(self, job: Job) -> Path:
        """Where the trained projections of a job are kept."""
        values = [
            str(value).replace("/", "_") for value in asdict(job).values() if value is not None
        ]
        name = "-".join(values)
        return self.output / "networks" / f"{name}.safetensors"

    def save(self, job: Job, model: PicoModel) -> None:
        """Keeps the trained projections and the scale of logits; towers are frozen."""
        file = self.network(job)
        file.parent.mkdir(exist_ok=True)
        heads = {f"encoder.{name}" for name in projection_parameters(model.encoder)}
        trained = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if name in heads or name.startswith("pair_logits.")
        }
        save_file(trained, file)

    def load(self, job: Job) -> PicoModel:
        """The trained network of a job."""
        model = self.start(job)
        restore(model, self.network(job))
        return model

    # ---- data and training -----------------------------------------------------------------

    def splits(self, job: Job, pooled: bool = False) -> dict[str, StoredSplit]:
        """Train, feedback and test splits of a job."""
        name = job.dataset.partition("/")[0]
        return {
            part: self.chosen(name, rows, job, pooled)
            for part, rows in row_numbers(job.dataset, self.data).items()
        }

    def unseen_themes(self, job: Job) -> StoredSplit:
        """All icons of `icon_themes.py`, a gallery per theme; nothing was chosen on them."""
        rows = range(len(corpus_facts("icons", self.data).ids))
        return self.chosen("icons", list(rows), replace(job, column=TEXTS["icons"][0]))

    def chosen(self, name: str, rows: list[int], job: Job, pooled: bool = False) -> StoredSplit:
        """Some rows of a corpus, as a job's tower sees them."""
        column = job.column or TEXTS[name][0]
        folder = self.output / "features"
        how = (job.seed, pooled, trained_sides(job), bool(job.special_tokens))
        return StoredSplit(name, rows, job.tower, column, folder, self.data, *how)

    def trainer(
        self, job: Job, splits: dict[str, Any], model: PicoModel | None = None, **run: Any
    ) -> PicoTrainer:
        """A trainer of this job's network, from the same start for every row of a seed."""
        args = PicoTrainingArguments(
            output_dir=self.run_folder,
            per_device_train_batch_size=self.config["training"]["batch_size"],
            lr_scheduler_type="cosine",
            eval_strategy=run.pop("eval_strategy", "no"),
            save_strategy="no",
            load_best_model_at_end=False,
            logging_steps=1000,
            seed=job.seed,
            report_to="none",
            disable_tqdm=True,
            **{**self.schedule(job), **run},
        )
        return PicoTrainer(
            model or self.start(job),
            args,
            train_dataset=splits["train"],
            eval_dataset=splits["feedback"],
            processing_class=processor(job.tower),
        )

    def schedule(self, job: Job) -> dict[str, Any]:
        """Epochs and learning rates, as training arguments."""
        knobs = self.config["tuning" if job.tuned else "training"]
        common = {
            "num_train_epochs": job.epochs or knobs["epochs"][job.dataset.partition("/")[0]],
            "learning_rate": knobs["learning_rate"],
        }
        if job.tuned is None:
            return {**common, "freeze_encoder": True}
        rate = knobs["tower_learning_rate"][job.tuned]
        return {**common, "tower_learning_rate": rate, "prototype_warmup_epochs": 0}

    def start(self, job: Job, **knobs: Any) -> PicoModel:
        """The pair with newly drawn projections, or with trained ones where towers are tuned."""
        set_seed(job.seed)
        knobs |= {"column_dropout": job.dropout or 0.0, "loss": job.loss}
        knobs["keep_special_tokens"] = bool(job.special_tokens)
        model = pico_model(job.tower, self.config["training"]["columns"], self.output, **knobs)
        sides = trained_sides(job)
        if "image" not in sides:
            model.encoder.vision_model.requires_grad_(False)
        if not sides:
            return model
        restore(model, self.network(replace(job, tuned=None)))
        if job.tuned.endswith("-lora"):
            return get_peft_model(model, pico_lora_config(model))
        return model


def restore(model: PicoModel, file: Path) -> None:
    """Fills in what [`Study.save`] kept.

    Raises:
        ValueError: If the file is of another network.
    """
    unknown = model.load_state_dict(load_file(file), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{file} has {', '.join(unknown)}, which this network has not.")


def trained_sides(job: Job) -> tuple[str, ...]:
    """Sides whose towers a job trains."""
    if job.tuned is None:
        return ()
    return ("text",) if job.tuned.startswith("text") else ("image", "text")


@cache
def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def from_command_line(about: str | None, script: str) -> tuple[Study, Callable[[int], bool]]:
    """The study a script is about, and whether a seed is this process's.

    Args:
        about: What the script says of itself.
        script: Its `__file__`; its config file stands beside it under the same name.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--config", type=Path, default=Path(script).with_suffix(".yaml"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=Path("outputs/effect"))
    parser.add_argument("--part", default="0/1", help="0/2 and 1/2 share the seeds")
    args = parser.parse_args()
    number, of = (int(value) for value in args.part.split("/"))
    return Study(args.config, args.output, args.data), lambda seed: seed % of == number
