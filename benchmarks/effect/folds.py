"""Folds of the training part: rows to train on, for feedback and for tests, in memory."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features import TEXTS
from pico_hf.core.moments import TokenMoments
from pico_hf.core.pair_moments import PairMoments
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.token_store import TokenStore
from study import Study, _texts, corpus_facts, family

LEFT_OUT = {"flickr8k": (500, 1000), "emoji": (123, 202)}  # for feedback, for the test


class Tokens:
    """A store of features in memory."""

    def __init__(self, store: TokenStore) -> None:
        ends = torch.from_numpy(np.asarray(store._ends)).long()
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
        self.lengths = ends - self.starts
        self.tokens = torch.from_numpy(np.array(store._tokens))

    def __getitem__(self, rows: Tensor) -> TokenFeatures:
        lengths = self.lengths[rows]
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        place = self.starts[rows].unsqueeze(1) + torch.arange(mask.shape[1])
        found = self.tokens[place.clamp_max(len(self.tokens) - 1)].float()
        return TokenFeatures(found.masked_fill(~mask.unsqueeze(-1), 0.0), mask)


def numbered(names: list[str]) -> Tensor:
    """A number per name, equal for equal names."""
    place = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([place[name] for name in names])


class Fold:
    """Features of a corpus, and which of its rows are trained on, give feedback and test.

    Args:
        study: Knows where features and corpora are.
        dataset: `"flickr8k"`, or `"emoji/FAMILY"` with that family unseen in training.
        number: Of the fold.
    """

    def __init__(self, study: Study, dataset: str, number: int) -> None:
        self.name, _, unseen = dataset.partition("/")
        whole, column = corpus_facts(self.name, study.data), TEXTS[self.name][0]
        folder = study.output / "features"
        self.images = Tokens(TokenStore(folder / f"{self.name}-lite0", "image_hidden_states"))
        self.words = Tokens(TokenStore(folder / f"{self.name}-{column}", "text_hidden_states"))
        counts = [len(row) for row in _texts(self.name, column, study.data)]
        self.captions = torch.tensor(counts)
        self.first = self.captions.cumsum(0) - self.captions
        ids, styles = list(whole.ids), list(whole.galleries)
        self.identity, self.gallery = numbered(ids), numbered(styles)
        end = whole.official_validation
        self.parts = self._split(ids[:end], styles[:end], unseen, number)

    def _split(
        self, ids: list[str], styles: list[str], unseen: str, number: int
    ) -> dict[str, Tensor]:
        few, some = LEFT_OUT[self.name]
        drawn = random.Random(100 + number).sample(sorted(set(ids)), few + some)
        place = {name: "feedback" if n < few else "test" for n, name in enumerate(drawn)}
        parts: dict[str, list[int]] = {"train": [], "feedback": [], "test": [], "unseen": []}
        for row, (name, style) in enumerate(zip(ids, styles, strict=True)):
            drawing = family(style)
            part = place.get(name, "train")
            if drawing == unseen and self.name == "emoji":
                part = "unseen" if part == "test" else ""
            if part and drawing != "fluent":  # the family that the official test leaves out
                parts[part].append(row)
        return {part: torch.tensor(rows) for part, rows in parts.items() if rows}

    def texts_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """All captions of some images, and the place of each one's image among them."""
        owners = torch.repeat_interleave(torch.arange(len(rows)), self.captions[rows])
        starts = self.captions[rows].cumsum(0) - self.captions[rows]
        return self.first[rows][owners] + torch.arange(len(owners)) - starts[owners], owners

    def moments(self, rows: Tensor, heads: Any = None) -> PairMoments:
        """Of the towers' outputs, or of what the heads make of them."""
        texts, owners = self.texts_of(rows)
        image = (self.images[part] for part in rows.split(256))
        text = (self.words[part] for part in texts.split(256))
        if heads is not None:
            image, text = map(heads.image, image), map(heads.text, text)
        return PairMoments(TokenMoments.of(image), TokenMoments.of(text), owners)
