"""The two halves of a model as modules that become graphs: one of images, one of texts.

The column weights are folded into the text side, so that one index of image tokens serves whatever
weights a model has. Scores of both graphs' outputs: `pico_hf.graphs.scores.late_interaction`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pico_hf.encoders.check import dummy_batch
from pico_hf.encoders.table import encoder_spec

OUTPUTS = ("tokens", "mask")


class ImageGraph(nn.Module):
    """Pixels to unit-length patch tokens.

    Args:
        model: A [`PicoModel`], which stays as it is.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (images, patches, D) fp32 of unit length, mask (images, patches) bool."""
        patches = self.model.encode_images(pixel_values)
        return patches.features, patches.mask


class TextGraph(nn.Module):
    """Token ids to word tokens that are multiplied by the column weights w.

    Args:
        model: A [`PicoModel`], which stays as it is; later changes of its weights do not count.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("weights", model.column_weights.detach().clone())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (texts, words, D) fp32, unit-length ones times w, mask (texts, words) bool.

        Args:
            input_ids: (texts, words), padded on either side.
            attention_mask: (texts, words), 1 = a token the tower attends to. None only for towers
                that attend to their padding (SigLIP): see `attends_to_padding`.
        """
        words = self.model.encode_texts(input_ids, attention_mask)
        return words.features * self.weights, words.mask


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
