"""How recipes were chosen: many short runs on folds of the training part, features in memory.

Run: python benchmarks/effect/explore.py   # after features.py; explore.yaml, a quarter of a minute
per run on drawings and a minute on photos, on one core. It has a training loop of its own, which
does what `PicoTrainer` does with frozen towers; `recipe.py` then runs what was chosen with that.
A fold leaves out concepts (or photos) for feedback and others for the test, and a drawing family,
so that nothing of the official validation part is looked at. Products are rounded to bfloat16.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fold_parts import Part, feedback
from folds import Fold
from pico_hf.core.closed_form import closed_form_projections
from pico_hf.core.losses import START_SCALE, contrastive_parts
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.similarity import weighted_score
from pico_hf.core.token_features import TokenFeatures, drop_columns, unit_length
from study import Job, Study, from_command_line

EPOCHS = {"flickr8k": 6, "emoji": 8}
BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """One way to train new heads; see `PicoConfig` and `PicoTrainingArguments`.

    What those have not: `hinge_finish`, the share of steps at the end with the hinge loss;
    `label_smoothing`, the share of the target that all pairs get alike; `scale_rate`, a factor of
    the learning rate for the scale of logits.
    """

    loss: str = "infonce"
    learning_rate: float = 2e-3
    column_dropout: float = 0.0
    token_dropout: float = 0.0
    pooled_share: float = 0.0
    closed_form: bool = False
    epochs: int | None = None
    weight_decay: float = 0.0
    hinge_finish: float = 0.0
    label_smoothing: float = 0.0
    scale_rate: float = 1.0


class Heads(nn.Module):
    """Two projections and the scale of logits."""

    def __init__(self, seed: int, widths: tuple[int, int], columns: int = 256) -> None:
        super().__init__()
        torch.manual_seed(seed)
        sides = [nn.Linear(width, columns, bias=False) for width in widths]
        for side in sides:
            nn.init.normal_(side.weight, std=side.in_features**-0.5)
        self.image_head, self.text_head = sides
        self.scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))

    def image(self, tokens: TokenFeatures) -> TokenFeatures:
        return self._project(self.image_head, tokens)

    def text(self, tokens: TokenFeatures) -> TokenFeatures:
        return self._project(self.text_head, tokens)

    @staticmethod
    def _project(head: nn.Linear, tokens: TokenFeatures) -> TokenFeatures:
        return unit_length(head(tokens.features), tokens.mask, pooled=head(tokens.mean()))

    @torch.no_grad()
    def start(self, moments: PairMoments) -> None:
        """Closed form, with the spread that weights were drawn with."""
        sides = (self.image_head, self.text_head)
        weights = closed_form_projections(moments, self.image_head.out_features)
        for head, weight in zip(sides, weights, strict=True):
            head.weight.copy_(weight / weight.std() * head.weight.std())


def train(fold: Fold, recipe: Recipe, seed: int) -> Heads:
    """Trains heads on a fold, with a cosine schedule."""
    heads = Heads(seed, (fold.images.tokens.shape[1], fold.words.tokens.shape[1]))
    rows = fold.parts["train"]
    if recipe.closed_form:
        heads.start(fold.moments(rows))
    steps = (recipe.epochs or EPOCHS[fold.name]) * (len(rows) // BATCH)
    optimizer = _optimizer(heads, recipe)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = torch.Generator().manual_seed(seed)
    for step in range(steps):
        place = step % (len(rows) // BATCH)
        if place == 0:
            order = rows[torch.randperm(len(rows), generator=draws)]
        batch = order[place * BATCH : (place + 1) * BATCH]
        chance = torch.rand(BATCH, generator=draws)
        captions = fold.first[batch] + (chance * fold.captions[batch]).long()
        hinge = step >= steps * (1 - recipe.hinge_finish)
        now = replace(recipe, loss="hinge", label_smoothing=0.0) if hinge else recipe
        loss = _loss(fold, heads, now, batch, captions, step * BATCH / len(rows))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(heads.parameters(), 2.0)
        optimizer.step()
        schedule.step()
    return heads.eval()


def _optimizer(heads: Heads, recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    projections = [heads.image_head.weight, heads.text_head.weight]
    groups = [
        {"params": projections, "lr": rate, "weight_decay": decay},
        {"params": [heads.scale], "lr": rate * recipe.scale_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups)


def _loss(
    fold: Fold, heads: Heads, recipe: Recipe, batch: Tensor, captions: Tensor, epoch: float
) -> Tensor:
    patches, words = fold.images[batch], fold.words[captions]
    if recipe.column_dropout:
        patches = drop_columns(patches, recipe.column_dropout)
    if recipe.token_dropout:
        patches, words = (_drop_tokens(side, recipe.token_dropout) for side in (patches, words))
    sides = heads.image(patches), heads.text(words)
    scores = weighted_score(*sides, pooled_share=recipe.pooled_share)
    logits, ids = scores * heads.scale.exp(), fold.identity[batch]
    ramp = epoch if epoch < 1 else None  # all negatives in the first epoch
    loss = sum(contrastive_parts(recipe.loss, scores, logits, ids, ramp=ramp).values())
    if not recipe.label_smoothing:
        return loss
    alike = -(logits.log_softmax(0).mean() + logits.log_softmax(1).mean()) / 2
    return torch.lerp(loss, alike, recipe.label_smoothing)


def _drop_tokens(tokens: TokenFeatures, share: float) -> TokenFeatures:
    kept = tokens.mask & (torch.rand(tokens.mask.shape) >= share)
    none = ~kept.any(dim=1)
    kept[none] = tokens.mask[none]
    return TokenFeatures(tokens.features, kept)


def run(study: Study, fold: Fold, job: Job, name: str) -> None:
    """Trains one recipe on one fold and scores it without feedback and with it."""
    started = time.time()
    heads = train(fold, Recipe(**study.config["recipes"][name]), job.seed)
    tested = {part: rows for part, rows in fold.parts.items() if part != "train"}
    parts = {part: Part.of(fold, heads, rows) for part, rows in tested.items()}
    with torch.no_grad():
        moments = fold.moments(fold.parts["train"], heads)
    found = feedback(parts["feedback"], moments)
    own = found.forms[0]
    rows = {
        "w = 1": (own, 0.0),
        "w = 1, pooled": (own, found.first),
        "feedback": (found.form, found.share),
    }
    for row, (used, taken) in rows.items():
        metrics = {part: {"rsum": one.scored(used)(taken)} for part, one in parts.items()}
        study.write(job, row, started, metrics=metrics, recipe=name, share=taken)
    averaged = found.forms, found.parts, found.share
    metrics = {part: {"rsum": one.ensembled(*averaged)} for part, one in parts.items()}
    study.write(job, "scores averaged", started, metrics=metrics, recipe=name, share=found.share)


def main() -> None:
    study, mine = from_command_line(__doc__, __file__)
    torch.set_float32_matmul_precision("medium")
    for seed in filter(mine, study.config["seeds"]):
        for dataset in study.config["folds"][seed]:
            fold = Fold(study, dataset, seed)
            for name, recipe in study.config["recipes"].items():
                job = Job(dataset, "lite0", Recipe(**recipe).loss, seed)
                if not study.has(row="feedback", recipe=name, **vars(job)):
                    run(study, fold, job, name)


if __name__ == "__main__":
    main()
