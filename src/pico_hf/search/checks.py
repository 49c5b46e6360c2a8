"""What the files of an index may say: everything that is used of them later is checked first.

A digest shows that a file is what was written, not that whoever wrote it meant well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
TENSORS, RECORDS = ".safetensors", ".jsonl"

_NAME = re.compile(r"[0-9]{6,18}")
_MOST = 2**53  # whole numbers that JSON carries exactly


def check_manifest(content: Mapping[str, Any]) -> None:
    """Raises ValueError unless a manifest says what an index consists of."""
    for key in ("generation", "next_shard"):
        _require(_is_count(content[key]), f"`{key}` must be a number")
    _require(content["dtype"] in DTYPES, f"`dtype` must be one of {', '.join(DTYPES)}")
    width, merging = content["width"], content["merging"]
    _require(width is None or (_is_count(width) and width > 0), "`width` must be a number")
    _require(_is_count(merging) and 1 <= merging <= 16, "`merging` must be from 1 to 16")
    _require(content["encoder"] is None or _is_encoder(content["encoder"]), "`encoder` is none")
    _require(isinstance(content["shards"], list), "`shards` must be a list")
    for facts in content["shards"]:
        _check_shard_facts(facts)
    names = [facts["name"] for facts in content["shards"]]
    _require(len(set(names)) == len(names), "two shards have one name")


def check_records(records: list[Any]) -> None:
    """Raises ValueError unless every image of a shard has what an index keeps beside it."""
    for record in records:
        _require(isinstance(record, dict), "a record is no object")
        texts = [record["id"], record["digest"], *_list(record["paths"])]
        _require(all(isinstance(text, str) for text in texts), "a record has a wrong type")
        _require(isinstance(record["payload"], dict), "a payload is no object")


def check_tensors(shard: Any, images: int, *, verify: bool) -> None:
    """Raises ValueError unless the tensors of a shard fit each other.

    Args:
        shard: A `Shard`.
        images: How many there should be.
        verify: True looks at every number of the tokens too.
    """
    width = shard.pooled.shape[-1]
    tokens = len(shard.tokens)
    wanted: dict[str, tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "pooled": (shard.pooled, (images, width), (torch.float32,)),
        "tokens": (shard.tokens, (tokens, width), tuple(DTYPES.values())),
        "scales": (shard.scales, (tokens,), (torch.float32,)),
        "lengths": (shard.lengths, (images,), (torch.int64,)),
        "summary": (shard.summary, (images, width), (torch.float32,)),
        "has_summary": (shard.has_summary, (images,), (torch.bool,)),
    }
    for name, (tensor, shape, dtypes) in wanted.items():
        right = tuple(tensor.shape) == shape and tensor.dtype in dtypes
        _require(right, f"`{name}` has shape {tuple(tensor.shape)} and type {tensor.dtype}")
        if name != "tokens" or verify:
            _require(bool(torch.isfinite(tensor).all()), f"`{name}` has values that are not finite")
    _require(len(shard.records) == images, "the number of records differs")
    lengths = shard.lengths
    _require(bool(((lengths > 0) & (lengths <= tokens)).all()), "an image has no tokens")
    _require(int(lengths.sum()) == tokens, "the number of tokens differs")


def _check_shard_facts(facts: Any) -> None:
    _require(isinstance(facts, dict), "a shard must be an object")
    name, images = facts["name"], facts["images"]
    _require(isinstance(name, str) and bool(_NAME.fullmatch(name)), "a shard's name is none")
    _require(_is_count(images), f"`images` of shard {name} must be a number")
    deleted = _list(facts["deleted"])
    rows = all(_is_count(row) and row < images for row in deleted)
    _require(rows, f"`deleted` of shard {name} must be rows of it")
    digests = facts["digests"]
    _require(isinstance(digests, dict), f"`digests` of shard {name} must be an object")
    whole = all(isinstance(digests.get(suffix), str) for suffix in (TENSORS, RECORDS))
    _require(whole, f"shard {name} lacks a digest")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_encoder(value: Any) -> bool:
    """What `image_side_fingerprint` gives."""
    if not isinstance(value, dict) or not isinstance(value["tower"], dict):
        return False
    kinds = (str, type(None))
    plain = (value["model_type"], value["processor"], value["calibration"])
    if not _is_count(value.get("special_tokens", 0)):  # of an index before they could be kept
        return False
    return all(isinstance(one, kinds) for one in (*plain, *value["tower"].values()))


def _list(value: Any) -> list[Any]:
    _require(isinstance(value, list), "there is no list where one should be")
    return value


def _require(right: bool, problem: str) -> None:
    if not right:
        raise ValueError(problem)
