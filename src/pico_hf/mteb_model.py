"""A [`PicoModel`] in mteb: retrieval by the whole score, other tasks by one vector per input."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from pico_hf.core.modes import evaluation_mode
from pico_hf.core.packed_tokens import PackedTokens
from pico_hf.core.token_features import TokenFeatures
from pico_hf.data.collator import PicoCollator
from pico_hf.data.progress import progress_bar
from pico_hf.model_and_processor import model_and_processor
from pico_hf.modeling_pico import PicoModel
from pico_hf.training.encoding import encode_batch
from pico_hf.training.evaluation import packed_scores

try:
    from mteb._create_dataloaders import create_dataloader
    from mteb.models import ModelMeta
    from mteb.types import PromptType
except ImportError as error:
    raise ImportError('This needs mteb 2.26 or newer: `pip install "pico-hf[mteb]"`.') from error

_SCORES_AT_A_TIME = 2**26


class PicoMteb:
    """Has mteb's `SearchProtocol` and its `EncoderProtocol`; `mteb.evaluate` takes it as a model.

    Retrieval and reranking tasks rank by S of `PicoModel.score`, in both directions and with the
    column weights. All other tasks compare one vector per input: the mean of its tokens, each
    column times √w_d, of unit length. The dot product of two of them is the weighted one up to
    their lengths.

    Args:
        model: A model, which stays as it is; or a folder or Hub repository of one, or of any
            supported dual encoder.
        processor: What `AutoProcessor` gives; None takes that of the path.
        name: `owner/name` under which mteb keeps results.
        revision: Version under which mteb keeps results.

    Raises:
        ValueError: If there is a model and no processor.
    """

    def __init__(
        self,
        model: PicoModel | str | os.PathLike,
        processor: Any = None,
        *,
        name: str = "pico-hf/pico",
        revision: str | None = None,
    ) -> None:
        model, processor = model_and_processor(model, processor)
        self.model, self.collate = model, PicoCollator(processor, config=model.config)
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                "modalities": ["text", "image"],
                "embed_dim": model.column_weights.numel(),
                "n_parameters": sum(part.numel() for part in model.parameters()),
                "max_tokens": self.collate.max_length,
                "similarity_fn_name": "dot",
                "framework": ["PyTorch"],
            }
        )
        self._corpus: tuple[Sequence[str], PackedTokens] | None = None

    # ---- one vector per input ------------------------------------------------------------------

    def encode(self, inputs: Any, **options: Any) -> Tensor:
        """Embeds every input of a data loader.

        Args:
            inputs: Batches with `text` or `image`.
            options: What mteb says of the task; `show_progress_bar` is used.

        Returns:
            (inputs, D) float32 of unit length, on the CPU.
        """
        root = self.model.column_weights.sqrt()
        vectors = []
        for tokens in self._tokens(inputs, options):
            vectors.append(nn.functional.normalize(tokens.fold(root).mean(), dim=-1).cpu())
        return torch.cat(vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Dot products of all pairs, (first, second)."""
        first, second = _rows(embeddings1), _rows(embeddings2)
        return first @ second.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Dot products of first with first, second with second, and so on."""
        return (_rows(embeddings1) * _rows(embeddings2)).sum(dim=-1)

    # ---- the whole score -----------------------------------------------------------------------

    def index(
        self,
        corpus: Any,
        *,
        task_metadata: Any,
        encode_kwargs: dict[str, Any],
        num_proc: int | None = None,
        **options: Any,
    ) -> None:
        """Encodes a corpus and keeps its tokens; more than a third of the free memory go to disk.

        Args:
            corpus: Data set with `id`, and `text` or `image`.
            task_metadata: Of the task.
            encode_kwargs: `batch_size` and `show_progress_bar` are used.
            num_proc: Processes that load the data.
            options: What else mteb says.
        """
        loader = _loader(corpus, task_metadata, PromptType.document, encode_kwargs, num_proc)
        self._corpus = list(corpus["id"]), self._packed(loader, encode_kwargs)

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        encode_kwargs: dict[str, Any],
        top_ranked: dict[str, list[str]] | None = None,
        num_proc: int | None = None,
        **options: Any,
    ) -> dict[str, dict[str, float]]:
        """Ranks the corpus, or the documents named for each query, by S.

        Args:
            queries: Data set with `id`, and `text` or `image`.
            task_metadata: Of the task.
            top_k: Best documents that are returned per query.
            encode_kwargs: See `index`.
            top_ranked: Query → documents to rank; None ranks all. Queries that it does not name
                get no documents.
            num_proc: See `index`.
            options: What else mteb says.

        Returns:
            Query → document → S.

        Raises:
            RuntimeError: If no corpus was indexed.
        """
        if self._corpus is None:
            raise RuntimeError("`search` needs a corpus. Call `index` first.")
        names, corpus = self._corpus
        loader = _loader(queries, task_metadata, PromptType.query, encode_kwargs, num_proc)
        words, ids = self._packed(loader, encode_kwargs), list(queries["id"])
        if top_ranked is None:
            every, size = torch.arange(len(names)), max(1, _SCORES_AT_A_TIME // len(names))
            groups = [(part, every) for _, items in words.blocks() for part in items.split(size)]
        else:
            row = {name: number for number, name in enumerate(names)}
            groups = [
                (torch.tensor([n]), torch.tensor([row[name] for name in top_ranked[query]]))
                for n, query in enumerate(ids)
                if top_ranked.get(query)
            ]
        found: dict[str, dict[str, float]] = {query: {} for query in ids}
        for items, documents in groups:
            with torch.no_grad():
                scores = packed_scores(self.model, corpus, words, documents, items).T
            best = scores.topk(min(top_k, len(documents)))
            for n, values, places in zip(items.tolist(), *map(Tensor.tolist, best), strict=True):
                chosen = (names[documents[place]] for place in places)
                found[ids[n]] = dict(zip(chosen, values, strict=True))
        return found

    def _packed(self, loader: Any, options: dict[str, Any]) -> PackedTokens:
        tokens = (batch.to("cpu") for batch in self._tokens(loader, options))
        return PackedTokens.collect(tokens, psutil.virtual_memory().available / 3)

    @torch.no_grad()
    def _tokens(
        self, batches: Iterable[dict[str, Any]], options: dict[str, Any]
    ) -> Iterator[TokenFeatures]:
        silent = not options.get("show_progress_bar", True)
        with evaluation_mode(self.model):
            for batch in progress_bar(batches, "Encoding", hidden=silent):
                yield self._encoded(batch)

    def _encoded(self, batch: dict[str, Any]) -> TokenFeatures:
        kinds = sorted({"text", "image"} & batch.keys())
        if len(kinds) != 1:
            raise ValueError(
                "`inputs` must hold texts or images, and not both in one input, got "
                f"{', '.join(batch)}. A Pico model has no embedding of pairs."
            )
        column = "image" if kinds == ["image"] else "caption"
        inputs = self.collate([{column: value} for value in batch[kinds[0]]])
        images, texts = encode_batch(self.model, inputs)
        return texts if images is None else images


def _loader(
    rows: Any, task_metadata: Any, side: PromptType, options: dict[str, Any], workers: int | None
) -> Any:
    """Batches of one side of a retrieval task, with what mteb does to its columns."""
    return create_dataloader(
        rows,
        task_metadata=task_metadata,
        prompt_type=side,
        batch_size=options.get("batch_size", 32),
        num_proc=workers,
    )


def _rows(embeddings: Any) -> Tensor:
    rows = torch.as_tensor(embeddings)
    return rows.unsqueeze(0) if rows.ndim == 1 else rows
