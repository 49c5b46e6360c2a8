"""Recall@k both ways and rSum for 🤗 Evaluate; load it by `pico_hf.retrieval_metric_path()`.

Evaluate copies this file alone into its own cache and finds what it needs by a regular expression:
one import per line, and absolute ones.
"""

import datasets
import evaluate
import torch

from pico_hf.core.metrics import retrieval_metrics
from pico_hf.data.identity import identity_codes

_DESCRIPTION = """Image-text retrieval: Recall@1/5/10 and median rank from images to texts and from
texts to images, and rSum, the sum of the six recalls. Images may have several captions each; ties
count against the query."""

_INPUTS = """
Args:
    predictions: One row per caption: its scores with every image, as `logits_per_text` has them
        (fp32), or, with `image_embeddings`, its embedding.
    references: Row of the image that each caption belongs to, counted from 0; every image has at
        least one caption.
    image_embeddings: (images, width) one per image, all of them, given to `compute` only: the
        scores are then the cosines with the captions' embeddings.
    image_ids: (images,) identity of each image, given to `compute` only: names or numbers, each
        missing one (None, NaN or empty) its own. Images of one identity share their captions and
        do not compete.

Returns:
    `i2t_r1` … `t2i_r10` in percent, `i2t_median_rank`, `t2i_median_rank` from 1, and `rsum` in
    [0, 600].
"""


class ImageTextRetrieval(evaluate.Metric):
    """One example per caption, so that batches of any size may be added one after another."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float32"))
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": row, "references": datasets.Value("int64")}),
            reference_urls=["https://arxiv.org/abs/2510.11175"],
        )
        # As lists, every score would be a Python object: 4 GB for 5000 images and 25000 captions.
        info.format = "numpy"  # refused as an argument, because rows are no single values
        return info

    def _compute(
        self, predictions, references, image_embeddings=None, image_ids=None
    ) -> dict[str, float]:
        widths = {len(row) for row in predictions}
        if len(widths) != 1:
            raise ValueError(
                "`predictions` must hold rows of one length, the scores with all images, got rows "
                f"of {', '.join(map(str, sorted(widths))) or 'nothing'}. Score every caption "
                "against all images before adding it, not against those of its batch."
            )
        rows = torch.as_tensor(predictions)
        if image_embeddings is not None:
            rows = _cosines(rows, torch.as_tensor(image_embeddings))
        if image_ids is not None:
            image_ids = identity_codes(_as_list(image_ids))
        return retrieval_metrics(rows.t(), torch.as_tensor(references), image_ids)


def _as_list(values) -> list:
    """Python values of a list, an array or a tensor."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _cosines(texts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(texts, images) cosine of every caption and every image."""
    if images.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"`image_embeddings` must be (images, {texts.shape[1]}) like the captions' embeddings "
            f"in `predictions`, got {tuple(images.shape)}."
        )
    unit = torch.nn.functional.normalize
    return unit(texts.float(), dim=-1) @ unit(images.detach().cpu().float(), dim=-1).t()
