"""What is fuzzed: each target changes one input and gives it to the package.

A target is called with an empty folder and a source of chance. It returns if the outcome is a value
that is finite and of use, which it checks by assertions, and else lets the error out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import TrainerState

from fuzz_mutations import NASTY, change_bytes, change_json, change_safetensors, json_bytes
from pico_hf import PicoIndex, PicoModel, PicoPrototypes, load_image_text
from pico_hf.cli.main import run as run_command
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.checking import checked_rows
from pico_hf.data.collator import PicoCollator
from pico_hf.data.images import as_rgb
from pico_hf.data.raw_inputs import caption_rows, image_list, image_rows, text_list
from pico_hf.data.token_store import TokenStore
from pico_hf.lora import pico_lora_config, save_adapter
from pico_hf.model_and_processor import model_and_processor
from pico_hf.search.files import _digest
from pico_hf.training.cache_folder import cache_entries
from pico_hf.training.resuming import check_checkpoint_weights, chosen_checkpoint
from tiny import tiny_inputs, tiny_processor, tiny_refined, tiny_rows
from tiny_trainer import tiny_trainer

Target = Callable[[Path, Random], None]
ROOT = Path(os.environ.get("PICO_FUZZ_ROOT", "/nowhere"))


class NoChange(Random):
    """Leaves files as they are: every target must take them."""


def whole(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of files as they should be, made once for all processes."""
    folder = Path(os.environ["PICO_FUZZ_ROOT"]) / "whole" / name
    if not folder.is_dir():
        making = folder.with_name(f"{name}.{os.getpid()}")
        making.mkdir(parents=True)
        make(making)
        with contextlib.suppress(OSError):  # another process was faster
            making.rename(folder)
    return folder


def changed(source: Path, folder: Path, chance: Random, names: list[str]) -> str:
    """Links a whole folder's files, one of them changed; its name."""
    name = chance.choice(names)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.relative_to(source).as_posix() != name:
            os.link(file, target)
    (folder / name).write_bytes(changed_file(source / name, chance))
    return name


@cache
def _content(path: Path) -> bytes:
    return path.read_bytes()


def changed_file(path: Path, chance: Random) -> bytes:
    data = _content(path)
    if isinstance(chance, NoChange):
        return data
    if path.suffix == ".json":
        return json_bytes(json.loads(data), chance)
    if path.suffix == ".safetensors":
        return change_safetensors(data, chance)
    return change_bytes(data, chance)


def finite(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), "not finite"


@torch.no_grad()
def usable(model: Any) -> None:
    """Scores of the model are numbers, and all of its tensors are."""
    finite(*model.state_dict().values())
    assert model.semantic_probability.min() >= 0
    assert model.semantic_probability.max() <= 1
    if getattr(model.config.encoder_config.vision_config, "image_size", 32) == 32:
        output = model(**tiny_inputs())
        finite(output.logits_per_image, output.loss)


# ---- models --------------------------------------------------------------------------------


def model_folder() -> Path:
    return whole("model", lambda folder: tiny_refined().save_pretrained(folder))


def config(folder: Path, chance: Random) -> None:
    changed(model_folder(), folder, chance, ["config.json"])
    usable(PicoModel.from_pretrained(folder))


def weights(folder: Path, chance: Random) -> None:
    changed(model_folder(), folder, chance, ["model.safetensors"])
    usable(PicoModel.from_pretrained(folder))


def index(folder: Path, chance: Random) -> None:
    source = whole(
        "shards", lambda folder: tiny_refined().save_pretrained(folder, max_shard_size="40KB")
    )
    changed(source, folder, chance, ["model.safetensors.index.json"])
    usable(PicoModel.from_pretrained(folder))


def prototypes(folder: Path, chance: Random) -> None:
    files = ["prototypes.json", "prototypes.safetensors"]
    changed(model_folder(), folder, chance, files)
    found = PicoPrototypes.from_pretrained(folder)
    finite(*found.state_dict().values())
    assert isinstance(found.fingerprint, dict)
    with contextlib.suppress(ValueError):
        found.check_fit(_live().encoder, 16)


@cache
def _live() -> Any:
    return PicoModel.from_pretrained(model_folder())


def _make_adapter(folder: Path) -> None:
    from peft import get_peft_model

    model = PicoModel.from_pretrained(model_folder())
    save_adapter(get_peft_model(model, pico_lora_config(model)), folder)


def adapter(folder: Path, chance: Random) -> None:
    files = ["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"]
    changed(whole("adapter", _make_adapter), folder, chance, [*files, "config.json"])
    usable(PicoModel.from_pretrained(folder))


def processor(folder: Path, chance: Random) -> None:
    source = whole("processor", lambda folder: tiny_processor().save_pretrained(folder))
    names = [path.name for path in sorted(source.iterdir()) if path.suffix == ".json"]
    changed(source, folder, chance, names)
    _, found = model_and_processor(_live(), folder)
    batch = PicoCollator(found, config=_live().config)(
        [{"image": Image.new("RGB", (40, 30), "red"), "caption": "a red square"}]
    )
    finite(*batch.values())


# ---- runs ----------------------------------------------------------------------------------


def _make_run(folder: Path) -> None:
    knobs = {"eval_strategy": "no", "refine_prototypes": False, "max_steps": 1, "save_steps": 1}
    knobs |= {"load_best_model_at_end": False, "save_strategy": "steps"}
    trainer = tiny_trainer(folder, **knobs)
    trainer.train()
    (folder / "facts.json").write_text(json.dumps(trainer._facts))
    shutil.move(str(folder / "run" / "checkpoint-1"), folder / "checkpoint-1")
    shutil.rmtree(folder / "run")


@cache
def _trained() -> Any:
    return PicoModel.from_pretrained(whole("run", _make_run) / "checkpoint-1")


def checkpoint(folder: Path, chance: Random) -> None:
    source = whole("run", _make_run)
    files = ["trainer_state.json", "trainer_state.json", "pico_checkpoint.json", "optimizer.pt"]
    files += ["scheduler.pt", "rng_state.pth", "model.safetensors", "config.json"]
    name = changed(source, folder, chance, [f"checkpoint-1/{name}" for name in files])
    facts = json.loads(_content(source / "facts.json"))
    asked = True if chance.random() < 0.3 else str(folder / "checkpoint-1")
    found = Path(chosen_checkpoint(asked, folder, facts))
    check_checkpoint_weights(found, _trained())
    state = TrainerState.load_from_json(str(found / "trainer_state.json"))
    assert type(state.global_step) is int
    assert 0 <= state.global_step < 2**53, name
    assert isinstance(state.log_history, list)


def cached_features(folder: Path, chance: Random) -> None:
    key = "image_hidden_states"

    def make(folder: Path) -> None:
        features = TokenFeatures(torch.randn(5, 4, 8), torch.ones(5, 4).bool(), torch.randn(5, 8))
        TokenStore.write(folder / "images", iter([features]))
        about = {"encoder": "clip", "images": 5, "captions": 5}
        (folder / "about.json").write_text(json.dumps(about))

    names = ["images/ends.npy", "images/tokens.f16", "images/pooled.f16", "about.json"]
    changed(whole("cache", make), folder / "entry", chance, names)
    for entry in cache_entries(folder):
        assert isinstance(entry.images, int)
        print(f"{entry.key} {entry.size / 1e6:10.1f} {entry.encoder}, {entry.captions}")
    store = TokenStore(folder / "entry" / "images", key)
    assert len(store) > 0
    for row in range(len(store)):
        finite(*store[row].values())


# ---- collections ---------------------------------------------------------------------------


def _make_collection(folder: Path) -> None:
    torch.manual_seed(0)
    made = PicoIndex.create(folder / "index")
    features = torch.nn.functional.normalize(torch.randn(6, 3, 8), dim=-1)
    pooled = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    ids = [f"image {row}" for row in range(6)]
    payloads = [{"kind": "even" if row % 2 else "odd"} for row in range(6)]
    made.add_features(TokenFeatures(features, torch.ones(6, 3).bool(), pooled), ids, payloads)


def collection(folder: Path, chance: Random) -> None:
    source = whole("collection", _make_collection) / "index"
    shards = [path.relative_to(source).as_posix() for path in sorted(source.glob("shards/*"))]
    name = changed(source, folder, chance, ["index.json", "index.json", *shards])
    if chance.random() < 0.7:
        _sign(folder, name)
    found = PicoIndex.open(folder, verify=chance.random() < 0.5)
    query = torch.nn.functional.normalize(torch.randn(1, 2, 8), dim=-1)
    words = TokenFeatures(query, torch.ones(1, 2).bool())
    for hits in found.search(words, top_k=3):
        for hit in hits:
            assert np.isfinite(hit.score)
            assert isinstance(found.payload(hit.id), dict)
    assert len(found.ids()) == len(found)


def _sign(folder: Path, name: str) -> None:
    """Makes digests right again, as who writes a hostile file would."""
    from pico_hf.search.files import file_digest

    try:
        manifest = json.loads((folder / "index.json").read_text())
        if name != "index.json":
            for shard in manifest["shards"]:
                for suffix in shard["digests"]:
                    path = folder / "shards" / f"{shard['name']}{suffix}"
                    shard["digests"][suffix] = file_digest(path)
        content = {k: v for k, v in manifest.items() if k not in ("format", "version", "digest")}
        manifest["digest"] = _digest(content)
        (folder / "index.json").write_text(json.dumps(manifest))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # not to be signed


# ---- data ----------------------------------------------------------------------------------


@cache
def pictures() -> list[tuple[str, bytes]]:
    """Images of all kinds as files."""
    grey = np.arange(24 * 18).reshape(18, 24) % 256
    rgb = Image.fromarray(np.stack([grey, grey[::-1], 255 - grey], 2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    made = [("PNG", rgb), ("PNG", rgb.quantize()), ("PNG", rgb.convert("RGBA"))]
    made += [("PNG", Image.fromarray((grey * 257).astype(np.uint16))), ("JPEG", rgb)]
    made += [("JPEG", rgb.convert("CMYK")), ("GIF", rgb), ("WEBP", rgb), ("BMP", rgb)]
    made += [("TIFF", rgb), ("TIFF", Image.fromarray(grey.astype(np.float32))), ("PPM", rgb)]
    made += [("JPEG2000", rgb), ("ICO", rgb), ("TGA", rgb), ("PCX", rgb), ("SGI", rgb)]
    found = []
    for kind, image in made:
        buffer = io.BytesIO()
        options = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
        image.save(buffer, kind, **options)
        found.append((kind, buffer.getvalue()))
    frames = io.BytesIO()
    rgb.save(frames, "GIF", save_all=True, append_images=[rgb.rotate(90)])
    return [*found, ("GIF", frames.getvalue())]


def images(folder: Path, chance: Random) -> None:
    _, data = chance.choice(pictures())
    data = change_bytes(data, chance)
    if chance.random() < 0.2:
        path = folder / chance.choice(("a.jpg", "a.png", "a"))
        path.write_bytes(data)
        data = path
    image = as_rgb(data)
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= 2**25


def odd_value(chance: Random, depth: int = 0) -> Any:
    """Something that somebody might hand over where an image or a text should be."""
    how = chance.randrange(9 if depth < 3 else 7)
    if how == 0:
        shape = [chance.choice((0, 1, 2, 3, 4, 7)) for _ in range(chance.randrange(6))]
        kind = chance.choice(
            ("u1", "u2", "i4", "i8", "f2", "f4", "f8", "c8", "?", "U3", "O", "M8[s]")
        )
        array = np.zeros(shape, kind)
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            array[...] = chance.choice((0, 1, -1, 255, 1e38, np.nan, np.inf))
        return array
    if how == 1:
        values = torch.zeros([chance.choice((0, 1, 3, 5)) for _ in range(chance.randrange(5))])
        return values.to(chance.choice((torch.float32, torch.bfloat16, torch.int64, torch.bool)))
    if how == 2:
        return change_bytes(chance.choice(pictures())[1], chance)
    if how == 3:
        return chance.choice(
            ("a red disc", "/dev/zero", "/", "no.png", "http://x", "a\0b", "data:,")
        )
    if how == 4:
        return Image.new(
            chance.choice(("L", "RGB", "F", "P", "1")), chance.choice(((3, 4), (0, 1)))
        )
    if how == 5:
        return chance.choice((object(), 1 + 2j, range(3), {1, 2}, Ellipsis, len, np.float32(2)))
    if how == 6:
        return chance.choice(NASTY)
    if how == 7:
        return [odd_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    keys = ("bytes", "path", "image", "x", 3)
    return {chance.choice(keys): odd_value(chance, depth + 1) for _ in range(2)}


def raw_inputs(folder: Path, chance: Random) -> None:
    value = odd_value(chance)
    if chance.random() < 0.6:
        rows = image_rows(image_list(value), (255, 255, 255))
        assert all(rows[row]["image"].mode == "RGB" for row in range(min(len(rows), 3)))
    else:
        rows = caption_rows(text_list(value))
        assert all(rows[row]["caption"].strip() for row in range(min(len(rows), 3)))


def rows_in_memory(folder: Path, chance: Random) -> None:
    """Rows as `datasets` takes them; what itself refuses is none of ours."""
    good = [data for _, data in pictures()]
    table = {}
    for name in chance.sample(("image", "captions", "caption", "text", "label", "image_id"), 3):
        kind = chance.randrange(4)
        if kind == 0:
            table[name] = [chance.choice(good) for _ in range(3)]
        elif kind == 1:
            table[name] = [chance.choice(("a disc", "", " ", None, "x" * 9000)) for _ in range(3)]
        elif kind == 2:
            nested = (["a"], [], [None], ["a", " "], None)
            table[name] = [chance.choice(nested) for _ in range(3)]
        else:
            table[name] = [odd_value(chance)] * 3
    try:
        rows = datasets.Dataset.from_dict(table)
        if chance.random() < 0.3:
            rows = rows.cast_column("image", datasets.Image())
    except Exception:
        return
    _check_rows(checked_rows(rows, skip_bad_images=chance.random() < 0.5))


def _check_rows(rows: Any) -> None:
    assert len(rows) > 0
    for captions in rows["captions"]:
        assert captions
        assert all(isinstance(text, str) and text.strip() for text in captions)


def _make_tables(folder: Path) -> None:
    rows = tiny_rows(3).cast_column("image", datasets.Image(decode=False))
    rows.to_parquet(folder / "rows.parquet")
    (folder / "a.png").write_bytes(pictures()[0][1])
    lines = [{"image": "a.png", "captions": [f"a {word}", "b"]} for word in ("disc", "square")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "rows.csv").write_text('image,caption\na.png,"a disc, red"\na.png,a square\n')


def rows_in_files(folder: Path, chance: Random) -> None:
    source = whole("tables", _make_tables)
    kind = chance.choice(("csv", "jsonl", "parquet"))
    shutil.copy(source / "a.png", folder)
    path = folder / f"rows.{kind}"
    if kind == "jsonl" and chance.random() < 0.7:
        lines = [json.loads(line) for line in _content(source / path.name).splitlines()]
        path.write_text("\n".join(json.dumps(change_json(line, chance)) for line in lines))
    else:
        path.write_bytes(change_bytes(_content(source / path.name), chance))
    _check_rows(load_image_text(files=str(path), skip_bad_images=chance.random() < 0.5))


# ---- the command ---------------------------------------------------------------------------


def command_line(folder: Path, chance: Random) -> None:
    """Anything on the command line ends with 0, or with one line and 1 or 2."""
    values = ["", "x", "..", "-", "--", "a\0b", "\udcff", "x" * 5000, str(folder), "none", "-1"]
    values += [str(folder / "a.png"), str(model_folder()), "/dev/null", "--fold", "--clear", "all"]
    (folder / "a.png").write_bytes(change_bytes(pictures()[0][1], chance))
    command = chance.choice(("export", "explain", "info", "search", "cache", "cache", "no", ""))
    words = [command, *(chance.choice(values) for _ in range(chance.randrange(5)))]
    if command == "cache":  # never the user's own
        words[1:1] = [str(folder)]
    said = io.StringIO()
    quiet = contextlib.redirect_stdout(io.StringIO())
    with contextlib.chdir(folder), contextlib.redirect_stderr(said), quiet:
        code: Any = 0
        try:
            code = run_command(words)
        except SystemExit as end:
            code = end.code
    text = said.getvalue()
    assert code in (0, 2) or text.startswith("pico-hf: "), f"{words} ended {code!r}"
    assert code in (0, 2) or "\n" not in text.strip(), f"{words}: several lines"


# Target → its share of all inputs, in thousandths.
TARGETS: dict[Target, int] = {
    images: 320,
    raw_inputs: 220,
    cached_features: 110,
    collection: 90,
    prototypes: 80,
    checkpoint: 50,
    weights: 40,
    config: 30,
    rows_in_memory: 20,
    processor: 15,
    index: 10,
    command_line: 8,
    rows_in_files: 4,
    adapter: 3,
}
