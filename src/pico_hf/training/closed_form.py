"""Untrained projections start from the closed form, before the first step of training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pico_hf.core.closed_form import closed_form_projections
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.dataset import ImageTextDataset
from pico_hf.data.stream import ImageTextStream
from pico_hf.encoders.projection import apply_steps
from pico_hf.encoders.projection_modules import linear_heads
from pico_hf.encoders.spec import Step
from pico_hf.training.encoding import Encoded, SplitEncoder, pair_moments, tower_states

logger = logging.getLogger(__name__)


@torch.no_grad()
def start_in_closed_form(
    encoder: SplitEncoder, pairs: ImageTextDataset | ImageTextStream, images: int = 20_000
) -> None:
    """Replaces the last linear projection of both sides; see `pico_hf.core.closed_form`.

    Without any training the model ranks by what images and texts of `pairs` have in common. Columns
    that the closed form does not find, because a tower or the number of pairs is smaller than the
    common space, stay as they are drawn, as short as the shortest that was found.

    Args:
        encoder: Model, collator and batch size.
        pairs: Training pairs.
        images: How many of them are looked at, with all their captions; >= 2.

    Raises:
        ValueError: If a side does not end in a linear projection of its own.
    """
    model = encoder.model
    heads = linear_heads(model.encoder)
    moments = pair_moments(encoder, pairs.sample(images), partial(_before_heads, heads))
    columns = heads["image"][1].out_features
    found = closed_form_projections(moments, columns)
    for (_, head), weight in zip(heads.values(), found, strict=True):
        _fill(head, weight)
    encoder.processes.copy_from_first([head.weight for _, head in heads.values()])
    logger.info("Projections start in closed form: %d columns, %d found.", columns, len(found[0]))


def _before_heads(
    heads: Mapping[str, tuple[Sequence[Step], nn.Linear]],
    model: PreTrainedModel,
    batch: Mapping[str, Any],
) -> Encoded:
    """What comes into the last projections; None for a side without inputs."""
    sides = zip(heads.values(), tower_states(model, batch), strict=True)
    images, texts = (
        None
        if hidden is None
        else TokenFeatures(apply_steps(model.encoder, steps, hidden.features), hidden.mask)
        for (steps, _), hidden in sides
    )
    return images, texts


def _fill(head: nn.Linear, weight: Tensor) -> None:
    """Takes over rows, with the spread that the weights were drawn with: steps keep their size."""
    drawn = head.weight.double().cpu()
    spread = float(drawn.std()) or head.in_features**-0.5
    found = weight / weight.square().mean().sqrt() * spread
    rest = drawn[len(found) :]
    if len(rest):
        rest = torch.nn.functional.normalize(rest, dim=1) * found.norm(dim=1).min()
    head.weight.copy_(torch.cat([found, rest]))
    if head.bias is not None:
        head.bias.zero_()


class ClosedFormCallback(TrainerCallback):
    """Starts the projections before the first step, never in a run that is resumed.

    Args:
        feedback: Gives the run's model, training pairs and arguments.
    """

    def __init__(self, feedback: Callable[[], Any]) -> None:
        self.feedback = feedback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step of a run that wants it."""
        run = self.feedback()
        if state.global_step == 0 and run.args.projection_start == "closed_form":
            start_in_closed_form(run.encoder, run.train, run.args.alignment_images)
