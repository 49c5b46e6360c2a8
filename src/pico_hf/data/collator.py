"""Rows to batches, with the architecture's padding and a mask of the words.

Which other tokens take part, the model says: see `pico_hf.encoders.special_tokens`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from pico_hf.data.columns import find_in_row, texts_of
from pico_hf.data.image_files import pixel_budget
from pico_hf.data.image_modes import colour_of
from pico_hf.data.image_sizes import check_image_sizes
from pico_hf.data.images import as_rgb
from pico_hf.data.token_store import POOLED_KEYS
from pico_hf.encoders.text_lengths import text_lengths

# Cached outputs of the towers, and the mask that each is padded with.
_STATES = {"image_hidden_states": "patch_mask", "text_hidden_states": "word_mask"}


class PicoCollator:
    """Rows to a batch of pairs, with the architecture's padding and a mask of the words.

    Args:
        processor: What `AutoProcessor` gives: a tokenizer and an image processor.
        max_length: Longest text in tokens, at most what the text tower takes; None asks the
            tokenizer and the configuration.
        config: The model's configuration or its encoder's. It says whether texts are padded to a
            fixed length (SigLIP: its tower attends to the padding); None goes by the name of the
            processor's class.
        image_column: None finds it in the first row of a batch.
        caption_column: One caption or a list of captions; None finds it.
        background: Colour behind transparent pixels, as `PIL.ImageColor` names it.

    Raises:
        ValueError: If the processor lacks a tokenizer or an image processor, if it would make huge
            images, or if `max_length` is more than the text tower takes.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        *,
        config: PreTrainedConfig | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        background: str | tuple[int, int, int] = "white",
    ) -> None:
        self.tokenizer = getattr(processor, "tokenizer", None)
        self.image_processor = getattr(processor, "image_processor", None)
        if self.tokenizer is None or self.image_processor is None:
            raise ValueError(
                "`processing_class` must hold a tokenizer and an image processor, got "
                f"{type(processor).__name__}. Load it with AutoProcessor.from_pretrained(…)."
            )
        check_image_sizes(self.image_processor)
        self.image_column, self.caption_column = image_column, caption_column
        self.background = colour_of(background)
        if config is not None:
            fixed, positions = text_lengths(getattr(config, "encoder_config", config))
        else:
            fixed = 64 if "siglip" in type(processor).__name__.lower() else None
            positions = None
        if max_length and positions and max_length > positions:
            raise ValueError(
                f"`max_length` must be at most {positions}, the tokens that the text tower takes, "
                f"got {max_length}. Pass a smaller one, or None for the longest possible."
            )
        self.fixed_length = fixed is not None
        longest = min(self.tokenizer.model_max_length, positions or 512, 512)
        self.max_length = max_length or fixed or longest

    @property
    def fingerprint(self) -> str:
        """Changes with anything that decides what pixels and tokens a row becomes."""
        parts = (
            type(self.image_processor).__qualname__,
            self.image_processor.to_dict(),
            _tokenizer_content(self.tokenizer),
            (self.max_length, self.fixed_length, self.background, pixel_budget()),
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batch of whatever the rows hold: images, captions, both, or cached hidden states.

        A row with several captions becomes as many pairs with one image; `image_ids` then says
        that they are no negatives of each other.
        """
        if not rows:
            raise ValueError("`rows` must hold at least one row, got none.")
        batch: dict[str, Tensor] = {}
        image, caption = find_in_row(rows[0], self.image_column, self.caption_column)
        if image is None and caption is None and not rows[0].keys() & _STATES.keys():
            raise ValueError(
                "The rows have neither an image nor a caption, only: "
                f"{', '.join(rows[0]) or 'nothing'}. Name the columns with `image_column` and "
                "`caption_column`; `remove_unused_columns=False` keeps the Trainer from dropping "
                "them."
            )
        texts = [texts_of(n, row[caption]) if caption else [""] for n, row in enumerate(rows)]
        owner = [n for n, captions in enumerate(texts) for _ in captions]
        several = len(owner) > len(rows)
        if image is not None:
            inputs = self.image_processor(
                images=[as_rgb(row[image], self.background) for row in rows], return_tensors="pt"
            )
            batch |= {name: value[owner] if several else value for name, value in inputs.items()}
        if caption is not None:
            batch |= self._words([text for captions in texts for text in captions])
        for key, mask in _STATES.items():
            if key in rows[0]:
                batch[key], batch[mask] = _pad([row[key] for row in rows])
                pooled = POOLED_KEYS[key]
                if pooled in rows[0]:
                    batch[pooled] = torch.stack([row[pooled] for row in rows])
        if "image_ids" in rows[0] or several:
            batch["image_ids"] = torch.tensor([rows[n].get("image_ids", n) for n in owner])
        return batch

    def _words(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids; words are the tokens that are neither special nor padding."""
        tokens = self.tokenizer(
            captions,
            padding="max_length" if self.fixed_length else True,
            truncation=True,
            max_length=self.max_length,
            padding_side="right",  # towers count positions from the first token
            return_tensors="pt",
            return_attention_mask=True,
            return_special_tokens_mask=True,
        )
        special = tokens.pop("special_tokens_mask").bool()
        attended = tokens["attention_mask"].bool()
        words = attended & ~special
        bare = ~words.any(dim=1, keepdim=True)  # a text of nothing but special tokens keeps them
        tokens["word_mask"] = torch.where(bare, attended, words)
        if self.fixed_length:
            del tokens["attention_mask"]  # this tower was trained to attend to its padding
        return dict(tokens)


def _tokenizer_content(tokenizer: Any) -> list[Any]:
    """What a tokenizer does to a text, whatever its name: vocabulary, rules, special tokens."""
    content = [type(tokenizer).__qualname__, tokenizer.padding_side, tokenizer.truncation_side]
    content.append({name: str(token) for name, token in tokenizer.special_tokens_map.items()})
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # of the last call
            rules.pop(state, None)
        return [*content, rules]
    options = {name: str(value) for name, value in tokenizer.init_kwargs.items()}
    for name in ("name_or_path", "vocab_file", "merges_file", "tokenizer_file"):
        options.pop(name, None)  # where it came from
    return [*content, tokenizer.get_vocab(), options]


def _pad(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, tokens, hidden) zero-padded, and (rows, tokens) True where a token is real."""
    lengths = torch.tensor([len(state) for state in states])
    padded = pad_sequence(states, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
