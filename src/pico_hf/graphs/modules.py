"""The two halves of a model as modules that become graphs: one of images, one of texts.

For tokens the column weights w are folded into the text side, so that one index of image tokens
serves whatever weights a model has. Pooled vectors hold √w on both sides, since a cosine needs the
length of either in weighted columns: those of images are to be made anew for other weights. Scores
of both graphs' outputs: `pico_hf.graphs.scores.score`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pico_hf.core.token_features import TokenFeatures
from pico_hf.encoders.check import dummy_batch
from pico_hf.encoders.table import encoder_spec

OUTPUTS = ("tokens", "mask", "pooled")


class _Graph(nn.Module):
    """One half, with the column weights that the model has now.

    Args:
        model: A [`PicoModel`] in eval mode, which stays as it is; later changes of its weights do
            not count.
    """

    weights: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("weights", model.column_weights.detach().clone())

    def _pooled(self, tokens: TokenFeatures) -> Tensor:
        """Pooled vectors (n, D) times √w, of unit length: the products of both sides' are cos."""
        assert tokens.pooled is not None
        return nn.functional.normalize(tokens.pooled * self.weights.sqrt(), dim=-1)


class ImageGraph(_Graph):
    """Pixels to unit-length patch tokens, which do not depend on w, and a pooled one, which does.

    Args:
        model: See [`_Graph`].
    """

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (images, patches, D) fp32, mask (images, patches) bool, pooled (images, D).

        Tokens are of unit length. Pooled vectors are fp32, columns times √w, then of unit length.
        """
        patches = self.model.encode_images(pixel_values)
        return patches.features, patches.mask, self._pooled(patches)


class TextGraph(_Graph):
    """Token ids to word tokens that are multiplied by the column weights w, and a pooled vector.

    Args:
        model: See [`_Graph`].
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (texts, words, D) fp32 times w, mask (texts, words) bool, pooled (texts, D).

        Tokens are of unit length before. Pooled vectors are fp32, columns times √w, then of unit
        length.

        Args:
            input_ids: (texts, words), padded on either side.
            attention_mask: (texts, words), 1 = a token the tower attends to. None only for towers
                that attend to their padding (SigLIP): see `attends_to_padding`.
        """
        words = self.model.encode_texts(input_ids, attention_mask)
        return words.features * self.weights, words.mask, self._pooled(words)


def attends_to_padding(model: Any) -> bool:
    """Whether the text tower takes no attention mask, as SigLIP's.

    Args:
        model: A [`PicoModel`].
    """
    return encoder_spec(model.encoder).text.pad_is_special


def check_graphable(model: Any) -> None:
    """Refuses a model that has no graph.

    Args:
        model: A [`PicoModel`].

    Raises:
        ValueError: If its image tower takes images of many sizes at once (SigLIP 2 NaFlex).
    """
    if encoder_spec(model.encoder).image.real_patches:
        raise ValueError(
            f"{type(model.encoder).__name__} resizes its position embeddings for every image, "
            "which no graph can. Take a checkpoint whose images have a fixed size, such as "
            "google/siglip2-base-patch16-224."
        )


def example_inputs(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two images and two texts, as the inputs of either graph.

    Args:
        model: A [`PicoModel`].
    """
    images, texts = dummy_batch(model.encoder)
    if not attends_to_padding(model):
        texts["attention_mask"] = torch.ones_like(texts["input_ids"])
    return images, texts
