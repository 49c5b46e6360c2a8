"""The text tower's word embeddings, for tokenizers that gain or lose words."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pico_hf.encoders.spec import tower_config
from pico_hf.encoders.table import encoder_spec


def word_embeddings(encoder: PreTrainedModel) -> nn.Embedding:
    """Finds the text tower's word embeddings by the size of its vocabulary.

    Raises:
        ValueError: If there is none.
    """
    words = tower_config(encoder, encoder_spec(encoder).text, "text").vocab_size
    for module in encoder.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == words:
            return module
    raise ValueError(f"{type(encoder).__name__} has no embeddings of {words} words.")


def resize_word_embeddings(encoder: PreTrainedModel, *args: Any, **kwargs: Any) -> nn.Embedding:
    """Resizes the text tower's word embeddings and the vocabulary size in its config.

    Args:
        encoder: The dual encoder, changed in place.
        args: Of `PreTrainedModel.resize_token_embeddings`.
        kwargs: Likewise.
    """
    words = word_embeddings(encoder)
    path = next(name for name, module in encoder.named_modules() if module is words)
    # Some text towers are no models of their own, so that they cannot be asked to do it.
    resized = encoder._get_resized_embeddings(words, *args, **kwargs)
    encoder.set_submodule(path, resized)
    tower_config(encoder, encoder_spec(encoder).text, "text").vocab_size = resized.num_embeddings
    return resized
