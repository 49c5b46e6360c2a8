"""Peers in the same harness: gates, weights and selections learned by gradient on the trained base.

Each learns a few numbers on top of frozen projections, with the loss and the pairs the base was
trained on. `"learned column weights"`: one weight per column. `"learned token gates"`: a linear
gate of every patch and word, by which the means over patches and words are weighted. `"patch
selection"`: the half of the patches with the largest learned gate, in the manner of LAPS (CVPR
2024), whose selection also looks at the text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pico_hf import PicoTrainer
from pico_hf.core.encoded_split import EncodedSplit
from pico_hf.core.losses import LOSSES
from pico_hf.core.metrics import retrieval_metrics
from pico_hf.core.token_features import TokenFeatures

EPOCHS, RATE, BLOCK = 3, 1e-2, 16


class Gated(nn.Module):
    """Weighted interaction written out, with weights of columns, patches and words."""

    def __init__(self, columns: int, *, weigh_columns: bool, gate: bool, keep: float = 1.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(columns), requires_grad=weigh_columns)
        self.patch_gate, self.word_gate = nn.Linear(columns, 1), nn.Linear(columns, 1)
        for linear in (self.patch_gate, self.word_gate):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            linear.requires_grad_(gate)
        self.keep = keep

    def forward(self, images: TokenFeatures, texts: TokenFeatures) -> Tensor:
        products = torch.einsum(
            "ipd,twd->itpw", images.features * self.weights.clamp(min=0), texts.features
        )
        words = texts.mask.unsqueeze(1)  # (1, texts, words) below
        best_word = products.masked_fill(~words.unsqueeze(0), -torch.inf).amax(dim=3)
        patch_weight = self._gate(self.patch_gate, images, self.keep)
        word_weight = self._gate(self.word_gate, texts, 1.0)
        chosen = (patch_weight > 0).view(len(images), 1, -1, 1)
        best_patch = products.masked_fill(~chosen, -torch.inf).amax(dim=2)
        best_patch = best_patch.masked_fill(~texts.mask, 0.0)
        return torch.einsum("itp,ip->it", best_word, patch_weight) + torch.einsum(
            "itw,tw->it", best_patch, word_weight
        )

    @staticmethod
    def _gate(linear: nn.Linear, tokens: TokenFeatures, keep: float) -> Tensor:
        """(items, tokens) weights that add up to 1; the lowest are 0 where only a share is kept."""
        level = linear(tokens.features).squeeze(-1)
        gate = level.sigmoid() * tokens.mask
        if keep < 1:
            least = level.topk(int(level.shape[1] * keep), dim=1).values[:, -1:]
            gate = gate * (level >= least)
        return gate / gate.sum(dim=1, keepdim=True)


def learned(**knobs: bool | float) -> Callable[..., dict[str, dict[str, float]]]:
    """A peer: from a trained base and its encoded test splits to metrics."""

    def peer(trainer: PicoTrainer, encoded: dict[str, EncodedSplit]) -> dict[str, dict[str, float]]:
        model = trainer.pico_model
        torch.manual_seed(trainer.args.seed)
        gated = Gated(len(model.semantic_probability), **knobs)
        optimizer = torch.optim.Adam([p for p in gated.parameters() if p.requires_grad], lr=RATE)
        for epoch in range(EPOCHS):
            trainer.train_dataset.set_epoch(epoch)
            for batch in trainer.get_train_dataloader():
                with torch.no_grad():
                    images = model.encode_images(
                        image_hidden_states=batch["image_hidden_states"],
                        patch_mask=batch["patch_mask"],
                    )
                    texts = model.encode_texts(
                        text_hidden_states=batch["text_hidden_states"],
                        word_mask=batch["word_mask"],
                    )
                values = gated(images, texts)
                if model.config.loss != "hinge":
                    values = model.pair_logits(values)
                loss = LOSSES[model.config.loss](values, batch["image_ids"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {part: metrics(gated, split) for part, split in encoded.items()}

    return peer


@torch.no_grad()
def metrics(score: Callable[..., Tensor], split: EncodedSplit) -> dict[str, float]:
    """Metrics of any scorer, averaged over galleries, a block of images at a time."""
    every = []
    for gallery in split.gallery.unique():
        rows = split.gallery == gallery
        columns = rows[split.text_to_image]
        images, texts = split.images[rows], split.texts[columns]
        row_of = rows.long().cumsum(0) - 1
        blocks = [score(images[n : n + BLOCK], texts) for n in range(0, len(images), BLOCK)]
        every.append(retrieval_metrics(torch.cat(blocks), row_of[split.text_to_image[columns]]))
    return {name: sum(one[name] for one in every) / len(every) for name in every[0]}


PEERS = {
    "learned column weights": learned(weigh_columns=True, gate=False),
    "learned token gates": learned(weigh_columns=False, gate=True),
    "patch selection, half": learned(weigh_columns=False, gate=True, keep=0.5),
}
