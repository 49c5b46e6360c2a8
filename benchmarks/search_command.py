"""A search in two stages beside an exact scan, as `pico-hf` runs them, on real features.

Run: python benchmarks/search_command.py --model outputs/flickr
     python benchmarks/search_command.py --model outputs/flickr --drawings --images 20000

The model is one that `examples/run_pico.py --train_file …/train-0.parquet` has trained on frozen
Lite0 and MiniLM; without --model a small one is trained first. 1,000 photos are indexed by
`pico-hf index`; 200 captions are searched by `pico-hf search`, exactly and in two stages, by turns.
Times are medians over queries, from tokens to ranked images. With --drawings the index holds tokens
of drawings, repeated with noise until there are as many as --images says; its queries are names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch

from search import BARS, DEPTH, LOSS

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"  # beside the repository
LITE = ROOT / "examples" / "lite_clip.py"
BLOCK = 500
STORED = [("float16", 1), ("float32", 1), ("int8", 1), ("float16", 2), ("float16", 4)]
NOISE = 0.5  # length of the noise beside a token of length 1


def pico_hf(*words: Any) -> dict[str, Any]:
    """What a command answers, in a process of its own with the embedded encoders registered."""
    command = [sys.executable, "-m", "pico_hf_command", "--import", LITE, *words, "--json"]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def train(data: Path, folder: Path) -> Path:
    """A small model: frozen towers, 2,000 photos."""
    options = {
        "train_file": data / "flickr8k" / "train-0.parquet",
        "max_train_samples": 2000,
        "num_train_epochs": 8,
        "learning_rate": 2e-3,
        "column_dropout": 0.3,
        "num_prototypes": 8,
        "output_dir": folder,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    script = [sys.executable, str(ROOT / "examples" / "run_pico.py"), *words]
    jobs = ["--do_train", "--do_eval", "--freeze_encoder", "--compare_base=False"]
    subprocess.run([*script, *jobs], check=True)
    return folder


def photos(
    data: Path, model: Path, index: Path, queries: int, options: Sequence[str] = ()
) -> tuple[Path, list[str], list[str]]:
    """(index of the photos, captions, ids of their photos)."""
    file = data / "flickr8k" / "val.parquet"
    words = ("index", file, index, "--model", model, "--id-column", "image_id", *options)
    print(f"{pico_hf(*words)['images']:,} photos indexed by the command line", flush=True)
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train")
    rows = rows.select(range(0, len(rows), len(rows) // queries)).select_columns(
        ["image_id", "captions"]
    )
    captions = [" ".join(own[0].split()) for own in rows["captions"]]
    return index, captions, [str(key) for key in rows["image_id"]]


def drawings(
    data: Path, model: Path, folder: Path, images: int, queries: int
) -> tuple[Path, list[str], list[str]]:
    """(index of drawings repeated with noise, names, ids of the drawings as they are)."""
    sys.path.insert(0, str(LITE.parent))
    import lite_clip  # noqa: F401  registers the encoders
    from pico_hf import PicoIndex, PicoRetriever, TokenFeatures

    file = data / "emoji-styles" / "validation.parquet"
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train")
    rows = rows.select(range(0, len(rows), max(1, len(rows) // 1000))).select(range(1000))
    retriever = PicoRetriever.from_pretrained(model)
    features = retriever.encode_images(list(rows["image"]))
    index = PicoIndex.create(folder / "drawings", retriever)
    generator = torch.Generator().manual_seed(0)
    for copy in range(0, images // len(rows)):
        for first in range(0, len(rows), BLOCK):
            part = slice(first, first + BLOCK)
            noise = torch.randn(features.features[part].shape, generator=generator)
            length = NOISE * bool(copy) / noise.shape[-1] ** 0.5
            noisy = torch.nn.functional.normalize(features.features[part] + length * noise, dim=-1)
            pooled = features.pooled
            if pooled is not None:
                pooled = pooled[part] + length * noise.mean(dim=1)
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            ids = [f"{row}/{copy}" for row in range(first, first + len(noisy))]
            index.add_features(TokenFeatures(noisy, features.mask[part], pooled), ids)
    index.compact()
    chosen = range(0, len(rows), len(rows) // queries)
    names = [rows[row]["label"] for row in chosen]
    return folder / "drawings", names, [f"{row}/0" for row in chosen]


def measure(
    index: Path,
    queries: Sequence[str],
    answers: Sequence[str],
    model: Path,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Medians, R@10 and shared top 10 of both ways."""
    file = index.parent / "queries.txt"
    file.write_text("\n".join(queries) + "\n", encoding="utf-8")
    seconds: dict[str, list[float]] = {"exact": [], "stages": []}
    found: dict[str, list[list[str]]] = {}
    encoding: list[float] = []
    for _ in range(args.rounds):
        for scan, own in seconds.items():
            words = ("search", index, "--queries", file, "--model", model, "--scan", scan)
            results = pico_hf(*words, "--depth", args.depth)["results"]
            own += [result["search_seconds"] for result in results]
            encoding += [result["encode_seconds"] for result in results]
            found[scan] = [[hit["id"] for hit in result["hits"]] for result in results]
    recall = {
        scan: statistics.mean(key in ids for key, ids in zip(answers, lists, strict=True))
        for scan, lists in found.items()
    }
    both = zip(found["exact"], found["stages"], strict=True)
    exact, stages = (statistics.median(seconds[scan]) for scan in ("exact", "stages"))
    return {
        "ratio": stages / exact,
        "exact": exact,
        "stages": stages,
        "encode": statistics.median(encoding),
        "recall": recall["exact"],
        "two": recall["stages"],
        "shared": statistics.mean(len(set(a) & set(b)) / len(a) for a, b in both),
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="trained folder; default: train a small one")
    parser.add_argument("--data", type=Path, default=DATA, help="flickr8k and emoji-styles")
    parser.add_argument("--drawings", action="store_true", help="drawings in place of photos")
    parser.add_argument("--images", type=int, default=20_000, help="with --drawings")
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2, help="of both ways, by turns")
    parser.add_argument("--stored", action="store_true", help="photos: every way of storing them")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bar is missed")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    if not args.data.is_dir():
        print(f"The images of this measurement are not on this machine: no folder {args.data}.")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or train(args.data, folder / "model")
        print("| images | stored as | depth | two stages / scan | R@10 scan | two stages |", end="")
        print(" same top 10 | encoding |\n|---|---|---|---|---|---|---|---|")
        missed = False
        if args.drawings:
            made = drawings(args.data, model, folder, args.images, args.queries)
            missed = row(args.images, "float16", measure(*made, model, args), args.depth)
        else:
            for storage, merging in STORED if args.stored else STORED[:1]:
                options = ("--storage", storage, "--token-merging", str(merging))
                index = folder / f"{storage}-{merging}"
                made = photos(args.data, model, index, args.queries, options)
                name = storage if merging == 1 else f"{storage}, 1 token of {merging}"
                missed |= row(1000, name, measure(*made, model, args), args.depth)
    sys.exit(args.check and missed)


def row(images: int, name: str, found: dict[str, float], depth: int) -> bool:
    """Prints a line of the table; True if a bar is missed."""
    print(
        f"| {images:,} | {name} | {depth} | {found['ratio']:.3f} × | {found['recall']:.3f} "
        f"| {found['two']:.3f} | {found['shared']:.3f} "
        f"| {found['encode'] / found['exact']:.2f} × the scan |",
        flush=True,
    )
    return found["ratio"] > BARS.get(images, 1.0) or found["recall"] - found["two"] > LOSS


if __name__ == "__main__":
    main()
