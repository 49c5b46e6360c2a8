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
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from folds import Fold
from pico_hf.core.canonical import CANDIDATES, bilinear_form
from pico_hf.core.closed_form import closed_form_projections
from pico_hf.core.losses import START_SCALE, contrastive_loss
from pico_hf.core.metrics import retrieval_metrics
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.pooled_share import SHARES
from pico_hf.core.similarity import pooled_similarity, similarity, weighted_score
from pico_hf.core.token_features import TokenFeatures, drop_columns, unit_length
from study import Job, Study, from_command_line

EPOCHS = {"flickr8k": 6, "emoji": 8}
TEMPERATURE = 5.0  # of the normalised gain
BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """One way to train new heads; see `PicoConfig` and `PicoTrainingArguments`."""

    loss: str = "infonce"
    learning_rate: float = 2e-3
    column_dropout: float = 0.0
    token_dropout: float = 0.0
    pooled_share: float = 0.0
    closed_form: bool = False
    epochs: int | None = None


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
    optimizer = torch.optim.AdamW(heads.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = torch.Generator().manual_seed(seed)
    for step in range(steps):
        place = step % (len(rows) // BATCH)
        if place == 0:
            order = rows[torch.randperm(len(rows), generator=draws)]
        batch = order[place * BATCH : (place + 1) * BATCH]
        chance = torch.rand(BATCH, generator=draws)
        captions = fold.first[batch] + (chance * fold.captions[batch]).long()
        loss = _loss(fold, heads, recipe, batch, captions, step * BATCH / len(rows))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(heads.parameters(), 2.0)
        optimizer.step()
        schedule.step()
    return heads.eval()


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
    return contrastive_loss(recipe.loss, scores, logits, ids, ramp=ramp)


def _drop_tokens(tokens: TokenFeatures, share: float) -> TokenFeatures:
    kept = tokens.mask & (torch.rand(tokens.mask.shape) >= share)
    none = ~kept.any(dim=1)
    kept[none] = tokens.mask[none]
    return TokenFeatures(tokens.features, kept)


@dataclass
class Part:
    """An encoded part of a fold, which is ranked gallery by gallery.

    Attributes:
        images: Of the part.
        texts: Likewise.
        galleries: Rows of images, rows of texts, and the image of each of these texts.
    """

    images: TokenFeatures
    texts: TokenFeatures
    galleries: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def of(cls, fold: Fold, heads: Heads, rows: Tensor) -> Part:
        texts, owners = fold.texts_of(rows)
        images = [heads.image(fold.images[some]) for some in rows.split(256)]
        words = [heads.text(fold.words[some]) for some in texts.split(256)]
        part = cls(TokenFeatures.concatenate(images), TokenFeatures.concatenate(words))
        for gallery in fold.gallery[rows].unique():
            own = (fold.gallery[rows] == gallery).nonzero().flatten()
            captions = torch.isin(owners, own).nonzero().flatten()
            place = torch.zeros(len(rows), dtype=torch.long)
            place[own] = torch.arange(len(own))
            part.galleries.append((own, captions, place[owners[captions]]))
        return part

    @torch.no_grad()
    def scored(self, form: Tensor) -> Callable[[float], float]:
        """From a share of pooled vectors to the mean rSum over galleries, with scores vᵀBt."""
        left, weights, right = torch.linalg.svd(form)
        images, texts = self.images.turned(left.float()), self.texts.turned(right.t().float())
        weights = (weights / weights.mean()).float()
        found = [
            (
                similarity(images[own], texts[captions], weights),
                pooled_similarity(images[own], texts[captions], weights),
                owners,
            )
            for own, captions, owners in self.galleries
        ]

        def rsum(share: float) -> float:
            ranked = (
                retrieval_metrics((1 - share) * tokens + share * pooled, owners)
                for tokens, pooled, owners in found
            )
            return sum(metrics["rsum"] for metrics in ranked) / len(found)

        return rsum


def feedback(part: Part, moments: PairMoments) -> tuple[Tensor, float, float]:
    """(form, share for it, share for w = 1): what the normalised gain makes of all candidates."""
    form = torch.eye(moments.shared.shape[0], dtype=torch.float64)
    own = part.scored(form)
    share = max(SHARES, key=own)
    forms = [bilinear_form(moments, candidate) for candidate in CANDIDATES]
    gains = torch.tensor([0.0, *(part.scored(one)(share) - own(share) for one in forms)])
    parts = torch.softmax(gains / TEMPERATURE, dim=0).double()
    fused = torch.einsum("n,nij->ij", parts, torch.stack([form, *forms]))
    found = part.scored(fused)
    if found(share) < own(share):
        return form, share, share
    return fused, max(SHARES, key=found), share


def run(study: Study, fold: Fold, job: Job, name: str) -> None:
    """Trains one recipe on one fold and scores it without feedback and with it."""
    started = time.time()
    heads = train(fold, Recipe(**study.config["recipes"][name]), job.seed)
    tested = {part: rows for part, rows in fold.parts.items() if part != "train"}
    parts = {part: Part.of(fold, heads, rows) for part, rows in tested.items()}
    with torch.no_grad():
        moments = fold.moments(fold.parts["train"], heads)
    form, share, first = feedback(parts["feedback"], moments)
    own = torch.eye(len(form), dtype=form.dtype)
    rows = {"w = 1": (own, 0.0), "w = 1, pooled": (own, first), "feedback": (form, share)}
    for row, (used, taken) in rows.items():
        metrics = {part: {"rsum": one.scored(used)(taken)} for part, one in parts.items()}
        study.write(job, row, started, metrics=metrics, recipe=name, share=taken)


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
