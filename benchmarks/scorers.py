"""Other ways to score all pairs, to compare with: the plain ones and other packages', if installed.

Each takes images and texts as `TokenFeatures` and returns scores (images, texts).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from pico_hf.core.token_features import TokenFeatures

Scorer = Callable[[TokenFeatures, TokenFeatures], Tensor]


def naive(images: TokenFeatures, texts: TokenFeatures) -> Tensor:
    """One einsum to a 4-D tensor, two maxima."""
    products = torch.einsum("ipd,twd->itpw", images.features, texts.features)
    if not texts.mask.all():  # a careful user would not pay for a mask that cuts nothing
        products = products.masked_fill(~texts.mask[:, None, :], -torch.inf)
    best_patch = products.amax(dim=2).masked_fill(~texts.mask, 0)
    return products.amax(dim=3).mean(dim=2) + best_patch.sum(dim=2) / texts.mask.sum(dim=1)


def loop(images: TokenFeatures, texts: TokenFeatures) -> Tensor:
    """One text after the other against all images, as published code of this task does."""
    columns = []
    for words, mask in zip(texts.features, texts.mask, strict=True):
        products = images.features @ words[mask].T
        columns.append(products.amax(dim=2).mean(dim=1) + products.amax(dim=1).mean(dim=1))
    return torch.stack(columns, dim=1)


def compiled() -> Scorer:
    """`torch.compile` of the einsum."""
    return torch.compile(naive)


def peers(both_directions: bool) -> dict[str, Scorer]:
    """Scorers of the packages that are installed. Each gives one direction per call."""
    found: dict[str, Scorer] = {}
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers.util import mean_maxsim

        found["sentence-transformers"] = lambda i, t: _directions(
            lambda a, b: mean_maxsim(
                a.features, b.features, _partial(a), _partial(b)
            ), i, t, both_directions
        )  # fmt: skip
    if importlib.util.find_spec("pylate"):
        from pylate.scores import colbert_scores

        found["pylate"] = lambda i, t: _directions(
            lambda a, b: colbert_scores(a.features, b.features, _partial(a), _partial(b)),
            i, t, both_directions,
        )  # fmt: skip
    maxsim = _colpali_maxsim()
    if maxsim is not None:
        found["colpali-engine"] = lambda i, t: _directions(
            lambda a, b: maxsim.maxsim_inbatch(a.features, b.features), i, t, both_directions
        )
    return found


def _directions(
    one: Callable[[TokenFeatures, TokenFeatures], Tensor],
    images: TokenFeatures,
    texts: TokenFeatures,
    both: bool,
) -> Tensor:
    to_images = one(texts, images).T
    return to_images + one(images, texts) if both else to_images


def _partial(side: TokenFeatures) -> Tensor | None:
    """The mask, or None where it cuts nothing, so that no package pays for it."""
    return None if side.mask.all() else side.mask.to(side.features.dtype)


def _colpali_maxsim() -> ModuleType | None:
    """colpali-engine's scoring module, from its file: importing the package imports its models."""
    package = importlib.util.find_spec("colpali_engine")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "utils" / "maxsim.py"
    spec = importlib.util.spec_from_file_location("colpali_maxsim", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
