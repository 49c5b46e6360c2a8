"""Training runs of one or several processes that are to end alike; started by test_processes.py."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist

from pico_hf import PicoModel
from pico_hf.training.feedback import Feedback
from tiny import tiny_encoder, tiny_processor, tiny_rows
from tiny_encoders import BUILDERS
from tiny_trainer import BARE, tiny_model, tiny_trainer

BATCH = 12  # pairs per step, of all processes together
STEPS = 20
ZERO = Path(__file__).parents[1] / "examples" / "deepspeed_zero2.json"


def ragged_rows(images: int) -> datasets.Dataset:
    """One to four captions per image, of one to six words."""
    rows = tiny_rows(images).to_dict()
    words = ["red", "green", "blue", "white", "big", "small", "square", "disc"]
    for number, captions in enumerate(rows["captions"]):
        more = [" ".join(words[(number + n) % 8 :][: n + 1]) for n in range(number % 3)]
        rows["captions"][number] = captions[: 1 + number % 2] + [text for text in more if text]
    return datasets.Dataset.from_dict(rows, features=tiny_rows(1).features)


def run(
    folder: Path,
    processes: int,
    model: Any = None,
    options: Any = None,
    *,
    resume: bool | str = False,
    guarded: bool = True,
    **knobs: Any,
):
    """Trains 20 steps, by plain gradient descent unless something else is wanted.

    AdamW turns the rounding of gradients that are zero into steps of full length. Unguarded, what
    feedback is asked about is taken, whether or not so short a run gains by it.
    """
    trainer = tiny_trainer(
        folder,
        {"train_dataset": ragged_rows(29), "model": model or tiny_model(loss="infonce")}
        | (options or {}),
        **{
            "per_device_train_batch_size": BATCH // processes,
            "dataloader_drop_last": False,
            "optim": "sgd",
            "learning_rate": 0.05,
            "tower_learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "max_steps": STEPS,
            "ddp_backend": "gloo" if processes > 1 else None,
            **knobs,
        },
    )
    trainer.feedback_class = partial(Feedback, guarded=guarded)
    before = flat(trainer.pico_model)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == knobs.get("max_steps", STEPS)
    return trainer, before


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def result(trainer: Any, before: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights and how far they went, losses, metrics, and every buffer."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    directions = ("loss_image_to_text", "loss_text_to_image")
    parts = [[entry.get(name, 0.0) for name in directions] for entry in history if "loss" in entry]
    metrics = [
        value
        for entry in history
        for name, value in sorted(entry.items())
        if re.fullmatch(r"eval_(i2t|t2i|rsum).*", name)
    ]
    state = {name: buffer.clone() for name, buffer in trainer.pico_model.named_buffers()}
    with trainer.whole_model():
        weights = flat(trainer.pico_model)
    return {
        "weights": weights,
        "moved": (weights - before).abs().max(),
        "losses": torch.tensor(losses),
        "parts": torch.tensor(parts),
        "metrics": torch.tensor(metrics),
    } | {f"buffer {name}": buffer for name, buffer in state.items()}


def trained(folder: Path, processes: int, **knobs: Any) -> dict[str, torch.Tensor]:
    return result(*run(folder, processes, **{**BARE, **knobs}))


def of_loss(loss: str) -> Callable[..., dict[str, torch.Tensor]]:
    def train(folder: Path, processes: int) -> dict[str, torch.Tensor]:
        # The hinge loss is summed over pairs, so its gradients are larger.
        rate = 0.002 if loss == "hinge" else 0.05
        rates = {"learning_rate": rate, "tower_learning_rate": rate}
        return trained(folder, processes, model=tiny_model(loss=loss), **rates)

    return train


def with_lora(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    from peft import get_peft_model

    from pico_hf import pico_lora_config

    model = tiny_model(loss="infonce")
    adapted = get_peft_model(model, pico_lora_config(model, dropout=0.0))
    return trained(folder, processes, model=adapted)


def frozen(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    return trained(
        folder, processes, freeze_encoder=True, feature_cache_dir=str(folder / "features")
    )


def checkpointed(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    return trained(folder, processes, gradient_checkpointing=True, gradient_accumulation_steps=2)


def in_mini_batches(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Two pairs at a time, with what goes along; one process takes its batches whole."""
    return trained(
        folder,
        processes,
        mini_batch_size=2 if processes > 1 else None,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
    )


def of_identities(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Every two images are one product; the last batch of an epoch has one pair."""
    from pico_hf import ImageTextDataset

    rows = ragged_rows(25)
    rows = rows.add_column("product", [f"{number // 2}" for number in range(25)])
    train = ImageTextDataset(rows, image_id_column="product")
    return trained(folder, processes, options={"train_dataset": train})


def refined(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Style prototypes while training, chosen by their effect on the dev split."""
    model = tiny_model(loss="infonce", estimators=["style"])
    knobs = {"prototype_warmup_epochs": 1.0, "per_device_eval_batch_size": 4}
    return result(*run(folder, processes, model=model, guarded=False, **knobs))


def aligned(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Canonical columns after training."""
    return result(*run(folder, processes, guarded=False, per_device_eval_batch_size=5))


def batch_norm(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Towers whose running statistics depend on the batches that a process sees."""
    torch.manual_seed(0)
    model = PicoModel.from_encoder(
        tiny_encoder("align"), num_prototypes=3, probe_size=8, pooled_share=0.0
    )
    # Nothing is read back from a checkpoint, which would make processes equal.
    own = folder / os.environ.get("RANK", "0")
    knobs = {"max_steps": 4, "load_best_model_at_end": False}
    found = result(*run(own, processes, model=model, **knobs))
    files = [path.name for path in own.rglob("*") if path.is_file()]
    wrote = [name for name in files if not name.startswith("rng_state")]
    return found | {"wrote": torch.tensor(bool(wrote))}


def sharded(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Parameters in parts, prototypes refined on the way, the best checkpoint as the end."""
    if processes > 1:
        shard_on_a_cpu()
    model = tiny_model(loss="infonce", estimators=["style"])
    knobs = {"per_device_eval_batch_size": 5, "fsdp": processes > 1}
    # At a higher rate the rounding of a step grows tenfold in a few more.
    knobs |= {"learning_rate": 0.003, "tower_learning_rate": 0.003}
    return result(*run(folder, processes, model=model, **knobs))


def sharded_and_resumed(folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Parameters in parts, see `resumed`; the last checkpoint is loaded as a model."""
    shard_on_a_cpu()
    ends = resumed(folder, processes, fsdp=True)
    saved = PicoModel.from_pretrained(folder / "unbroken" / "run" / "checkpoint-8")
    return ends | {"saved": flat(saved)}


def zero(stage: int, **more: Any) -> Callable[..., dict[str, torch.Tensor]]:
    """DeepSpeed as in the example, prototypes refined on the way; only the first process writes."""

    def train(folder: Path, processes: int) -> dict[str, torch.Tensor]:
        config = json.loads(ZERO.read_text(encoding="utf-8"))
        config["zero_optimization"]["stage"] = stage
        knobs = {"learning_rate": 0.003, "tower_learning_rate": 0.003}
        # DeepSpeed lets parameters decay that no loss reaches.
        knobs |= {"per_device_eval_batch_size": 5, "weight_decay": 0.0}
        knobs |= {"load_best_model_at_end": False, "save_only_model": True, **more}
        knobs |= {"deepspeed": config} if processes > 1 else {}
        model = tiny_model(loss="infonce", estimators=["style"])
        own = folder / os.environ.get("RANK", "0")
        trainer, before = run(own, processes, model=model, **knobs)
        found = result(trainer, before)
        if processes > 1:
            partitions = trainer.optimizer.optimizer.optimizer.param_groups
            own_part = sum(part.numel() for group in partitions for part in group["params"])
            found["stage"] = torch.tensor(trainer.model_wrapped.zero_optimization_stage())
            found["share"] = torch.tensor(own_part / before.numel())
        trainer.save_model(str(own / "end"))
        files = [path for path in own.rglob("*") if path.is_file()]
        if files:
            found["saved"] = flat(PicoModel.from_pretrained(own / "end"))
            found["last"] = flat(PicoModel.from_pretrained(own / "run" / f"checkpoint-{STEPS}"))
        pickled = [path for path in files if path.suffix in (".pt", ".bin", ".pth", ".pkl")]
        counts = {"wrote": torch.tensor(len(files)), "pickled": torch.tensor(len(pickled))}
        return found | counts

    return train


def resumed(folder: Path, processes: int, **more: Any) -> dict[str, torch.Tensor]:
    """A run with AdamW, and the end of a like one that goes on from the middle of an epoch.

    The last batch of that epoch is ragged.
    """

    def end(folder: Path, resume: str | bool):
        rates = {"learning_rate": 1e-3, "tower_learning_rate": 1e-3, "optim": "adamw_torch"}
        given = {**BARE, "save_strategy": "steps", "save_steps": 4, **rates}
        return result(*run(folder, processes, max_steps=8, resume=resume, **given, **more))

    unbroken = end(folder / "unbroken", resume=False)
    half = end(folder / "resumed", resume=str(folder / "unbroken" / "run" / "checkpoint-4"))
    return unbroken | {"resumed": half["weights"]}


def of_encoder(name: str) -> Callable[..., dict[str, torch.Tensor]]:
    """Any architecture, its style prototypes on the way and its columns at the end."""

    def train(folder: Path, processes: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        knobs = {"num_prototypes": 3, "probe_size": 8, "pooled_share": 0.0, "loss": "infonce"}
        model = PicoModel.from_encoder(tiny_encoder(name), **knobs)
        # Nothing is read back from a checkpoint, which would make processes equal.
        own = folder / os.environ.get("RANK", "0")
        short = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
        short |= {"load_best_model_at_end": False, "prototype_warmup_epochs": 0.0}
        options = {"processing_class": tiny_processor(name)}
        return result(*run(own, processes, model, options, guarded=False, **short))

    return train


def shard_on_a_cpu() -> None:
    """Makes accelerate spread parameters over processes on a CPU, where it would ignore `fsdp`."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    stock = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.__dict__.update(fsdp_plugin=plugin, distributed_type=DistributedType.FSDP)

    AcceleratorState.__init__ = init


RUNS = {
    "resumed": resumed,
    "zero1": zero(1),
    "zero2": zero(2),
    "zero_accumulated": zero(2, gradient_checkpointing=True, gradient_accumulation_steps=2),
    "zero_frozen": zero(1, freeze_encoder=True),
    "zero_adamw": zero(2, optim="adamw_torch", lr_scheduler_type="linear"),
    "sharded": sharded,
    "sharded_and_resumed": sharded_and_resumed,
    "hinge": of_loss("hinge"),
    "infonce": of_loss("infonce"),
    "sigmoid": of_loss("sigmoid"),
    "lora": with_lora,
    "frozen": frozen,
    "checkpointed": checkpointed,
    "mini_batches": in_mini_batches,
    "identities": of_identities,
    "refined": refined,
    "aligned": aligned,
    "batch_norm": batch_norm,
} | {f"encoder:{name}": of_encoder(name) for name in BUILDERS}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in names:
        torch.save(RUNS[name](folder / name, count), folder / f"{name}-{rank}.pt")
        dist.barrier()
    assert dist.get_world_size() == count > 1
    dist.destroy_process_group()
