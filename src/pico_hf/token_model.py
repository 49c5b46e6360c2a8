"""Pictures and texts become unit-length tokens of the common space; what of it may be changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pico_hf.core.calibration import ColumnMoments, StyleCalibration
from pico_hf.core.token_features import TokenFeatures
from pico_hf.encoders import tokens as encoder_tokens
from pico_hf.hub.loading import StoredPicoModel

# What `encode_images` takes of a batch.
IMAGE_INPUTS = (
    "pixel_values",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_hidden_states",
    "patch_mask",
)


class TokenModel(StoredPicoModel):
    """The part of [`PicoModel`] that encodes; freezing and calibrating concern nothing else."""

    _towers_frozen = False
    _calibration: StyleCalibration | None = None

    # ---- tokens ----------------------------------------------------------------------------

    def encode_images(
        self,
        pixel_values: Tensor | None = None,
        *,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        image_hidden_states: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> TokenFeatures:
        """Images to unit-length patch features.

        Args:
            pixel_values: What the processor gives.
            pixel_attention_mask: NaFlex only: real patches.
            spatial_shapes: NaFlex only: rows and columns of patches.
            interpolate_pos_encoding: For towers that take it.
            image_hidden_states: (images, patches, hidden) tower outputs computed before, instead of
                `pixel_values`.
            patch_mask: (images, patches) True = real patch of `image_hidden_states`; None = all.

        Returns:
            Features (images, patches, D) fp32 of unit length, mask (images, patches) bool.
        """
        hidden = self._image_hidden_states(
            pixel_values,
            image_hidden_states,
            patch_mask,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        if self._calibration is not None:
            hidden = self._calibration(hidden)
        if self.training and self.config.column_dropout > 0:
            hidden = _without_some_columns(hidden, self.config.column_dropout)
        projected = encoder_tokens.project_image_tokens(self.encoder, hidden.features)
        tokens = _unit_length(projected, hidden.mask, "image")
        return self.prototypes.to_columns(tokens, "image")

    def _image_hidden_states(
        self,
        pixel_values: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        patch_mask: Tensor | None = None,
        **extras: Any,
    ) -> TokenFeatures:
        """What comes before projections: computed before, or the tower's output for pixels."""
        if image_hidden_states is not None:
            return _hidden(self, image_hidden_states, patch_mask)
        if pixel_values is None:
            raise ValueError("Give `pixel_values` or `image_hidden_states`, got neither.")
        given = {name: value for name, value in extras.items() if value is not None}
        return encoder_tokens.image_hidden_states(self.encoder, pixel_values=pixel_values, **given)

    def encode_texts(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        word_mask: Tensor | None = None,
        text_hidden_states: Tensor | None = None,
    ) -> TokenFeatures:
        """Texts to unit-length word features.

        Args:
            input_ids: (texts, words).
            attention_mask: (texts, words), 1 = a token the tower attends to.
            token_type_ids: For towers that take it.
            position_ids: For towers that take it.
            word_mask: (texts, words) True = a word that takes part in the score. None: every
                attended token but the special ones.
            text_hidden_states: (texts, words, hidden) tower outputs computed before, instead of
                `input_ids`.

        Returns:
            Features (texts, words, D) fp32 of unit length, mask (texts, words) bool.
        """
        if text_hidden_states is None:
            if input_ids is None:
                raise ValueError(
                    "Give `input_ids` or `text_hidden_states`, got neither. Features of images "
                    "alone come from `encode_images`."
                )
            extras = {"token_type_ids": token_type_ids, "position_ids": position_ids}
            given = {name: value for name, value in extras.items() if value is not None}
            hidden = encoder_tokens.text_hidden_states(
                self.encoder,
                input_ids=input_ids,
                attention_mask=attention_mask,
                word_mask=word_mask,
                **given,
            )
        else:
            hidden = _hidden(self, text_hidden_states, word_mask)
        projected = encoder_tokens.project_text_tokens(self.encoder, hidden.features)
        tokens = _unit_length(projected, hidden.mask, "text")
        return self.prototypes.to_columns(tokens, "text")

    # ---- style -----------------------------------------------------------------------------

    def calibrate(
        self,
        gallery: Iterable[Mapping[str, Tensor]] | None,
        reference: Iterable[Mapping[str, Tensor]] | None = None,
    ) -> None:
        """From now on takes the gallery's style, as its column statistics show it, out of images.

        Needs neither labels nor captions: one pass over the gallery's pictures, which should be of
        one style, and one over pictures like those the model was trained on. Texts are left alone.
        Nothing of it is saved: it belongs to a gallery, not to the model.

        Args:
            gallery: Batches of the pictures to be scored, as a collator gives them (the image
                inputs of `encode_images`; others are ignored). None: back to no calibration.
            reference: Likewise, of the training data; a thousand are enough.

        Raises:
            ValueError: If there is a gallery and no reference, or if either is empty.
        """
        self._calibration = None
        if gallery is None:
            return
        if reference is None:
            raise ValueError(
                "`reference` must be batches of pictures like those of the training data, got None."
            )
        gallery_moments, reference_moments = (
            ColumnMoments.of(self._gallery_states(batch) for batch in batches)
            for batches in (gallery, reference)
        )
        self._calibration = StyleCalibration(gallery_moments, reference_moments)

    @torch.no_grad()
    def _gallery_states(self, batch: Mapping[str, Tensor]) -> TokenFeatures:
        """Hidden states of a batch's pictures; what else is in it is ignored."""
        given = {name: batch[name].to(self.device) for name in IMAGE_INPUTS if name in batch}
        return self._image_hidden_states(**given)

    # ---- freezing ------------------------------------------------------------------------

    def freeze_towers(self) -> None:
        """Trains only what comes after the towers' hidden states: projections and logit scale.

        Frozen towers stay in eval mode, so neither dropout nor batch statistics move and their
        hidden states can be cached.

        Of a model that is adapted by peft the adapter's own parameters alone are trained, as ever.

        Raises:
            ValueError: If nothing comes after the hidden states, or if the towers are adapted.
        """
        trainable = set(encoder_tokens.projection_parameters(self.encoder))
        if not trainable:
            raise ValueError(
                f"{type(self.encoder).__name__} has no projections after its towers: with frozen "
                "towers nothing is left to train. Train the towers too, or adapt them by LoRA."
            )
        parameters = dict(self.encoder.named_parameters())
        if any(".lora_" in name or ".modules_to_save." in name for name in parameters):
            adapted = {name for name, parameter in parameters.items() if parameter.requires_grad}
            if tower := sorted(adapted - trainable):
                raise ValueError(
                    f"Towers that an adapter trains (`{tower[0]}`, …) cannot be frozen: their "
                    "hidden states change. Leave `freeze_encoder` out, or train without LoRA."
                )
            trainable &= adapted
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trainable)
        self._towers_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> TokenModel:
        """Sets the mode; towers that are frozen stay in eval mode."""
        super().train(mode)
        if getattr(self, "_towers_frozen", False):
            self.encoder.eval()
        encoder_tokens.keep_batch_statistics(self.encoder)
        return self


def _hidden(model: TokenModel, states: Tensor, mask: Tensor | None) -> TokenFeatures:
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return TokenFeatures(states.to(model.device, model.dtype), mask.to(model.device))


def _without_some_columns(hidden: TokenFeatures, share: float) -> TokenFeatures:
    """Zeroes columns at random, the same ones in all tokens of an item, and scales up the rest."""
    kept = torch.ones_like(hidden.features[:, :1])
    return TokenFeatures(hidden.features * nn.functional.dropout(kept, share), hidden.mask)


def _unit_length(projected: Tensor, mask: Tensor, side: str) -> TokenFeatures:
    features = nn.functional.normalize(projected.float(), dim=-1)
    if not torch.isfinite(features).all():
        raise ValueError(
            f"The {side} features contain NaN or infinity. Check the encoder's weights and inputs; "
            "if it runs in half precision, try float32 or bfloat16."
        )
    return TokenFeatures(features, mask)
