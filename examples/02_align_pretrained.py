"""Align a pretrained encoder with a few hundred pairs of your own, without training.

    python examples/02_align_pretrained.py pairs.parquet --test_file test.parquet

Of the pairs three quarters give the estimate and a quarter gives the feedback. The test file is
scored before and after. The aligned model is written to `outputs/aligned`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers import AutoProcessor

from pico_hf import PicoModel, PicoTrainer, PicoTrainingArguments, load_image_text

CLIP = "openai/clip-vit-base-patch32"


def main(
    pairs_file: str, test_file: str, output_dir: str = "outputs/aligned", encoder: str = CLIP
) -> tuple[float, float]:
    """Aligns the encoder, saves it, and returns the test file's rSum before and after.

    Args:
        pairs_file: Parquet, jsonl or csv file, or an imagefolder, with at least 64 images.
        test_file: Likewise, pairs that take no part in the alignment.
        output_dir: Where the aligned model goes.
        encoder: Folder or Hub repository of a dual encoder with its processor.
    """
    pairs = load_image_text(files=pairs_file).train_test_split(test_size=0.25, seed=0)
    test = load_image_text(files=test_file)
    trainer = PicoTrainer(
        PicoModel.from_pretrained(encoder),
        PicoTrainingArguments(output_dir=output_dir, per_device_train_batch_size=16),
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=AutoProcessor.from_pretrained(encoder),
    )
    before = trainer.evaluate(test)["eval_rsum"]
    trainer.construct_prototypes()  # the encoder's weights stay as they are
    after = trainer.evaluate(test)["eval_rsum"]
    trainer.save_model()
    print(f"rSum on {test_file}: {before:.1f} before, {after:.1f} after. Saved: {output_dir}")
    return before, after


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line; they are the arguments of `main`."""
    parser = argparse.ArgumentParser(description="Aligns an encoder without training it.")
    parser.add_argument("pairs_file", help="image-text pairs: parquet, jsonl, csv or a folder")
    parser.add_argument("--test_file", required=True, help="other pairs, to be scored")
    parser.add_argument("--output_dir", default="outputs/aligned", help="for the aligned model")
    parser.add_argument("--encoder", default=CLIP, help="folder or Hub repository")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(**vars(parse_arguments()))
