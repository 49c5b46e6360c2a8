"""One shard of an index: the tokens of some images, memory-mapped, and a record of each image."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pico_hf.core.quantisation import dequantise, quantise
from pico_hf.search.checks import DTYPES, RECORDS, TENSORS, check_records, check_tensors
from pico_hf.search.files import bytes_digest, file_digest, write_file

SHARD_BYTES = 2**28  # tokens that compacting puts into one shard
# What records and tensors of odd kinds make of code that expects those of an index.
_ODD = (ValueError, TypeError, KeyError, IndexError, RecursionError, RuntimeError)


class DamagedShardError(ValueError):
    """A shard that is not what was written."""


@dataclass(frozen=True)
class ImageVectors:
    """What an index keeps of an encoded image, in fp32 and the encoder's own columns.

    Attributes:
        mean: (D,) mean of all tokens, by which the first stage ranks.
        tokens: (tokens, D), after merging.
        summary: (D,) the encoder's pooled feature, of unit length; None: it is not known.
    """

    mean: Tensor
    tokens: Tensor
    summary: Tensor | None = None

    def digest(self) -> str:
        """Of tokens and summary."""
        given = [self.tokens] if self.summary is None else [self.tokens, self.summary]
        return bytes_digest(b"".join(tensor.numpy().tobytes() for tensor in given))


@dataclass(frozen=True)
class StoredImage:
    """One image as an index keeps it.

    Attributes:
        record: `id`, `digest` (of the image's content), `paths` and `payload`.
        pooled: (D,) fp32, mean of the tokens.
        tokens: (tokens, D) in the storage dtype.
        scales: (tokens,) fp32 value of one level; ones unless stored in 8 bits.
        summary: (D,) fp32, see `ImageVectors`.
    """

    record: dict[str, Any]
    pooled: Tensor
    tokens: Tensor
    scales: Tensor
    summary: Tensor | None = None

    @classmethod
    def of(cls, record: dict[str, Any], vectors: ImageVectors, dtype: str) -> StoredImage:
        """From the vectors of an image."""
        ones = torch.ones(len(vectors.tokens))
        plain = cls(record, vectors.mean, vectors.tokens, ones, vectors.summary)
        return plain.stored_as(dtype)

    def stored_as(self, dtype: str) -> StoredImage:
        """From tokens in fp32 to those of a storage dtype."""
        if dtype == "int8":
            tokens, scales = quantise(self.tokens)
            return replace(self, tokens=tokens, scales=scales)
        return replace(self, tokens=self.tokens.to(DTYPES[dtype]))

    def in_fp32(self) -> Tensor:
        """(tokens, D) as they are scored."""
        if self.tokens.dtype == torch.int8:
            return dequantise(self.tokens, self.scales)
        return self.tokens.float()


@dataclass(frozen=True)
class Shard:
    """Some images of an index.

    Attributes:
        records: Of each image.
        pooled: (images, D) fp32.
        tokens: (all tokens, D) in the storage dtype.
        scales: (all tokens,) fp32.
        lengths: (images,) tokens of each image.
        summary: (images, D) fp32, see `ImageVectors`; zeros where it is not known.
        has_summary: (images,) bool.
    """

    records: list[dict[str, Any]]
    pooled: Tensor
    tokens: Tensor
    scales: Tensor
    lengths: Tensor
    summary: Tensor
    has_summary: Tensor

    @classmethod
    def of(cls, images: Sequence[StoredImage]) -> Shard:
        """Images in memory as one shard."""
        known = _summaries(images)
        return cls([image.record for image in images], **_with_summary(_tensors(images) | known))

    def image(self, row: int, record: dict[str, Any] | None = None) -> StoredImage:
        """One image as it is stored, with another record if one is given."""
        end = int(self.lengths[: row + 1].sum())
        own = slice(end - int(self.lengths[row]), end)
        record = self.records[row] if record is None else record
        summary = self.summary[row] if self.has_summary[row] else None
        return StoredImage(record, self.pooled[row], self.tokens[own], self.scales[own], summary)


def write_shard(folder: Path, name: str, images: Sequence[StoredImage]) -> dict[str, Any]:
    """Writes the two files of a shard; they count once the manifest names them.

    Returns:
        What the manifest says of it: `name`, `images`, `deleted`, and digests of both files.
    """
    tensors = _tensors(images) | _summaries(images)
    lines = [json.dumps(image.record, ensure_ascii=False, allow_nan=False) for image in images]
    contents = {TENSORS: save(tensors), RECORDS: ("\n".join(lines) + "\n").encode()}
    for suffix, content in contents.items():
        write_file(folder / f"{name}{suffix}", content)
    digests = {suffix: bytes_digest(content) for suffix, content in contents.items()}
    return {"name": name, "images": len(images), "deleted": [], "digests": digests}


def read_shard(folder: Path, facts: dict[str, Any], *, verify: bool) -> Shard:
    """Maps a shard into memory.

    Args:
        folder: Of the shards.
        facts: What the manifest says of it.
        verify: True reads every byte once and compares it with what was written; False checks the
            records, and sizes of the tensors.

    Raises:
        DamagedShardError: If it is not what was written.
        FileNotFoundError: If a file is missing.
    """
    tensors, records = (folder / f"{facts['name']}{suffix}" for suffix in (TENSORS, RECORDS))
    content = records.read_bytes()
    if bytes_digest(content) != facts["digests"][RECORDS]:
        raise _damaged(facts, records)
    if verify and file_digest(tensors) != facts["digests"][TENSORS]:
        raise _damaged(facts, tensors)
    try:
        values = _with_summary(load_file(tensors))
        shard = Shard([json.loads(line) for line in content.splitlines()], **values)
        check_records(shard.records)
        check_tensors(shard, facts["images"], verify=verify)
    except (SafetensorError, *_ODD) as error:
        raise _damaged(facts, tensors) from error
    return shard


def _tensors(images: Sequence[StoredImage]) -> dict[str, Tensor]:
    return {
        "pooled": torch.stack([image.pooled for image in images]),
        "tokens": torch.cat([image.tokens for image in images]),
        "scales": torch.cat([image.scales for image in images]),
        "lengths": torch.tensor([len(image.tokens) for image in images]),
    }


def grouped(images: Iterable[StoredImage]) -> Iterator[list[StoredImage]]:
    """Images in parts that fit into one shard each."""
    group: list[StoredImage] = []
    size = 0
    for image in images:
        if group and size + image.tokens.nbytes > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(image)
        size += image.tokens.nbytes
    if group:
        yield group


def _summaries(images: Sequence[StoredImage]) -> dict[str, Tensor]:
    """What a shard says of the images' summaries: nothing if there are none."""
    known = [image.summary is not None for image in images]
    if not any(known):
        return {}
    none = torch.zeros_like(images[0].pooled)
    summaries = [none if image.summary is None else image.summary for image in images]
    return {"summary": torch.stack(summaries), "has_summary": torch.tensor(known)}


def _with_summary(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a shard; those of `_summaries` are not there in shards of version 1."""
    if "summary" in values or "has_summary" in values:
        return values
    means = values["pooled"]
    known = torch.zeros(len(means), dtype=torch.bool)
    return {**values, "summary": means.new_zeros(1, 1).expand_as(means), "has_summary": known}


def _damaged(facts: dict[str, Any], path: Path) -> DamagedShardError:
    return DamagedShardError(
        f"{str(path)!r} is damaged: its {facts['images']} images cannot be trusted. Restore the "
        "file from a copy, or open the index with damaged='leave_out' and add the same images "
        "again."
    )


def set_aside(folder: Path, name: str) -> None:
    """Renames the files of a damaged shard."""
    for suffix in (TENSORS, RECORDS):
        path = folder / f"{name}{suffix}"
        if path.exists():
            path.rename(path.with_name(f"{path.name}.damaged"))


def as_damaged(error: Exception, facts: dict[str, Any]) -> Exception:
    """The error itself, or what a missing file of a shard means."""
    if isinstance(error, DamagedShardError):
        return error
    return DamagedShardError(
        f"A file of shard {facts['name']} is missing ({error}): {facts['images']} images. Restore "
        "it from a copy, or open the index with damaged='leave_out' and add the same images again."
    )
