"""Make the embedded data: emoji drawings of the same concepts by different hands.

    python examples/make_emoji_styles.py SOURCE_FOLDER examples/data/emoji-styles

SOURCE_FOLDER holds `train.parquet` and `validation.parquet` with the columns concept, style, image,
label, tags, group and art_license; the validation concepts do not occur in training. One whole
drawing family, the fluent-* styles, is held out of training: `validation_seen` shows unseen
concepts in the styles of the training set, `validation_unseen` the same concepts drawn by a hand
the model never saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets

UNSEEN_FAMILY = "fluent-"
LICENSES = {"MIT", "Apache-2.0", "CC-BY-4.0", "CC BY 4.0", "CC-BY 4.0"}
SIZE_LIMIT = 8 * 2**20
COLUMNS = ["image", "caption", "style", "concept"]

ATTRIBUTION = """# Attribution

The drawings in this folder are unchanged but for their size (64 x 64 pixels on white).

| style | artwork | licence |
|---|---|---|
| google | Noto Emoji, Google | Apache-2.0 |
| noto-v1 | Noto Emoji version 1, Google | Apache-2.0 |
| twitter | Twemoji, Twitter, Inc. and other contributors | CC-BY 4.0 |
| emojione | EmojiOne 2, Ranks.com Inc. | CC-BY 4.0 |
| fxemoji | FxEmoji, Mozilla | Apache-2.0 |
| fluent-3d, fluent-emoji | Fluent Emoji, Microsoft | MIT |
| fluent-emoji-flat, fluent-emoji-high-contrast | Fluent Emoji, Microsoft | MIT |

The captions are labels from emojibase-data 17 (MIT).

Licence texts: https://www.apache.org/licenses/LICENSE-2.0,
https://creativecommons.org/licenses/by/4.0/legalcode, https://opensource.org/license/mit.
Rebuilt by `examples/make_emoji_styles.py`.
"""


def make_splits(
    train: datasets.Dataset, validation: datasets.Dataset
) -> dict[str, datasets.Dataset]:
    """Splits by style family; only freely licensed art, one caption column.

    Args:
        train: Rows of the training concepts, all styles.
        validation: Rows of other concepts, all styles.

    Returns:
        `train`, `validation_seen` and `validation_unseen` with the columns of `COLUMNS`.

    Raises:
        ValueError: If a concept is in both inputs.
    """
    shared = set(train["concept"]) & set(validation["concept"])
    if shared:
        raise ValueError(f"`validation` must hold other concepts than `train`, got {shared}.")
    train, validation = _free_art(train), _free_art(validation)
    return {
        "train": _by_family(train, unseen=False),
        "validation_seen": _by_family(validation, unseen=False),
        "validation_unseen": _by_family(validation, unseen=True),
    }


def _free_art(rows: datasets.Dataset) -> datasets.Dataset:
    keep = [row for row, licence in enumerate(rows["art_license"]) if licence in LICENSES]
    return rows.select(keep).rename_column("label", "caption").select_columns(COLUMNS)


def _by_family(rows: datasets.Dataset, unseen: bool) -> datasets.Dataset:
    keep = [
        row for row, style in enumerate(rows["style"]) if style.startswith(UNSEEN_FAMILY) == unseen
    ]
    return rows.select(keep)


def main() -> None:
    """Reads the source, writes three parquet files and the attribution."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    train, validation = (
        datasets.load_dataset("parquet", data_files=str(args.source / name), split="train")
        for name in ("train.parquet", "validation.parquet")
    )
    args.target.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, rows in make_splits(train, validation).items():
        path = args.target / f"{name}.parquet"
        rows.to_parquet(path)
        total += path.stat().st_size
        print(f"{path.name}: {len(rows)} drawings, {path.stat().st_size / 2**20:.2f} MiB")
    (args.target / "ATTRIBUTION.md").write_text(ATTRIBUTION)
    if total > SIZE_LIMIT:
        raise SystemExit(f"The data take {total / 2**20:.1f} MiB, more than 8.")


if __name__ == "__main__":
    main()
