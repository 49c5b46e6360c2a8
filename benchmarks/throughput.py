"""Steps of PicoTrainer per second of CPU time, as a ratio to another checkout of the package.

Run: python benchmarks/throughput.py OTHER_CHECKOUT [--rounds 9]
Both train the same small CLIP on the same pictures by the same arguments, one after the other in
processes of one thread; its CPU time counts less of what others do on the machine than wall time.
The ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEP = """
import tempfile, time, torch
from transformers import CLIPConfig, CLIPModel
from pico_hf import PicoModel, PicoTrainer, PicoTrainingArguments
from tiny import tiny_processor, tiny_rows
torch.set_num_threads(1)
torch.manual_seed(0)
side = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
vision = {**side, "num_hidden_layers": 4, "image_size": 32, "patch_size": 4}
text = {**side, "num_hidden_layers": 4, "vocab_size": 32, "max_position_embeddings": 16,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=256)
model = PicoModel.from_encoder(CLIPModel(config), num_prototypes=3, probe_size=8, pooled_share=0.0)
with tempfile.TemporaryDirectory() as folder:
    args = PicoTrainingArguments(
        output_dir=folder, max_steps=30, per_device_train_batch_size=32, eval_strategy="no",
        save_strategy="no", load_best_model_at_end=False, refine_prototypes=False, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=1000)
    data = {"train_dataset": tiny_rows(64), "processing_class": tiny_processor()}
    trainer = PicoTrainer(model, args, **data)
    start = time.process_time()
    trainer.train()
    print("steps per second", args.max_steps / (time.process_time() - start))
"""


def speed(checkout: Path) -> float:
    """Steps per second of CPU time, of one run."""
    path = os.pathsep.join(str(checkout / part) for part in ("src", "tests"))
    code = STEP
    if "pooled_share" not in (checkout / "src/pico_hf/configuration_pico.py").read_text():
        code = code.replace(", pooled_share=0.0", "")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("steps per second")]
    if not lines:
        raise SystemExit(f"{checkout}: {done.stderr[-800:]}")
    return float(lines[-1].split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    ratios = []
    for number in range(options.rounds):
        order = (ROOT, options.other) if number % 2 else (options.other, ROOT)
        found = {checkout: speed(checkout) for checkout in order}
        ratios.append(found[ROOT] / found[options.other])
        print(f"round {number + 1}: {ratios[-1]:.3f}", flush=True)
    print(f"| steps per CPU second, this checkout / the other | {statistics.median(ratios):.3f} |")


if __name__ == "__main__":
    main()
