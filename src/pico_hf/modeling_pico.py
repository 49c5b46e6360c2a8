"""The model: wiring between encoder, weights, scores and loss, and the Hugging Face outputs."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, VisionTextDualEncoderModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from pico_hf.configuration_pico import PicoConfig
from pico_hf.core.losses import LOSSES, PairLogits
from pico_hf.core.semantic import column_weights
from pico_hf.core.similarity import similarity
from pico_hf.core.token_features import TokenFeatures
from pico_hf.encoders import tokens as encoder_tokens
from pico_hf.encoders.check import check_encoder, fallback_widths
from pico_hf.encoders.table import ENCODERS, architecture
from pico_hf.hub.prototype_files import PicoPrototypes
from pico_hf.hub.source import check_source, split_config_kwargs
from pico_hf.token_model import TokenModel

logger = logging.getLogger(__name__)

# What is in a buffer of the prototypes that a checkpoint lacks; zeros in those not named here.
_BUFFER_INIT = {
    "semantic_probability": init.ones_,
    "image_basis": init.eye_,
    "text_basis": init.eye_,
}


@dataclass
class PicoOutput(ModelOutput):
    """Output of [`PicoModel`].

    Attributes:
        loss: Training loss, a scalar; None unless the batch is a square of matched pairs and
            `return_loss=True`.
        logits_per_image: (images, texts) fp32, `exp(logit_scale)` times the score, plus the bias of
            encoders that have one.
        logits_per_text: (texts, images), the transpose.
        image_features: Token features of the images.
        text_features: Token features of the texts.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_features: TokenFeatures | None = None
    text_features: TokenFeatures | None = None


class PicoModel(TokenModel):
    """Any Hugging Face vision-text dual encoder, scored token by token with weighted columns.

    The score of an image and a text is S = mean_p max_w s[p,w] + mean_w max_p s[p,w] with
    s[p,w] = Σ_d w_d V[p,d] T[w,d] (arXiv 2510.11175). `forward` changes no state; the weights w
    change in `prototypes.refine` alone.

    Args:
        config: The model's configuration.
        encoder: A live dual encoder to wrap; None builds one from `config.encoder_config` with
            random weights (what `from_pretrained` fills).

    Raises:
        ValueError: If the encoder's architecture is not supported, or if there are more prototypes
            than columns.
    """

    base_model_prefix = "pico"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False  # a contrastive loss is a mean over the batch, not over tokens
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ("prototypes",)

    def __init__(self, config: PicoConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        # Not the encoder's own: S adds two cosine means, and some encoders have no scale at all.
        self.pair_logits = PairLogits()
        if encoder is None:
            encoder = encoder_tokens.build_encoder(config.encoder_config)
        if config.fallback_widths:
            encoder_tokens.add_fallback_projections(encoder, config.fallback_widths)
        encoder.config.architectures = [type(encoder).__name__]  # what to build when it is loaded
        config.encoder_config = encoder.config
        self.encoder = encoder
        self.prototypes = PicoPrototypes(
            encoder_tokens.embedding_dim(encoder),
            config.num_prototypes,
            config.probe_size,
            estimator=config.estimator,
            combination=config.combination,
            fusion=config.fusion,
            feedback_temperature=config.feedback_temperature,
            fusion_momentum=config.fusion_momentum,
        )
        self.prototypes.place_beside(encoder)
        self.register_load_state_dict_pre_hook(_rename_scale)  # for a Trainer that resumes
        self.post_init()

    # ---- building ------------------------------------------------------------------------

    @classmethod
    def from_encoder(
        cls, encoder: PreTrainedModel, *, fallback_projection: bool = False, **config_kwargs: Any
    ) -> PicoModel:
        """Wraps a live dual encoder; its weights and its features stay what they are.

        Args:
            encoder: A dual encoder of a supported or registered architecture.
            fallback_projection: True accepts an architecture that is neither: its last hidden
                states with new projections, which have to be trained before scores mean anything.
            config_kwargs: Fields of [`PicoConfig`], such as `num_prototypes=8`.

        Returns:
            The wrapped model with uniform column weights, in the encoder's train/eval mode.

        Raises:
            ValueError: If the architecture is unknown, gives no token features, or if the token map
                does not reproduce the encoder's own pooled features.
        """
        if fallback_projection and architecture(encoder) not in ENCODERS:
            config_kwargs["fallback_widths"] = fallback_widths(encoder)
            logger.warning(
                "%s has no row in the encoder table: its common space of %d columns is untrained. "
                "Train it before you use its scores.",
                type(encoder).__name__,
                config_kwargs["fallback_widths"][-1],
            )
        else:
            check_encoder(encoder)
        model = cls(PicoConfig(encoder_config=encoder.config.to_dict(), **config_kwargs), encoder)
        log_scale, bias = encoder_tokens.logit_scale(encoder)
        with torch.no_grad():
            model.logit_scale.fill_(log_scale - math.log(2.0))  # S spans twice a cosine's range
            model.logit_bias.fill_(bias or 0.0)
        model.name_or_path = encoder.name_or_path  # what an adapter says it was trained on
        model.to(dtype=encoder.dtype, device=encoder.device)
        return model.train(encoder.training)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | os.PathLike, text: str | os.PathLike, **kwargs: Any
    ) -> PicoModel:
        """Joins a vision and a text tower with new projections and wraps the pair.

        Args:
            vision: Path or repository of the vision tower.
            text: Path or repository of the text tower.
            kwargs: Fields of [`PicoConfig`]; the rest goes to
                `VisionTextDualEncoderModel.from_vision_text_pretrained`.

        Returns:
            The wrapped model. Its projections are untrained.

        Raises:
            OSError: If a path holds no tower that may be read.
            ValueError: If a file is damaged or hostile.
        """
        pico, rest = split_config_kwargs(kwargs)
        for side, path in (("vision", vision), ("text", text)):
            own = {k.removeprefix(f"{side}_"): v for k, v in rest.items() if k.startswith(side)}
            check_source(path, own)
            rest[f"{side}_use_safetensors"] = True
        pair = VisionTextDualEncoderModel.from_vision_text_pretrained(
            os.fspath(vision), os.fspath(text), **rest
        )
        return cls.from_encoder(pair, **pico)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fills what a checkpoint lacks: after meta-device loading such buffers are garbage."""
        if isinstance(module, PicoPrototypes):
            for name, buffer in module.named_buffers(recurse=False):
                _BUFFER_INIT.get(name, init.zeros_)(buffer)
        elif isinstance(module, PairLogits):
            init.zeros_(module.logit_scale)
            init.zeros_(module.logit_bias)
        else:
            super()._init_weights(module)

    # ---- weights -------------------------------------------------------------------------

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of what scores are multiplied by."""
        return self.pair_logits.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter:
        """What is added to them then."""
        return self.pair_logits.logit_bias

    @property
    def semantic_probability(self) -> Tensor:
        """P (D,) in [0, 1]: how likely each column carries semantics; ones before a refinement."""
        return self.prototypes.semantic_probability

    @property
    def column_weights(self) -> Tensor:
        """W = D·p / Σp (D,), mean 1, so that margins and temperatures keep their meaning."""
        return column_weights(self.semantic_probability)

    def get_input_embeddings(self) -> nn.Module:
        """The words' embeddings; loaders of peft compare their number with the tokenizer's."""
        return encoder_tokens.word_embeddings(self.encoder)

    def restart_prototypes(self, probe_size: int) -> None:
        """Forgets prototypes and feedback and makes room for a probe set of another size.

        Args:
            probe_size: R, matched pairs in the new probe set.
        """
        self.config.probe_size = probe_size
        self.prototypes.restart(probe_size)

    # ---- scores, loss ----------------------------------------------------------------------

    def score(
        self, images: TokenFeatures, texts: TokenFeatures, column_weights: Tensor | None = None
    ) -> Tensor:
        """S for every image and text.

        Args:
            images: From `encode_images`.
            texts: From `encode_texts`.
            column_weights: (D,) other weights than the model's own, as a trial needs.

        Returns:
            (images, texts) fp32, in [-2, 2] for uniform weights.
        """
        weights = self.column_weights if column_weights is None else column_weights
        return similarity(images, texts, weights)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        word_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        patch_mask: Tensor | None = None,
        text_hidden_states: Tensor | None = None,
        image_ids: Tensor | None = None,
        loss_ramp: float | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> PicoOutput | tuple:
        """Scores all images against all texts; changes no state.

        Args:
            pixel_values: See `encode_images`, like the other image inputs.
            input_ids: See `encode_texts`, like the other text inputs.
            attention_mask: See `encode_texts`.
            pixel_attention_mask: See `encode_images`.
            spatial_shapes: See `encode_images`.
            interpolate_pos_encoding: See `encode_images`.
            token_type_ids: See `encode_texts`.
            position_ids: See `encode_texts`.
            word_mask: See `encode_texts`.
            image_hidden_states: See `encode_images`.
            patch_mask: See `encode_images`.
            text_hidden_states: See `encode_texts`.
            image_ids: (images,) identity of each image; pairs of the same image are no negatives.
            loss_ramp: In [0, 1]: the hinge loss over all negatives, scaled (warm-up). None: over
                the hardest negatives.
            return_loss: True computes the loss when there are as many images as texts, and at
                least two.
            return_dict: False returns a tuple.

        Returns:
            Loss, logits both ways and the token features.
        """
        images = self.encode_images(
            pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            interpolate_pos_encoding=interpolate_pos_encoding,
            image_hidden_states=image_hidden_states,
            patch_mask=patch_mask,
        )
        texts = self.encode_texts(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            word_mask=word_mask,
            text_hidden_states=text_hidden_states,
        )
        scores = self.score(images, texts)
        logits = self.pair_logits(scores)
        loss = None
        if return_loss and len(images) == len(texts) and len(images) > 1:
            loss = self._loss(scores, logits, image_ids, loss_ramp)
        output = PicoOutput(loss, logits, logits.t(), images, texts)
        return output if return_dict is not False else output.to_tuple()

    def _loss(
        self, scores: Tensor, logits: Tensor, image_ids: Tensor | None, ramp: float | None
    ) -> Tensor:
        loss = LOSSES[self.config.loss]
        if self.config.loss == "hinge":
            return loss(scores, image_ids, margin=self.config.margin, ramp=ramp)
        return loss(logits, image_ids)


def _rename_scale(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    """Reads checkpoints in which the scale and the bias were no module's but the model's own."""
    for name in ("logit_scale", "logit_bias"):
        if f"{prefix}{name}" in state:
            state[f"{prefix}pair_logits.{name}"] = state.pop(f"{prefix}{name}")
