"""Score matrix → scalar. Row i and column i belong together; the same image is never a negative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

# What scores, in [-2, 2], are multiplied by before anything is learned. In short runs the scale
# hardly moves, and with 1 InfoNCE learns next to nothing.
START_SCALE = 10.0
# Beyond any training (CLIP and SigLIP stay below 5 and 20), and fp32 is far from overflow.
_LARGEST_LOG_SCALE, _LARGEST_BIAS = 30.0, 1e6


class PairLogits(nn.Module):
    """Scores to logits: times a learned scale, plus a learned bias.

    A module of its own, since adapters train and save whole modules besides the weights they adapt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))
        self.logit_bias = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def follow_share(self, before: float, after: float) -> None:
        """Fits the scale to another share of pooled vectors: S spans twice a cosine's range.

        Args:
            before: The share m that the scale was for.
            after: The share from now on.
        """
        self.logit_scale.add_(math.log((2.0 - before) / (2.0 - after)))

    def check(self) -> None:
        """Raises ValueError if logits of scores in [-2, 2] can be no numbers."""
        largest = {"logit_scale": _LARGEST_LOG_SCALE, "logit_bias": _LARGEST_BIAS}
        for name, value in self.named_parameters(recurse=False):
            if not value.is_meta and not abs(value.item()) <= largest[name]:
                raise ValueError(
                    f"`{name}` must lie between -{largest[name]:g} and {largest[name]:g}, got "
                    f"{value.item():g}. Do not trust these weights, or save the model again."
                )

    def forward(self, scores: Float[Tensor, "images texts"]) -> Float[Tensor, "images texts"]:
        """Logits (images, texts) fp32 of S."""
        return scores * self.logit_scale.float().exp() + self.logit_bias.float()


def hinge_loss(
    scores: Float[Tensor, "images texts"],
    image_ids: Int[Tensor, " images"] | None = None,
    margin: float = 0.2,
    ramp: float | None = None,
) -> Float[Tensor, ""]:
    """Sum over anchors of max(0, margin + negative - positive), in both directions.

    The recipe of the task (LAPS, CVPR 2024): during warm-up all negatives count and the loss is
    ramped from 0 to 1, afterwards only the hardest negative of every row and column does.

    Args:
        scores: S of matched pairs, as many texts as images.
        image_ids: Identity of each row's image; None = all different.
        margin: In units of S, > 0.
        ramp: In [0, 1]: all negatives, scaled by it. None: the hardest negatives.

    Returns:
        The loss; an anchor without a negative adds 0.

    Raises:
        ValueError: If the matrix is not square, holds one pair, or `image_ids` does not fit it.

    Example:
        >>> scores = torch.tensor([[0.5, 0.4], [0.0, 0.5]])  # only S[0, 1] comes within the margin
        >>> round(hinge_loss(scores).item(), 4)  # 0.2 + 0.4 - 0.5, once by row, once by column
        0.2
    """
    return _total(_hinge_parts(scores, image_ids, margin, ramp))


def info_nce_loss(
    logits: Float[Tensor, "images texts"], image_ids: Int[Tensor, " images"] | None = None
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: mean cross-entropy of the matched text and of the matched image.

    Args:
        logits: Scaled scores of matched pairs, as many texts as images.
        image_ids: Identity of each row's image; None = all different.

    Returns:
        Half the sum of both directions; an anchor without a negative adds 0.

    Raises:
        ValueError: If the matrix is not square, holds one pair, or `image_ids` does not fit it.

    Example:
        >>> round(info_nce_loss(torch.zeros(2, 2)).item(), 4)  # ln 2
        0.6931
    """
    return _total(_info_nce_parts(logits, image_ids))


def sigmoid_loss(
    logits: Float[Tensor, "images texts"], image_ids: Int[Tensor, " images"] | None = None
) -> Float[Tensor, ""]:
    """SigLIP's loss: every pair is a question of its own; summed, then divided by the pairs.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023.

    Args:
        logits: Scaled and biased scores of matched pairs, as many texts as images.
        image_ids: Identity of each row's image; None = all different.

    Returns:
        The loss; unmatched pairs of the same image are left out.

    Raises:
        ValueError: If the matrix is not square, holds one pair, or `image_ids` does not fit it.

    Example:
        >>> round(sigmoid_loss(torch.zeros(2, 2)).item(), 4)  # 4 · ln 2 / 2
        1.3863
    """
    return _total(_sigmoid_parts(logits, image_ids))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "hinge": hinge_loss,
    "infonce": info_nce_loss,
    "sigmoid": sigmoid_loss,
}


def contrastive_parts(
    name: str,
    scores: Float[Tensor, "images texts"],
    logits: Float[Tensor, "images texts"],
    image_ids: Int[Tensor, " images"] | None = None,
    *,
    margin: float = 0.2,
    ramp: float | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """What a loss is the sum of: the hinge loss of scores, any other of logits.

    Args:
        name: Key of LOSSES.
        scores: S of matched pairs, as many texts as images.
        logits: The same scores, scaled and biased.
        image_ids: Identity of each row's image; None = all different.
        margin: See `hinge_loss`.
        ramp: See `hinge_loss`.

    Returns:
        `"image_to_text"`, what the texts of an image add, and `"text_to_image"`. The sigmoid loss
        has no directions, but `"matched"` and `"unmatched"` pairs.

    Example:
        >>> scores = torch.tensor([[0.5, 0.4], [0.0, 0.5]])
        >>> parts = contrastive_parts("hinge", scores, scores)
        >>> {name: round(part.item(), 4) for name, part in parts.items()}
        {'image_to_text': 0.1, 'text_to_image': 0.1}
    """
    if name == "hinge":
        return _hinge_parts(scores, image_ids, margin, ramp)
    return _PARTS_OF_LOGITS[name](logits, image_ids)


def _hinge_parts(
    scores: Tensor, image_ids: Tensor | None, margin: float, ramp: float | None
) -> dict[str, Tensor]:
    scores, negative = _prepare(scores, image_ids)
    positive = scores.diagonal()
    rows = (margin + scores - positive.unsqueeze(1)).clamp_min(0).masked_fill(~negative, 0)
    columns = (margin + scores - positive.unsqueeze(0)).clamp_min(0).masked_fill(~negative, 0)
    if ramp is not None:
        return {"image_to_text": ramp * rows.sum(), "text_to_image": ramp * columns.sum()}
    return {
        "image_to_text": rows.amax(dim=1).sum(),
        "text_to_image": columns.amax(dim=0).sum(),
    }


def _info_nce_parts(logits: Tensor, image_ids: Tensor | None) -> dict[str, Tensor]:
    logits, negative = _prepare(logits, image_ids)
    logits = logits.masked_fill(~(negative | _matched(logits)), -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return {
        "image_to_text": 0.5 * F.cross_entropy(logits, target),
        "text_to_image": 0.5 * F.cross_entropy(logits.t(), target),
    }


def _sigmoid_parts(logits: Tensor, image_ids: Tensor | None) -> dict[str, Tensor]:
    logits, negative = _prepare(logits, image_ids)
    matched = _matched(logits)
    losses = -F.logsigmoid(torch.where(matched, logits, -logits))
    return {
        "matched": losses.diagonal().sum() / len(logits),
        "unmatched": losses.masked_fill(~negative, 0).sum() / len(logits),
    }


_PARTS_OF_LOGITS = {"infonce": _info_nce_parts, "sigmoid": _sigmoid_parts}


def _total(parts: dict[str, Tensor]) -> Tensor:
    first, second = parts.values()
    return first + second


def _prepare(
    scores: Float[Tensor, "images texts"], image_ids: Tensor | None
) -> tuple[Float[Tensor, "images texts"], Bool[Tensor, "images texts"]]:
    """Scores in fp32 (fp64 stays), and where image and text belong to different images."""
    images, texts = scores.shape
    if images != texts:
        raise ValueError(
            f"A contrastive loss needs as many texts as images, got {images} images and {texts} "
            "texts. Give one text per image."
        )
    if images < 2:
        raise ValueError(
            f"A contrastive loss needs at least 2 pairs, got {images}. Take larger batches, and "
            "drop the last one of an epoch if it can be smaller."
        )
    ids = torch.arange(images, device=scores.device) if image_ids is None else image_ids
    if ids.shape != (images,):
        raise ValueError(
            f"`image_ids` must name the image of each of the {images} pairs, got shape "
            f"{tuple(ids.shape)}."
        )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores, ids.unsqueeze(1) != ids.unsqueeze(0)


def _matched(scores: Float[Tensor, "images texts"]) -> Bool[Tensor, "images texts"]:
    return torch.eye(len(scores), dtype=torch.bool, device=scores.device)
