"""How a Hugging Face dual encoder yields token features and masks: one table, one path, one check.

tokens = steps(last_hidden_state without prefix tokens). The same steps must reproduce the encoder's
own `pooler_output`, which `check_encoder` verifies whenever a model is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from pico_hf.similarity import TokenFeatures

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Step:
    """One module on the way from a hidden state to the common space.

    Attributes:
        path: Dotted path of the module inside the encoder.
        pools: True for a module that turns a sequence into one vector (a CLS pooler, an attention
            pool): it is applied to one-token sequences.
    """

    path: str
    pools: bool = False


@dataclass(frozen=True)
class TokenMap:
    """One side of an architecture.

    Attributes:
        steps: Modules applied to every token, in order.
        pooled_by: Where `pooler_output` comes from: `"token"` (one of the tokens: CLS or EOS),
            `"mean"` (of the tokens after the prefix), `"attention"` (a pooling step).
        prefix: Tokens before the first patch or word (CLS, registers, BOS).
        suffix: Tokens after the last word (EOS, SEP); texts only.
        registers: Name of a vision config entry with further prefix tokens.
        pad_is_special: The tower attends to its padding and pads with a special token (SigLIP):
            without an attention mask the words are what is not the pad token.
    """

    steps: tuple[Step, ...]
    pooled_by: str = "token"
    prefix: int = 0
    suffix: int = 0
    registers: str | None = None
    pad_is_special: bool = False


@dataclass(frozen=True)
class EncoderSpec:
    """One row of the table.

    Attributes:
        image: The image side.
        text: The text side.
        logit_scale: Attribute with the logarithm of the scale, None if there is none.
        logit_bias: Attribute with the bias, None if there is none.
    """

    image: TokenMap
    text: TokenMap
    logit_scale: str | None = "logit_scale"
    logit_bias: str | None = None


_VISUAL, _TEXTUAL = Step("visual_projection"), Step("text_projection")
_CLIP_IMAGE = TokenMap((Step("vision_model.post_layernorm"), _VISUAL), prefix=1)
_EOS_TEXT = TokenMap((_TEXTUAL,), prefix=1, suffix=1)
_POOLER_TEXT = TokenMap((Step("text_model.pooler", pools=True), _TEXTUAL), prefix=1, suffix=1)


def _pair(image: TokenMap) -> EncoderSpec:
    return EncoderSpec(image, _POOLER_TEXT)


ENCODERS: dict[str, EncoderSpec] = {
    "clip": EncoderSpec(_CLIP_IMAGE, _EOS_TEXT),
    "metaclip_2": EncoderSpec(_CLIP_IMAGE, _EOS_TEXT),
    "chinese_clip": EncoderSpec(_CLIP_IMAGE, _EOS_TEXT),
    "siglip": EncoderSpec(
        TokenMap((Step("vision_model.head", pools=True),), pooled_by="attention"),
        TokenMap((Step("text_model.head"),), suffix=1, pad_is_special=True),
        logit_bias="logit_bias",
    ),
    "vision-text-dual-encoder/vit": _pair(
        TokenMap((Step("vision_model.pooler", pools=True), _VISUAL), prefix=1)
    ),
    "vision-text-dual-encoder/deit": _pair(
        TokenMap((Step("vision_model.pooler", pools=True), _VISUAL), prefix=2)
    ),
    "vision-text-dual-encoder/swin": _pair(TokenMap((_VISUAL,), pooled_by="mean")),
    "vision-text-dual-encoder/swinv2": _pair(TokenMap((_VISUAL,), pooled_by="mean")),
    "vision-text-dual-encoder/dinov2": _pair(TokenMap((_VISUAL,), prefix=1)),
    "vision-text-dual-encoder/dinov2_with_registers": _pair(
        TokenMap((_VISUAL,), prefix=1, registers="num_register_tokens")
    ),
    "vision-text-dual-encoder/clip_vision_model": _pair(_CLIP_IMAGE),
}


def register_encoder(model_type: str, spec: EncoderSpec) -> None:
    """Adds an architecture, or replaces one.

    Args:
        model_type: `config.model_type`, for a VisionTextDualEncoder with `/` and the vision
            config's `model_type`.
        spec: Its row.
    """
    ENCODERS[model_type] = spec


def encoder_spec(encoder: PreTrainedModel) -> EncoderSpec:
    """The row of an encoder's architecture.

    Raises:
        ValueError: If it has none; names the architectures that have.
    """
    key = encoder.config.model_type
    if key == "vision-text-dual-encoder":
        key = f"{key}/{encoder.config.vision_config.model_type}"
    if key not in ENCODERS:
        raise ValueError(
            f"`encoder` must be a vision-text dual encoder with token features, got model_type "
            f"{key!r}. Supported: {', '.join(sorted(ENCODERS))}. Describe another one with "
            "`pico_hf.register_encoder`."
        )
    return ENCODERS[key]


def image_hidden_states(encoder: PreTrainedModel, **inputs: Any) -> TokenFeatures:
    """The vision tower's output for every patch, before any projection.

    Args:
        encoder: The dual encoder.
        inputs: `pixel_values` and what else the tower takes.

    Returns:
        (images, patches, hidden); prefix tokens are gone, every patch is real.
    """
    hidden = _last_hidden_state(encoder.get_image_features(**inputs), encoder, "image")
    patches = hidden[:, _prefix(encoder) :]
    real = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
    return TokenFeatures(patches, real)


def text_hidden_states(
    encoder: PreTrainedModel,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    word_mask: Tensor | None = None,
    **inputs: Any,
) -> TokenFeatures:
    """The text tower's output for every token, before any projection, and which are words.

    Args:
        encoder: The dual encoder.
        input_ids: (texts, tokens).
        attention_mask: (texts, tokens), handed to the tower as it is.
        word_mask: (texts, tokens) True = word. None: attended tokens without the architecture's
            special tokens at either end; a text of nothing else keeps them.
        inputs: What else the tower takes.

    Returns:
        (texts, tokens, hidden) with the mask of words.
    """
    attention = {} if attention_mask is None else {"attention_mask": attention_mask}
    out = encoder.get_text_features(input_ids=input_ids, **attention, **inputs)
    hidden = _last_hidden_state(out, encoder, "text")
    if word_mask is not None:
        words = word_mask.bool()
    else:
        words = _words(encoder, input_ids, attention_mask)
    return TokenFeatures(hidden, words)


def project_image_tokens(
    encoder: PreTrainedModel, hidden: Float[Tensor, "images patches hidden"]
) -> Float[Tensor, "images patches columns"]:
    """Every patch in the common space, not normalised."""
    return _apply_steps(encoder, encoder_spec(encoder).image.steps, hidden)


def project_text_tokens(
    encoder: PreTrainedModel, hidden: Float[Tensor, "texts words hidden"]
) -> Float[Tensor, "texts words columns"]:
    """Every word in the common space, not normalised."""
    return _apply_steps(encoder, encoder_spec(encoder).text.steps, hidden)


def projection_parameters(encoder: PreTrainedModel) -> list[str]:
    """Names of the encoder's parameters that are applied after the hidden states."""
    spec = encoder_spec(encoder)
    modules = [step.path + "." for side in (spec.image, spec.text) for step in side.steps]
    return [name for name, _ in encoder.named_parameters() if name.startswith(tuple(modules))]


def embedding_dim(encoder: PreTrainedModel) -> int:
    """D, the number of columns of the common space."""
    last = encoder.get_submodule(encoder_spec(encoder).text.steps[-1].path)
    linears = [module for module in last.modules() if isinstance(module, nn.Linear)]
    return linears[-1].out_features


def logit_scale(encoder: PreTrainedModel) -> tuple[float, float | None]:
    """(logarithm of the encoder's scale, its bias or None); 0 where there is no scale."""
    spec = encoder_spec(encoder)
    scale = getattr(encoder, spec.logit_scale).item() if spec.logit_scale else 0.0
    return scale, getattr(encoder, spec.logit_bias).item() if spec.logit_bias else None


@torch.no_grad()
def check_encoder(encoder: PreTrainedModel) -> None:
    """Verifies on a dummy batch that the token map reproduces the encoder's pooled features.

    Raises:
        ValueError: If it does not: the table's row does not fit this encoder.
    """
    spec = encoder_spec(encoder)
    training = encoder.training
    encoder.eval()
    try:
        _check_side(
            encoder, "image", spec.image, encoder.get_image_features, _dummy_images(encoder)
        )
        _check_side(encoder, "text", spec.text, encoder.get_text_features, _dummy_texts(encoder))
    finally:
        encoder.train(training)


def _check_side(
    encoder: PreTrainedModel,
    side: str,
    row: TokenMap,
    features: Callable[..., Any],
    inputs: dict[str, Tensor],
) -> None:
    out = features(**inputs)
    hidden = _last_hidden_state(out, encoder, side)
    if row.pooled_by == "attention":
        pooled = encoder.get_submodule(row.steps[0].path)(hidden)
        pooled = _apply_steps(encoder, row.steps[1:], pooled.unsqueeze(1))
    else:
        pooled = _apply_steps(encoder, row.steps, hidden)
        if row.pooled_by == "mean":
            pooled = pooled.mean(dim=1, keepdim=True)
    difference = (pooled - out.pooler_output.unsqueeze(1)).float().abs().amax(dim=-1)
    worst = float(difference.amin(dim=1).max())  # the pooled token is one of the row's tokens
    if not worst <= TOLERANCE * max(1.0, float(out.pooler_output.float().abs().max())):
        raise ValueError(
            f"The {side} tokens of {type(encoder).__name__} do not reproduce its pooled features "
            f"(largest difference {worst:.2g}). Its row in the encoder table does not fit; "
            "describe it with `pico_hf.register_encoder`."
        )


def _apply_steps(encoder: PreTrainedModel, steps: tuple[Step, ...], hidden: Tensor) -> Tensor:
    for step in steps:
        module = encoder.get_submodule(step.path)
        if step.pools:
            rows, tokens = hidden.shape[:2]
            hidden = module(hidden.reshape(rows * tokens, 1, -1)).reshape(rows, tokens, -1)
        else:
            hidden = module(hidden)
    return hidden


def _last_hidden_state(out: Any, encoder: PreTrainedModel, side: str) -> Tensor:
    hidden = getattr(out, "last_hidden_state", None)
    if hidden is None or hidden.ndim != 3:
        raise ValueError(
            f"{type(encoder).__name__} gives no {side} token features: `last_hidden_state` is "
            f"{'missing' if hidden is None else f'of shape {tuple(hidden.shape)}'}. PICO needs one "
            "vector per patch and per word."
        )
    return hidden


def _prefix(encoder: PreTrainedModel) -> int:
    row = encoder_spec(encoder).image
    registers = getattr(encoder.config.vision_config, row.registers) if row.registers else 0
    return row.prefix + registers


def _words(encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Attended tokens without the first `prefix` and last `suffix`, on either padding side."""
    row = encoder_spec(encoder).text
    if attention_mask is not None:
        attended = attention_mask.bool()
    elif row.pad_is_special:
        words = input_ids != encoder.config.text_config.pad_token_id
        return torch.where(words.any(dim=1, keepdim=True), words, True)
    else:
        attended = torch.ones_like(input_ids, dtype=torch.bool)
    position = attended.long().cumsum(dim=1)
    last = position[:, -1:] - row.suffix
    words = attended & (position > row.prefix) & (position <= last)
    return torch.where(words.any(dim=1, keepdim=True), words, attended)


def _dummy_images(encoder: PreTrainedModel) -> dict[str, Tensor]:
    config = encoder.config.vision_config
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator)
    return {"pixel_values": pixels.to(encoder.device, encoder.dtype)}


def _dummy_texts(encoder: PreTrainedModel) -> dict[str, Tensor]:
    """Two texts that end in EOS, so that towers which pool there find it."""
    config = encoder.config.text_config
    eos = getattr(config, "eos_token_id", None)
    last = eos if isinstance(eos, int) and 0 <= eos < config.vocab_size else 2
    body = 1 if last != 1 else 0
    ids = torch.tensor([[body, body, last], [body, body + 2, last]], device=encoder.device)
    return {"input_ids": ids.clamp(max=config.vocab_size - 1)}
