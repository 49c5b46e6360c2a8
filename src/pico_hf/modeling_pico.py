"""The model: from pixels and words to token features, weighted scores and the loss."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from pico_hf.configuration_pico import PicoConfig, split_config_kwargs
from pico_hf.core.calibration import StyleCalibration
from pico_hf.core.losses import START_SCALE, PairLogits
from pico_hf.core.score_form import column_weights
from pico_hf.core.similarity import same_side_similarity, weighted_score
from pico_hf.core.token_features import TokenFeatures, drop_columns, halves, unit_length
from pico_hf.encoders import checkpointing
from pico_hf.encoders import tokens as encoder_tokens
from pico_hf.encoders.building import complete_encoder
from pico_hf.encoders.freezing import freeze_towers, keep_batch_statistics
from pico_hf.encoders.gallery import calibrated, calibration_of
from pico_hf.encoders.word_embeddings import resize_word_embeddings, word_embeddings
from pico_hf.hub import loading
from pico_hf.hub.errors import plain_errors
from pico_hf.hub.prototype_files import PicoPrototypes
from pico_hf.hub.saving import save_model
from pico_hf.modeling_outputs import PicoOutput, pair_output


class PicoPreTrainedModel(PreTrainedModel):
    """How a [`PicoModel`] is initialised, loaded, saved and shared."""

    config: PicoConfig
    config_class = PicoConfig
    base_model_prefix = "pico"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False  # a contrastive loss is a mean over the batch, not over tokens
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True
    _keep_in_fp32_modules_strict = PicoPrototypes.exact_buffers
    _set_gradient_checkpointing = checkpointing.set_gradient_checkpointing
    enable_input_require_grads = checkpointing.enable_input_require_grads

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fills what a checkpoint lacks: after meta-device loading such buffers are garbage."""
        if isinstance(module, PicoPrototypes):
            module.init_buffers()
        elif isinstance(module, PairLogits):
            init.constant_(module.logit_scale, math.log(START_SCALE))
            init.zeros_(module.logit_bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        prototypes: str | os.PathLike | PicoPrototypes | None = None,
        base: str | os.PathLike | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> PicoModel:
        """Loads a Pico model, or loads any other dual encoder and wraps it, or merges an adapter.

        `pico_hf.load_adapter_model` keeps an adapter apart from its base.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository. Weights are read as safetensors
                only, and are checked before.
            args: See `PreTrainedModel.from_pretrained`.
            prototypes: Prototypes saved alone for this very encoder: folder, repository or object.
            base: What an adapter was trained on: folder, repository or model; None: what it names.
            kwargs: Likewise, and fields of [`PicoConfig`]; for another dual encoder also
                `fallback_projection` and `pooled_share`, see `PicoModel.from_encoder`.

        Raises:
            OSError: If the path holds no model that may be read.
            ValueError: If a keyword is unknown, if a file is damaged or hostile, if another dual
                encoder lacks its projections, or if the prototypes do not fit the encoder.
        """
        kwargs |= {"prototypes": prototypes, "base": base}
        stock = super().from_pretrained
        return loading.load_model(cls, stock, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves weights, configuration, and the prototypes once more in files of their own.

        Args:
            save_directory: Folder, created if need be.
            push_to_hub: True uploads as well, to `repo_id` or the folder's name.
            kwargs: See `PreTrainedModel.save_pretrained`; with `push_to_hub` also its arguments.
        """
        stock = super().save_pretrained
        save_model(self, stock, save_directory, push_to_hub=push_to_hub, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` writes; see `PreTrainedModel.push_to_hub`."""
        kwargs.setdefault("tags", ["pico", "image-text-retrieval", "late-interaction"])
        with plain_errors(repo_id):
            return super().push_to_hub(repo_id, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """From now on saves the package's modules too, for whoever has not installed it."""
        super().register_for_auto_class(auto_class)
        cls.config_class.register_for_auto_class()


class PicoModel(PicoPreTrainedModel):
    """Any Hugging Face vision-text dual encoder, scored token by token with weighted columns.

    S = mean_p max_w s[p,w] + mean_w max_p s[p,w], s[p,w] = Σ_d w_d V[p,d] T[w,d] (arXiv 2510.11175)
    A share m of the score may be the cosine of pooled features instead: (1 - m) · S + m · cos.

    Args:
        config: The model's configuration.
        encoder: A live dual encoder; None builds one with random weights from the configuration.

    Raises:
        ValueError: If the encoder is not supported or has fewer columns than there are prototypes.
    """

    _towers_frozen = False
    _calibration: StyleCalibration | None = None

    def __init__(self, config: PicoConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        # Not the encoder's own: S adds two cosine means, and some encoders have no scale at all.
        self.pair_logits = PairLogits()
        encoder = complete_encoder(encoder, config.encoder_config, config.fallback_widths)
        encoder.config.architectures = [type(encoder).__name__]  # what to build when it is loaded
        config.encoder_config = encoder.config
        self.encoder = encoder
        self.prototypes = PicoPrototypes.for_config(config, encoder)
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        encoder: PreTrainedModel,
        *,
        fallback_projection: bool = False,
        pooled_share: float | None = None,
        **config_kwargs: Any,
    ) -> PicoModel:
        """Wraps a live dual encoder; its weights and its features stay what they are.

        Args:
            encoder: A dual encoder of a supported or registered architecture.
            fallback_projection: True accepts any architecture with token features: new projections
                follow its last hidden states and have to be trained before scores mean anything.
            pooled_share: How much of the score the encoder's own pooled features are, in [0, 1].
                None: 1, which ranks just as the encoder does until feedback on pairs finds
                something better; 0, tokens alone, where projections are newly drawn.
            config_kwargs: Fields of [`PicoConfig`], such as `num_prototypes=8`.

        Raises:
            ValueError: If the architecture is unknown, or if its tokens do not reproduce the
                encoder's own pooled features.
        """
        return loading.wrap_encoder(cls, encoder, fallback_projection, pooled_share, config_kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | os.PathLike, text: str | os.PathLike, **kwargs: Any
    ) -> PicoModel:
        """Joins two towers, paths or repositories, with new projections and wraps the pair.

        `kwargs`: fields of [`PicoConfig`], and options of the stock method of this name.
        """
        pico, rest = split_config_kwargs(kwargs)
        return cls.from_encoder(loading.join_towers(vision, text, rest), **pico)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of what scores are multiplied by."""
        return self.pair_logits.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter:
        """What is added to the scaled scores."""
        return self.pair_logits.logit_bias

    @property
    def semantic_probability(self) -> Tensor:
        """P (D,) in [0, 1]: how likely each column carries semantics; ones before a refinement."""
        return self.prototypes.semantic_probability

    @property
    def column_weights(self) -> Tensor:
        """W = D·p / Σp (D,), mean 1, so that margins and temperatures keep their meaning."""
        return column_weights(self.semantic_probability)

    @property
    def pooled_share(self) -> float:
        """How much of the score the encoder's pooled features are, in [0, 1]."""
        return self.prototypes.score_share

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings; loaders of peft compare their number with the tokenizer's."""
        return word_embeddings(self.encoder)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Makes room for another number of token ids; see `PreTrainedModel`."""
        return resize_word_embeddings(self.encoder, *args, **kwargs)

    def restart_prototypes(self, probe_size: int) -> None:
        """Forgets prototypes and feedback, and makes room for a probe set of `probe_size` pairs."""
        self.config.probe_size = probe_size
        self.prototypes.restart(probe_size)

    def adopt_prototypes(self, prototypes: PicoPrototypes) -> None:
        """Takes prototypes that were saved alone; ValueError if they do not fit."""
        loading.adopt_prototypes(self, prototypes)

    def encode_images(
        self,
        pixel_values: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        patch_mask: Tensor | None = None,
        image_pooled_state: Tensor | None = None,
        **inputs: Any,
    ) -> TokenFeatures:
        """Images to unit-length features of patches, after kept special tokens, and of the whole.

        Args:
            pixel_values: What the processor gives.
            image_hidden_states: Instead: (images, patches, hidden) tower outputs computed before.
            patch_mask: (images, patches) True = real patch of those; None = all.
            image_pooled_state: (images, hidden) of the token that the encoder pools.
            inputs: What else the tower takes, such as NaFlex's `spatial_shapes`; None is left out.

        Returns:
            Features (images, patches, D) fp32 of unit length, mask (images, patches) bool, pooled
            (images, D), which is None in training while it is no part of the score.
        """
        inputs |= {"keep_special_tokens": self.config.keep_special_tokens}
        computed = (image_hidden_states, patch_mask, image_pooled_state)
        hidden = encoder_tokens.image_hidden_states(self.encoder, pixel_values, *computed, **inputs)
        hidden = calibrated(self, hidden, self._calibration)
        hidden = drop_columns(hidden, self.config.column_dropout if self.training else 0.0)
        return self._to_columns(hidden, "image")

    def encode_texts(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        word_mask: Tensor | None = None,
        text_hidden_states: Tensor | None = None,
        text_pooled_state: Tensor | None = None,
        **inputs: Any,
    ) -> TokenFeatures:
        """Texts to unit-length features of their words, and of the whole text.

        Args:
            input_ids: (texts, words).
            attention_mask: (texts, words), 1 = a token the tower attends to.
            word_mask: (texts, words) True = a word that takes part in the score; None: every one.
            text_hidden_states: Instead: (texts, words, hidden) tower outputs computed before.
            text_pooled_state: (texts, hidden) output of the token that the encoder pools.
            inputs: What else the tower takes, such as `token_type_ids`; None is left out.

        Returns:
            Features (texts, words, D) fp32 of unit length, mask (texts, words) bool, pooled
            (texts, D) as of images.
        """
        inputs |= {"keep_special_tokens": self.config.keep_special_tokens}
        given = (input_ids, attention_mask, word_mask, text_hidden_states, text_pooled_state)
        hidden = encoder_tokens.text_hidden_states(self.encoder, *given, **inputs)
        return self._to_columns(hidden, "text")

    def _to_columns(self, hidden: TokenFeatures, side: str) -> TokenFeatures:
        how = (not self.training or self.pooled_share > 0, self.config.keep_special_tokens)
        tokens = encoder_tokens.project(self.encoder, side, hidden, *how)
        tokens = unit_length(tokens.features, tokens.mask, side, tokens.pooled)
        return self.prototypes.to_columns(tokens, side)

    def get_image_features(self, pixel_values: Tensor, **inputs: Any) -> ModelOutput:
        """The encoder's own image features: `pooler_output` (images, D) and `last_hidden_state`."""
        return encoder_tokens.image_output(self.encoder, pixel_values=pixel_values, **inputs)

    def get_text_features(self, input_ids: Tensor, **inputs: Any) -> ModelOutput:
        """The encoder's own text features: `pooler_output` (texts, D) and `last_hidden_state`."""
        return encoder_tokens.text_output(self.encoder, input_ids=input_ids, **inputs)

    def score(
        self,
        images: TokenFeatures,
        texts: TokenFeatures,
        column_weights: Tensor | None = None,
        pooled_share: float | None = None,
    ) -> Tensor:
        """(1 - m) · S + m · cos for every image and text.

        Args:
            images: From `encode_images`.
            texts: From `encode_texts`.
            column_weights: (D,) other weights than the model's own, as a trial needs.
            pooled_share: Another m than the model's own.

        Returns:
            (images, texts) fp32, in [-2, 2] for uniform weights.
        """
        weights = self.column_weights if column_weights is None else column_weights
        share = self.pooled_share if pooled_share is None else pooled_share
        return weighted_score(images, texts, weights, share)

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
        image_pooled_state: Tensor | None = None,
        text_hidden_states: Tensor | None = None,
        text_pooled_state: Tensor | None = None,
        image_ids: Tensor | None = None,
        loss_ramp: float | None = None,
        scorer: Callable[[TokenFeatures, TokenFeatures], Tensor] | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
        image_pairs: bool = False,
    ) -> PicoOutput | tuple:
        """Scores all images against all texts; changes no state.

        For inputs see `encode_images` and `encode_texts`. `image_ids` (images,): pairs of one
        identity are no negatives. `loss_ramp` in [0, 1] scales the hinge loss over all negatives;
        None takes the hardest ones. `scorer` gives other scores than `score`. `return_loss`: the
        loss of at least two images and as many texts. `return_dict=False` returns a tuple.
        `image_pairs=True` takes images, and a partner of each after them in place of texts.
        """
        computed = (image_hidden_states, patch_mask, image_pooled_state)
        shape = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        grid = {**shape, "interpolate_pos_encoding": interpolate_pos_encoding}
        images = self.encode_images(pixel_values, *computed, **grid)
        if image_pairs:  # both halves in the columns of images
            images, texts = halves(images, input_ids, text_hidden_states)
            scorer = partial(same_side_similarity, column_weights=self.column_weights)
        else:
            given = (input_ids, attention_mask, word_mask, text_hidden_states, text_pooled_state)
            more = {"token_type_ids": token_type_ids, "position_ids": position_ids}
            texts = self.encode_texts(*given, **more)
        output = pair_output(self, images, texts, image_ids, loss_ramp, scorer, return_loss)
        return output if return_dict is not False else output.to_tuple()

    def calibrate(
        self,
        gallery: Iterable[Mapping[str, Tensor]] | None,
        reference: Iterable[Mapping[str, Tensor]] | None = None,
    ) -> None:
        """From now on takes the gallery's style, as its column statistics show it, out of images.

        Needs no captions. Nothing of it is saved.

        Args:
            gallery: Batches of the images to be scored, all of one style, as a collator gives them;
                None goes back to no calibration.
            reference: Likewise, of the training data; a thousand images are enough.

        Raises:
            ValueError: If there is no reference, or if either is empty.
        """
        self._calibration = calibration_of(self.encoder, gallery, reference)

    def freeze_towers(self) -> None:
        """Trains only what comes after the towers' hidden states: projections and logit scale.

        Frozen towers stay in eval mode. Of an adapted model only the adapter is trained.

        Raises:
            ValueError: If nothing comes after the hidden states, or if the towers are adapted.
        """
        freeze_towers(self.encoder)
        self._towers_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> PicoModel:
        """Sets the mode; towers that are frozen stay in eval mode."""
        super().train(mode)
        if self._towers_frozen:
            self.encoder.eval()
        keep_batch_statistics(self.encoder)
        return self
