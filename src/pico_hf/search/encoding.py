"""From images and queries to the vectors of an index: column weights go into the query alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pico_hf.core.compression import merge_tokens
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.images import as_rgb
from pico_hf.search.fingerprint import image_side_fingerprint
from pico_hf.search.queries import Queries
from pico_hf.search.shards import ImageVectors

logger = logging.getLogger(__name__)


class IndexEncoder:
    """Encodes images and queries in the encoder's own columns.

    With canonical columns s[p, w] = Σ_d w_d · (B'v)_d · t_d = v · B(w ∘ t) for the image basis B:
    weights and basis go into the query, so that stored tokens depend on neither. So it is with the
    pooled features, up to the length of an image's feature in weighted columns, see `Queries`.

    Args:
        retriever: A [`PicoRetriever`]; None: vectors are taken as they are.
        merging: See `merge_tokens`.
    """

    def __init__(self, retriever: Any, merging: int) -> None:
        self.retriever, self.merging = retriever, merging
        self._quiet = copy.copy(retriever)
        if retriever is not None:
            self._quiet.show_progress = False

    def required(self, purpose: str) -> Any:
        """The retriever; ValueError if there is none."""
        if self.retriever is None:
            raise ValueError(
                f"`retriever` is needed to {purpose}, and the index was opened without one. Open "
                "it with a PicoRetriever, or give TokenFeatures."
            )
        return self.retriever

    def fingerprint(self) -> dict[str, Any] | None:
        """Of the image side; None without a model."""
        return None if self.retriever is None else image_side_fingerprint(self._quiet)

    def width(self) -> int | None:
        """Columns of what is stored; None without a model."""
        return None if self.retriever is None else len(self.retriever.model.column_weights)

    def decode(self, content: Any) -> Image.Image:
        """An image in RGB."""
        return as_rgb(content, self.retriever.collate.background)

    def images(self, pictures: list[Image.Image]) -> list[ImageVectors]:
        """`vectors` of RGB images."""
        return self.vectors(self._quiet.encode_images(pictures))

    @torch.no_grad()
    def vectors(self, features: TokenFeatures) -> list[ImageVectors]:
        """What is stored of each image, in fp32."""
        if self.retriever is not None:
            features = self.retriever.model.prototypes.to_encoder_columns(features, "image")
        features = features.to("cpu")
        merged = merge_tokens(features, self.merging)
        tokens = [own[mask].float() for own, mask in zip(merged.features, merged.mask, strict=True)]
        pooled = features.pooled
        summaries = [None] * len(tokens) if pooled is None else list(pooled.float())
        parts = zip(features.mean(), tokens, summaries, strict=True)
        return [ImageVectors(*one) for one in parts]

    @torch.no_grad()
    def queries(self, queries: Any, width: int | None) -> Queries:
        """Texts, images or features with the column weights folded in.

        Args:
            queries: A list of texts, a list of images, or features in the model's columns.
            width: Columns of the index.

        Raises:
            ValueError: If there are none, of both kinds, of another width, or without the pooled
                vectors that are part of the model's score.
        """
        tokens = queries if isinstance(queries, TokenFeatures) else self._encoded(list(queries))
        if width is not None and tokens.features.shape[2] != width:
            raise ValueError(
                f"`queries` must be as wide as the index ({width} columns), got "
                f"{tokens.features.shape[2]}."
            )
        if self.retriever is None:
            return Queries(tokens.to("cpu"))
        model, weights = self.retriever.model, self.retriever.model.column_weights
        share = model.pooled_share
        tokens = tokens.to(model.device)
        folded = tokens.fold(weights)
        if not share:
            return Queries(model.prototypes.to_encoder_columns(folded, "image").to("cpu"))
        pooled = _folded_pooled(tokens.pooled, weights, share)
        folded = TokenFeatures(folded.features, folded.mask, pooled)
        stored = model.prototypes.to_encoder_columns(folded, "image").to("cpu")
        basis, root = model.prototypes.form.image_basis, weights.sqrt()
        metric = root.diag() if basis is None else basis * root
        return Queries(stored, share, metric.float().cpu())

    def _encoded(self, queries: list[Any]) -> TokenFeatures:
        self.required("encode queries")
        kinds = {isinstance(query, str) for query in queries}
        if len(kinds) != 1:
            given = "texts and images together" if kinds else "none"
            raise ValueError(f"`queries` must be texts or images, got {given}.")
        if not kinds.pop():
            return self._quiet.encode_images(queries)
        longest = self._quiet.collate.max_length
        for number, words in enumerate(len(text.split()) for text in queries):
            if words > longest:
                logger.warning(
                    "`queries`[%d] has %d words: what is beyond %d tokens is not read.",
                    number,
                    words,
                    longest,
                )
        return self._quiet.encode_texts(queries)


def _folded_pooled(pooled: Tensor | None, weights: Tensor, share: float) -> Tensor:
    """Of pooled vectors b (queries, D): w ∘ b / ‖√w ∘ b‖, in fp32."""
    if pooled is None:
        raise ValueError(
            f"`queries` must have pooled vectors, which are {share:.3g} of the model's score, got "
            "tokens alone. Encode them with `PicoRetriever.encode_texts` or `encode_images`."
        )
    root = weights.to(pooled.device).sqrt()
    return torch.nn.functional.normalize(pooled.float() * root, dim=-1) * root


def check_features(
    features: TokenFeatures, keys: list[str], payloads: Sequence[Any] | None, width: int | None
) -> None:
    """Raises ValueError for vectors that cannot be stored under these ids."""
    for name, values in (("ids", keys), ("payloads", payloads)):
        if values is not None and len(values) != len(features):
            raise ValueError(
                f"`{name}` must have one entry for each of {len(features)} images, got "
                f"{len(values)}."
            )
    if len(set(keys)) < len(keys):
        raise ValueError("`ids` must all be different.")
    if not features.mask.any(dim=1).all():
        raise ValueError("`features` must have at least one real token for every image.")
    pooled = features.features[:0] if features.pooled is None else features.pooled
    if not all(torch.isfinite(one).all() for one in (features.features[features.mask], pooled)):
        raise ValueError("`features` contain NaN or infinity. Check the encoder.")
    if width is not None and features.features.shape[2] != width:
        raise ValueError(
            f"`features` must be as wide as the index ({width} columns), got "
            f"{features.features.shape[2]}."
        )
