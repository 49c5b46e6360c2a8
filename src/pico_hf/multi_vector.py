"""A [`PicoModel`] as a `MultiVectorEncoder` of sentence-transformers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AutoProcessor

from pico_hf.data.collator import PicoCollator
from pico_hf.model_and_processor import model_and_processor
from pico_hf.modeling_pico import PicoModel
from pico_hf.pipelines import fetched_image
from pico_hf.training.encoding import encode_batch

try:
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modality import infer_batch_modality
    from sentence_transformers.base.modules import InputModule
    from sentence_transformers.util.similarity import mean_maxsim
except ImportError as error:
    raise ImportError(
        "This needs sentence-transformers 6.2 or newer: "
        '`pip install "pico-hf[sentence-transformers]"`.'
    ) from error

logger = logging.getLogger(__name__)


class PicoInputModule(InputModule):
    """Images or texts to token embeddings; the first and only module of a `MultiVectorEncoder`.

    What is encoded as a query is multiplied by the column weights, so that the products of
    queries and documents are s[p, w], whichever side the images are.

    Args:
        model: The model.
        processor: What `AutoProcessor` gives: a tokenizer and an image processor.
    """

    forward_kwargs = {"task"}  # noqa: RUF012 (the parent declares its type)
    modalities = ["text", "image"]  # noqa: RUF012

    def __init__(self, model: PicoModel, processor: Any) -> None:
        super().__init__()
        if model.pooled_share > 0:
            logger.warning(
                "The model's own score is to %.0f %% the cosine of pooled features, which token "
                "embeddings do not have: these compare tokens alone, and ranks may differ.",
                100 * model.pooled_share,
            )
        self.collate = PicoCollator(processor, config=model.config)
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens; longer ones are cut."""
        return self.collate.max_length

    def get_embedding_dimension(self) -> int:
        """D, the number of columns."""
        return self.model.column_weights.numel()

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """A batch of images or of texts as the model takes it.

        Args:
            inputs: Texts, `{"text": …}`, images (PIL, arrays, paths, addresses), or
                `{"image": …}`; texts are not mixed with images.
            prompt: What texts begin with.

        Raises:
            ValueError: If they are something else, or images mixed with texts.
        """
        kind = infer_batch_modality(inputs, supported_modalities=self.modalities)
        values = [
            item[kind] if isinstance(item, dict) and kind in item else item for item in inputs
        ]
        if kind == "image":
            images = [fetched_image(image, None) for image in values]
            return self.collate([{"image": image} for image in images])
        odd = next((text for text in values if not isinstance(text, str)), None)
        if odd is not None:
            raise ValueError(
                f"`inputs` must be texts or images, all of one kind, got {type(odd).__name__} "
                f"among them ({kind}). Encode images and texts in calls of their own; pairs have "
                "no embedding."
            )
        return self.collate([{"caption": (prompt or "") + text} for text in values])

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        """Adds `token_embeddings` (n, tokens, D) and the mask of real tokens (n, tokens).

        Args:
            features: From `preprocess`.
            task: `"query"` multiplies by the column weights.
        """
        images, texts = encode_batch(self.model, features)
        tokens = texts if images is None else images
        assert tokens is not None  # as `preprocess` made them
        if task == "query":
            tokens = tokens.fold(self.model.column_weights)
        return {**features, "token_embeddings": tokens.features, "attention_mask": tokens.mask}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Writes model and processor: a folder that `PicoModel.from_pretrained` reads, too."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> PicoInputModule:
        """Reads model and processor; see `InputModule.load`.

        Raises:
            ValueError: If the module is not the first one of the repository.
        """
        if subfolder:
            raise ValueError(
                f"`subfolder` must be empty: a Pico model is the first module of a repository, got "
                f"{subfolder!r}."
            )
        hub = {
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        hub = {name: value for name, value in hub.items() if value}
        model = PicoModel.from_pretrained(model_name_or_path, **hub, **(model_kwargs or {}))
        processor_options = {**hub, **(processor_kwargs or {})}
        processor = AutoProcessor.from_pretrained(model_name_or_path, **processor_options)
        return cls(model.eval(), processor)


def multi_vector_encoder(
    model: PicoModel | str | os.PathLike, processor: Any = None
) -> MultiVectorEncoder:
    """Wraps a model for sentence-transformers; scores are mean over query tokens of max.

    Args:
        model: A model, which is shared and not copied; or a folder or Hub repository of one, or of
            any supported dual encoder.
        processor: What `AutoProcessor` gives; None takes that of the path.

    Returns:
        A `MultiVectorEncoder` on the device of the model.

    Raises:
        ValueError: If there is a model and no processor.

    Example:
        >>> encoder = multi_vector_encoder("openai/clip-vit-base-patch32")  # doctest: +SKIP
        >>> queries = encoder.encode_query(["a cat on a sofa"])  # doctest: +SKIP
        >>> documents = encoder.encode_document(["cat.jpg", "street.jpg"])  # doctest: +SKIP
        >>> scores = both_directions(queries, documents)  # doctest: +SKIP
    """
    model, processor = model_and_processor(model, processor)
    module = PicoInputModule(model, processor)
    return MultiVectorEncoder(
        modules=[module], similarity_fn_name="meanmaxsim", device=str(model.device)
    )


def both_directions(queries: Any, documents: Any, **options: Any) -> Tensor:
    """S of every query and document, as `PicoModel.score` has it.

    `MultiVectorEncoder.similarity` is one half of it: the mean over query tokens of their best
    document token. Evaluators take this function as one of their `score_functions`.

    Args:
        queries: From `encode_query`: the side that carries the column weights.
        documents: From `encode_document`.
        options: Of `sentence_transformers.util.similarity.mean_maxsim`, such as `chunk_elements`.

    Returns:
        (queries, documents) float32.
    """
    there = mean_maxsim(queries, documents, **options)
    return there + mean_maxsim(documents, queries, **options).T.to(there.device)
