"""`transformers.pipeline` over a PicoModel: images → labels, images → patch features.

Hand a class of this module to `pipeline(…, pipeline_class=…)`. The stock zero-shot pipeline reads
padding and activation off the model type's name, which for a wrapped SigLIP is "pico"; replacing
the stock task for everybody would be no business of an import.
"""

from __future__ import annotations

import base64
from typing import Any

from huggingface_hub import get_session
from torch import Tensor, nn
from transformers import BatchEncoding, BatchFeature
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.pipelines.zero_shot_image_classification import (
    ZeroShotImageClassificationPipeline,
)

from pico_hf.configuration_pico import PicoConfig
from pico_hf.data.collator import PicoCollator
from pico_hf.data.image_files import is_base64, largest_file
from pico_hf.data.images import as_rgb
from pico_hf.encoders.table import encoder_spec
from pico_hf.modeling_pico import PicoModel


class PicoZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    """Scores every image with every candidate label by a [`PicoModel`].

    Called like the stock pipeline: `classify(images, candidate_labels=[…])`, with an optional
    `hypothesis_template`. Texts are padded and words are masked as in training. Scores are the
    softmax of `logits_per_image` over the labels, or the sigmoid of each if encoder or training
    loss treats every pair as a question of its own (SigLIP).

    Raises:
        ValueError: If the model is no PicoModel, or if there are no candidate labels.
    """

    def check_model_type(self, supported_models: Any) -> None:
        """Checks for a PicoModel, which the stock pipeline does not know."""
        _require_pico(self.model)

    def preprocess(
        self,
        image: Any,
        candidate_labels: list[str] | None = None,
        hypothesis_template: str = "This is a photo of {}.",
        timeout: float | None = None,
        tokenizer_kwargs: None = None,
    ) -> BatchFeature:
        """One image and all labels as the model takes them."""
        if isinstance(candidate_labels, str) or not candidate_labels:
            raise ValueError(
                "`candidate_labels` must be a list of at least one label, got "
                f"{candidate_labels!r}. Give one label as a list of one."
            )
        collate = PicoCollator(self, config=self.model.config)  # has tokenizer, image processor
        inputs = BatchFeature(collate([{"image": fetched_image(image, timeout)}]))
        inputs = inputs.to(self.dtype)
        texts = [{"caption": hypothesis_template.format(label)} for label in candidate_labels]
        inputs["text_inputs"] = [BatchEncoding(collate(texts))]
        inputs["candidate_labels"] = candidate_labels
        return inputs

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Labels with their scores, best first."""
        logits = model_outputs["logits"][0]
        scores = logits.sigmoid() if scores_pairs_alone(self.model) else logits.softmax(dim=-1)
        pairs = zip(scores.tolist(), model_outputs["candidate_labels"], strict=True)
        answer = [{"score": score, "label": label} for score, label in pairs]
        return sorted(answer, key=lambda row: -row["score"])


class PicoImageFeatureExtractionPipeline(ImageFeatureExtractionPipeline):
    """An image's features in the common space of a [`PicoModel`].

    Returns for every image a nested list, or with `return_tensors=True` a tensor:
    (1, patches, D) unit-length features of its real patches, which is what `PicoModel.score`
    compares; with `pool=True` (1, D), their mean of unit length, for a first search among many
    images whose best are then scored by their patches.

    Raises:
        ValueError: If the model is no PicoModel.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _require_pico(self.model)

    def preprocess(
        self, image: Any, timeout: float | None = None, **processor_knobs: Any
    ) -> BatchFeature:
        """One image as the model takes it, read as in training."""
        image = as_rgb(fetched_image(image, timeout))
        inputs = self.image_processor(image, return_tensors="pt", **processor_knobs)
        return inputs.to(self.dtype)

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        images = self.model.encode_images(**model_inputs)
        return {"features": images.features, "mask": images.mask}

    def postprocess(
        self, model_outputs: dict[str, Tensor], pool: bool | None = None, return_tensors=False
    ) -> Tensor | list:
        """The real patches, or their mean."""
        patches = model_outputs["features"][0][model_outputs["mask"][0]]
        if pool:
            patches = nn.functional.normalize(patches.mean(dim=0), dim=0)
        patches = patches.unsqueeze(0)  # as the stock pipeline: a batch of one
        return patches if return_tensors else patches.tolist()


def scores_pairs_alone(model: PicoModel) -> bool:
    """True if an image's logits are read one by one (sigmoid), not against each other."""
    return model.config.loss == "sigmoid" or encoder_spec(model.encoder).logit_bias is not None


def fetched_image(image: Any, timeout: float | None) -> Any:
    """An image as the collator reads it; addresses are fetched and base64 texts decoded.

    The stock pipelines convert to RGB as they load, which loses transparency and 16-bit depth.

    Raises:
        ValueError: If a text is no base64, or an address sends more than a file may have.
    """
    if not isinstance(image, str):
        return image
    if image.startswith(("http://", "https://")):
        return _download(image, timeout)
    if not is_base64(image):
        return image
    try:
        return base64.b64decode(image.split(",")[-1])
    except ValueError as error:
        raise ValueError(f"`image` is a text that is no base64 ({error}).") from error


def _download(address: str, timeout: float | None) -> bytes:
    """The body of an answer, of at most as many bytes as a file may have."""
    content, most = bytearray(), largest_file()
    with get_session().stream("GET", address, timeout=timeout, follow_redirects=True) as answer:
        answer.raise_for_status()
        for part in answer.iter_bytes():
            content += part
            if len(content) > most:
                raise ValueError(f"`image` is an address that sends more than {most} bytes.")
    return bytes(content)


def _require_pico(model: Any) -> None:
    if model.config.model_type != PicoConfig.model_type:
        raise ValueError(
            f"`model` must be a PicoModel, got {type(model).__name__}. Wrap it with "
            "`PicoModel.from_encoder`, or leave out `pipeline_class`."
        )
