"""Checks an encoder before it is wrapped: are its tokens right and its weights complete?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pico_hf.core.modes import evaluation_mode
from pico_hf.encoders.projection import apply_steps
from pico_hf.encoders.projection_modules import projection_parameters
from pico_hf.encoders.spec import Step, TokenMap, tower_config
from pico_hf.encoders.table import ENCODERS, architecture, encoder_class, encoder_spec, table_row
from pico_hf.encoders.tokens import (
    image_hidden_states,
    image_output,
    last_hidden_state,
    prefix_length,
    text_hidden_states,
    text_output,
)

TOLERANCE = 1e-4


@torch.no_grad()
def check_encoder(encoder: PreTrainedModel) -> None:
    """Verifies on a dummy batch that the token map reproduces the encoder's pooled features.

    Raises:
        ValueError: If the architecture is not in the table, or if its row does not fit this
            encoder.
    """
    spec = table_row(encoder)
    _check_modules(encoder, (*spec.image.steps, *spec.text.steps))
    with evaluation_mode(encoder):
        images = image_output(encoder, **_dummy_images(encoder, spec.image))
        _check_side(encoder, "image", spec.image, images)
        texts = text_output(encoder, **_dummy_texts(encoder, spec.text))
        _check_side(encoder, "text", spec.text, texts)


@torch.no_grad()
def try_encoder(encoder: PreTrainedModel) -> None:
    """Calls an encoder that has no numbers, so that a wrong setting is met before it is loaded.

    A setting of the wrong type, such as `layer_norm_eps` of None, is met where it is used first.
    What an architecture decides by the numbers themselves cannot be tried.

    Args:
        encoder: On the meta device. One that is not in the table is not tried.
    """
    if architecture(encoder) not in ENCODERS:
        return
    spec = table_row(encoder)
    sides = ((image_output, _dummy_images, spec.image), (text_output, _dummy_texts, spec.text))
    with evaluation_mode(encoder):
        for call, dummy, row in sides:
            try:
                call(encoder, **dummy(encoder, row))
            except RuntimeError as error:  # NotImplementedError is one
                if "meta" not in str(error):
                    raise


@torch.no_grad()
def fallback_widths(encoder: PreTrainedModel) -> list[int]:
    """Widths of image and text hidden states of any architecture, and of a common space for them.

    Raises:
        ValueError: If the encoder gives no token features.
    """
    for method in ("get_image_features", "get_text_features"):
        if not hasattr(encoder, method):
            raise ValueError(
                f"`encoder` must have `{method}` to be wrapped with learned projections, which "
                f"{type(encoder).__name__} has not. Describe it with `pico_hf.register_encoder`."
            )
    blank = TokenMap(())
    with evaluation_mode(encoder):
        images = encoder.get_image_features(**_dummy_images(encoder, blank))
        texts = encoder.get_text_features(**_dummy_texts(encoder, blank))
    image = last_hidden_state(images, encoder, "image").shape[-1]
    text = last_hidden_state(texts, encoder, "text").shape[-1]
    return [image, text, min(image, text)]


def dummy_batch(encoder: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes two images and two texts that the encoder takes, as inputs of each side."""
    spec = encoder_spec(encoder)
    return _dummy_images(encoder, spec.image), _dummy_texts(encoder, spec.text)


def load_encoder(path: str | os.PathLike, config: Mapping[str, Any], **options: Any) -> Any:
    """Loads a dual encoder in eval mode, and refuses one that lacks weights of its features.

    Args:
        path: Folder or Hub repository.
        config: Its raw config.json.
        options: See `PreTrainedModel.from_pretrained`.

    Returns:
        The encoder; with `output_loading_info=True` also what transformers says of loading it.

    Raises:
        ValueError: If the checkpoint lacks weights that token features depend on. That of a
            captioning model, say, would be completed by random ones.
    """
    chosen = encoder_class(config.get("model_type", ""), config.get("architectures"))
    asked = options.pop("output_loading_info", False)
    encoder, info = chosen.from_pretrained(path, **options, output_loading_info=True)
    encoder.eval()
    known = architecture(encoder) in ENCODERS
    if known and info["missing_keys"]:
        lost = sorted(_parameters_of_features(encoder) & set(info["missing_keys"]))
        if lost:
            raise ValueError(
                f"`{path}` must hold a whole {type(encoder).__name__}, but lacks "
                f"{', '.join(lost[:5])}{f' and {len(lost) - 5} more' if len(lost) > 5 else ''}; "
                f"its config names {config.get('architectures')}. Take a checkpoint of a dual "
                "encoder, or load the encoder yourself and wrap it with `PicoModel.from_encoder`."
            )
    return (encoder, info) if asked else encoder


def _parameters_of_features(encoder: PreTrainedModel) -> set[str]:
    """Names of the parameters that the features of tokens depend on: projections and towers."""
    images, texts = dummy_batch(encoder)
    parameters = {
        name: value for name, value in encoder.named_parameters() if value.is_floating_point()
    }
    wanted = {name: value.requires_grad for name, value in parameters.items()}
    try:
        encoder.requires_grad_(True)
        with torch.enable_grad():
            total = (
                image_hidden_states(encoder, **images).features.float().square().sum()
                + text_hidden_states(encoder, **texts).features.float().square().sum()
            )
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    finally:
        for name, value in parameters.items():
            value.requires_grad_(wanted[name])
    reached = {
        name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None
    }
    return reached | set(projection_parameters(encoder))


def _check_modules(encoder: PreTrainedModel, steps: tuple[Step, ...]) -> None:
    for step in steps:
        try:
            encoder.get_submodule(step.path)
        except AttributeError as error:
            raise ValueError(
                f"{type(encoder).__name__} has no module `{step.path}`, which its row in the "
                "encoder table needs. Use a tower that has it, or describe the encoder with "
                "`pico_hf.register_encoder`."
            ) from error


def _check_side(encoder: PreTrainedModel, side: str, row: TokenMap, out: Any) -> None:
    pooled = _pooled(encoder, side, row, last_hidden_state(out, encoder, side))
    given = out.pooler_output
    if pooled.shape[-1] != given.shape[-1]:
        worst = float("inf")
    elif row.pooled_by == "every":
        worst = float((pooled - given).float().abs().max())
    else:  # the pooled token is one of the row's tokens, or the only one
        difference = (pooled - given.unsqueeze(1)).float().abs().amax(dim=-1)
        worst = float(difference.amin(dim=1).max())
    tolerance = max(TOLERANCE, 4 * torch.finfo(encoder.dtype).eps)
    if not worst <= tolerance * max(1.0, float(given.float().abs().max())):
        raise ValueError(
            f"The {side} tokens of {type(encoder).__name__} do not reproduce its pooled features "
            f"(largest difference {worst:.2g}). Its row in the encoder table does not fit; "
            "describe it with `pico_hf.register_encoder`."
        )


def _pooled(encoder: PreTrainedModel, side: str, row: TokenMap, hidden: Tensor) -> Tensor:
    """(rows, candidates, columns): what the pooled feature is said to be."""
    real = hidden[:, prefix_length(encoder) :] if side == "image" else hidden
    if row.pooled_by == "attention":
        pooled = encoder.get_submodule(row.steps[0].path)(real)
        return apply_steps(encoder, row.steps[1:], pooled.unsqueeze(1))
    if row.pooled_by == "mean_first":
        return apply_steps(encoder, row.steps, real.mean(dim=1, keepdim=True))
    if row.pooled_by == "mean":
        return apply_steps(encoder, row.steps, real).mean(dim=1, keepdim=True)
    return apply_steps(encoder, row.steps, hidden)


def _dummy_images(encoder: PreTrainedModel, row: TokenMap) -> dict[str, Tensor]:
    if row.dummy:
        return row.dummy(encoder)
    config = tower_config(encoder, row, "vision")
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator)
    return {"pixel_values": pixels.to(encoder.device, encoder.dtype)}


def _dummy_texts(encoder: PreTrainedModel, row: TokenMap) -> dict[str, Tensor]:
    """Two texts that end in EOS, so that towers which pool there find it."""
    if row.dummy:
        return row.dummy(encoder)
    config = tower_config(encoder, row, "text")
    eos = getattr(config, "eos_token_id", None)
    last = eos if isinstance(eos, int) and 0 <= eos < config.vocab_size else 2
    body = 1 if last != 1 else 0
    ids = torch.tensor([[body, body, last], [body, body + 2, last]], device=encoder.device)
    return {"input_ids": ids.clamp(max=config.vocab_size - 1)}
