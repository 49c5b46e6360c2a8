"""The encoder table: how each architecture yields token features, one row of data each."""

from __future__ import annotations

from collections.abc import Sequence

import transformers
from transformers import AutoModel, PreTrainedModel

from pico_hf.encoders import one_sided
from pico_hf.encoders.spec import EncoderSpec, Step, TokenMap

_VISUAL, _TEXTUAL = Step("visual_projection"), Step("text_projection")
_CLS_PROJECTED = TokenMap((_VISUAL,), prefix=1)
_CLS_NORMED = TokenMap((Step("vision_model.post_layernorm"), _VISUAL), prefix=1)
_HEAD = Step("vision_model.head", pools=True)
_TEXT = TokenMap((_TEXTUAL,), prefix=1, suffix=1)  # pooled at EOS or CLS
_POOLER_TEXT = TokenMap((Step("text_model.pooler", pools=True), _TEXTUAL), prefix=1, suffix=1)
_SIGLIP_TEXT = TokenMap((Step("text_model.head"),), suffix=1, pad_is_special=True)
PAIR = "vision-text-dual-encoder"
_SHARED = "its towers end in one space: nothing is left to train behind frozen towers"


def _clip(label: str) -> EncoderSpec:
    return EncoderSpec(_CLS_NORMED, _TEXT, label=label)


def _pair(label: str, image: TokenMap, note: str = "") -> EncoderSpec:
    return EncoderSpec(image, _POOLER_TEXT, joined=True, label=f"{label} + a text tower", note=note)


_SIGLIP2_IMAGE = TokenMap(
    (_HEAD,),
    pooled_by="attention",
    real_patches="pixel_attention_mask",
    dummy=one_sided.naflex_dummy_images,
)
_BLIP = EncoderSpec(_CLS_NORMED, _POOLER_TEXT, label="BLIP")
_BLIP_ITM = EncoderSpec(
    TokenMap((Step("vision_proj"),), prefix=1, features=one_sided.blip_itm_image_features),
    TokenMap(
        (Step("text_proj"),),
        prefix=1,
        suffix=1,
        features=one_sided.blip_itm_text_features,
    ),
    logit_scale=None,
    label="BLIP for retrieval",
    note="the contrastive half; its matching head is not used",
)
_BLIP2 = EncoderSpec(
    TokenMap(
        (Step("vision_projection"),),
        pooled_by="every",
        features=one_sided.blip2_image_features,
        grid=False,
    ),
    TokenMap(
        (_TEXTUAL,),
        prefix=1,
        suffix=1,
        config="qformer_config",
        features=one_sided.blip2_text_features,
    ),
    logit_scale=None,
    label="BLIP-2 for retrieval",
    note="the Q-Former's queries stand for patches; its matching head is not used",
)
_ALIGN = EncoderSpec(
    TokenMap((), pooled_by="mean", grid=True),
    _TEXT,
    logit_scale=None,
    temperature="temperature",
    label="ALIGN",
    note="cells of the last convolution's map stand for patches",
)
_FLAVA = EncoderSpec(
    TokenMap((Step("image_projection"),), pooled_by="every", prefix=1, config="image_config"),
    TokenMap((_TEXTUAL,), pooled_by="every", prefix=1, suffix=1),
    label="FLAVA",
)
_GROUPVIT = EncoderSpec(
    TokenMap((Step("visual_projection", flat=True),), pooled_by="mean_first", grid=False),
    TokenMap((Step("text_projection", flat=True),), prefix=1, suffix=1),
    label="GroupViT",
    note="image groups stand for patches; they are averaged before the projection's ReLU, so "
    "projected groups do not average to the pooled feature",
)
_TIPSV2 = EncoderSpec(
    TokenMap((), prefix=1, registers="num_register_tokens"),
    TokenMap((), pooled_by="mean"),
    logit_scale=None,
    temperature="temperature",
    label="TIPS v2",
    note=_SHARED,
)
_BEIT_IMAGE = TokenMap(
    (Step("vision_model.pooler.layernorm"), _VISUAL), pooled_by="mean_first", prefix=1
)

ENCODERS: dict[str, EncoderSpec] = {
    "clip": _clip("CLIP"),
    "metaclip_2": _clip("MetaCLIP 2"),
    "clipseg": _clip("CLIPSeg"),
    "owlvit": _clip("OWL-ViT"),
    "owlv2": _clip("OWLv2"),
    "altclip": _clip("AltCLIP"),
    "chinese_clip": _clip("Chinese-CLIP"),
    "siglip": EncoderSpec(
        TokenMap((_HEAD,), pooled_by="attention"),
        _SIGLIP_TEXT,
        logit_bias="logit_bias",
        label="SigLIP, and SigLIP 2 of fixed size",
    ),
    "siglip2": EncoderSpec(
        _SIGLIP2_IMAGE,
        _SIGLIP_TEXT,
        logit_bias="logit_bias",
        label="SigLIP 2 NaFlex",
        note="padded patches are masked out",
    ),
    "aimv2": EncoderSpec(
        TokenMap((_HEAD, _VISUAL), pooled_by="attention"),
        TokenMap((_TEXTUAL,), prefix=1, suffix=1, features=one_sided.causal_text_features),
        label="AIMv2 LiT",
        note="its text tower is causal",
    ),
    "blip": _BLIP,
    "blip/BlipForImageTextRetrieval": _BLIP_ITM,
    "blip-2/Blip2ForImageTextRetrieval": _BLIP2,
    "align": _ALIGN,
    "flava": _FLAVA,
    "groupvit": _GROUPVIT,
    "tipsv2": _TIPSV2,
    f"{PAIR}/vit": _pair(
        "ViT", TokenMap((Step("vision_model.pooler", pools=True), _VISUAL), prefix=1)
    ),
    f"{PAIR}/deit": _pair(
        "DeiT", TokenMap((Step("vision_model.pooler", pools=True), _VISUAL), prefix=2)
    ),
    f"{PAIR}/swin": _pair("Swin", TokenMap((_VISUAL,), pooled_by="mean")),
    f"{PAIR}/swinv2": _pair("Swin v2", TokenMap((_VISUAL,), pooled_by="mean")),
    f"{PAIR}/dinov2": _pair("DINOv2", _CLS_PROJECTED),
    f"{PAIR}/dinov2_with_registers": _pair(
        "DINOv2 with registers", TokenMap((_VISUAL,), prefix=1, registers="num_register_tokens")
    ),
    f"{PAIR}/dinov3_vit": _pair(
        "DINOv3 ViT", TokenMap((_VISUAL,), prefix=1, registers="num_register_tokens")
    ),
    f"{PAIR}/beit": _pair(
        "BEiT",
        _BEIT_IMAGE,
        note="patches are averaged before a LayerNorm, so projected patches do not average to the "
        "pooled feature",
    ),
    f"{PAIR}/clip_vision_model": _pair("CLIP's ViT", _CLS_NORMED),
}

# Learned projections of an architecture without a row: a submodule of the encoder, so that all that
# saves, freezes or adapts parameters finds them like any other.
FALLBACK = "pico_projection"
_FALLBACK_SPEC = EncoderSpec(
    # There may be a CLS among the tokens.
    TokenMap((Step(f"{FALLBACK}.image"),), pooled_by="mean", grid=False),
    TokenMap((Step(f"{FALLBACK}.text"),), pooled_by="mean"),
    logit_scale=None,
)


def register_encoder(model_type: str, spec: EncoderSpec) -> None:
    """Adds an architecture, or replaces one.

    Args:
        model_type: `config.model_type`; for a VisionTextDualEncoder with `/` and the vision
            config's `model_type`; for one class of several with `/` and its name.
        spec: Its row.
    """
    ENCODERS[model_type] = spec


def architecture(encoder: PreTrainedModel) -> str:
    """The encoder's key in the table, whether or not there is such a row."""
    model_type = encoder.config.model_type
    if model_type == PAIR:
        return f"{model_type}/{encoder.config.vision_config.model_type}"
    special = f"{model_type}/{type(encoder).__name__}"
    return special if special in ENCODERS else model_type


def table_row(encoder: PreTrainedModel) -> EncoderSpec:
    """The row of an encoder's architecture.

    Raises:
        ValueError: If it has none; names the architectures that have.
    """
    key = architecture(encoder)
    if key not in ENCODERS:
        raise ValueError(
            f"`encoder` must be a vision-text dual encoder with token features, got model_type "
            f"{key!r}. Supported: {', '.join(sorted(ENCODERS))}. Describe another one with "
            "`pico_hf.register_encoder`, or learn projections from scratch with "
            "`fallback_projection=True`."
        )
    return ENCODERS[key]


def encoder_spec(encoder: PreTrainedModel) -> EncoderSpec:
    """Finds the row of an encoder: the table's, or that of learned projections.

    Raises:
        ValueError: If there is none; names the architectures that have one.
    """
    return _FALLBACK_SPEC if hasattr(encoder, FALLBACK) else table_row(encoder)


def encoder_class(model_type: str, architectures: Sequence[str] | None) -> type:
    """The class to build or load an encoder with.

    Some model types have a dual encoder that `AutoModel` does not know (BLIP's and BLIP-2's for
    retrieval): `AutoModel` would build another model, with random weights where the two differ.

    Args:
        model_type: `config.model_type`.
        architectures: `config.architectures`: class names of the saved model.

    Returns:
        The named class if the table has a row for it, else `AutoModel`.
    """
    for name in architectures or ():
        if f"{model_type}/{name}" in ENCODERS:
            return getattr(transformers, name)
    return AutoModel
