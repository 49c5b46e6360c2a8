"""Adds images to a store: what is there already stays, what changed is replaced, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from pico_hf.data.images import reason
from pico_hf.search.shards import ImageVectors, StoredImage
from pico_hf.search.sources import SourceImage
from pico_hf.search.store import ImageStore

logger = logging.getLogger(__name__)

BATCH_PIXELS = 2**26  # decoded at a time: 200 MB, one photo of 64 megapixels


@dataclass
class AddReport:
    """What an `add` did.

    Attributes:
        added: Images that are new.
        updated: Images of which content, payload or path changed, or of which an index of an
            older version lacked the pooled feature.
        unchanged: Images that were there already.
        duplicates: Images with the content of another image of the same source: they are stored
            once, with the payload of the first.
        skipped: (image, what is wrong with it) of those that cannot be read.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    duplicates: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Pending:
    """An image of the next shard: one to encode, one that is encoded, or a copy of a row."""

    record: dict[str, Any]
    picture: Image.Image | None = None
    row: int | None = None
    vectors: ImageVectors | None = None


Encode = Callable[[list[Image.Image]], list[ImageVectors]]
Decode = Callable[[Any], Image.Image]


class Upsert:
    """Takes images one by one and stores them for good in groups of `commit_images`.

    Args:
        store: Opened for writing.
        encode: RGB images to the vectors of each.
        decode: Content to an RGB image.
        batch_size: Images that are encoded at a time, at most.
        commit_images: Images of a shard.
    """

    def __init__(
        self, store: ImageStore, encode: Encode, decode: Decode, batch_size: int, commit_images: int
    ) -> None:
        self.store, self.encode, self.decode = store, encode, decode
        self.batch_size, self.commit_images = batch_size, commit_images
        self.report = AddReport()
        self._seen: dict[str, str] = {}  # id → digest, of this source
        self._pending: dict[str, _Pending] = {}
        self._replaced: set[int] = set()
        self._owners: dict[str, str] = {}  # path → id, where it differs from the store's
        self._waiting: list[_Pending] = []

    def run(self, images: Sequence[SourceImage], skip_bad: bool, show_progress: bool) -> AddReport:
        """Adds all images of a source.

        Raises:
            ValueError: If none of them can be read, or any if `skip_bad` is False.
            OSError: If the disk is full; what was stored before stays.
        """
        with tqdm(total=len(images), desc="Indexing", disable=not show_progress) as bar:
            for image in images:
                self._put(image, skip_bad)
                if len(self._pending) >= self.commit_images:
                    self.flush()
                bar.update()
        self.flush()
        if len(self.report.skipped) == len(images):
            raise ValueError(
                f"`source` must hold images that can be read, got {len(images)} that cannot: "
                f"{self.report.skipped[0][0]} ({self.report.skipped[0][1]})."
            )
        if self.report.duplicates:
            logger.warning(
                "%d images have the content of another one and are stored once, with the payload "
                "of the first. Name them with `ids` or `id_column` to keep each.",
                self.report.duplicates,
            )
        return self.report

    # ---- one image -------------------------------------------------------------------------

    def _put(self, image: SourceImage, skip_bad: bool) -> None:
        try:
            digest, content = image.read()
            key = digest if image.key is None else image.key
            picture = None if self._vectors_of(key, digest) else self.decode(content)
        except (ValueError, OSError) as error:
            self._skip(image, error, skip_bad)
            return
        before = self._current(key)
        again = key in self._seen
        if again and self._seen[key] != digest:
            self.flush()
            raise ValueError(f"`source` has two images with the id {key!r}. Ids must differ.")
        self._seen[key] = digest
        record = _record(key, digest, image, before, keep_payload=again)
        released = image.key is None and self._release(image.path, key)
        if record == before and picture is None:
            kind = "duplicates" if again else "unchanged"
        else:
            self._set(record, picture)
            kind = "duplicates" if again else "updated" if before or released else "added"
        setattr(self.report, kind, getattr(self.report, kind) + 1)

    def _skip(self, image: SourceImage, error: Exception, skip_bad: bool) -> None:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        why = reason(cause)
        if not skip_bad:
            self.flush()
            raise ValueError(f"{image.name} cannot be read ({why}). Repair it or leave it out.")
        logger.warning("%s is left out: %s.", image.name, why)
        self.report.skipped.append((image.name, why))

    def _current(self, key: str) -> dict[str, Any] | None:
        """The record of an image as it is now, not yet stored changes included."""
        if key in self._pending:
            return self._pending[key].record
        row = self.store.row_of.get(key)
        return None if row is None or row in self._replaced else self.store.records[row]

    def _vectors_of(self, key: str, digest: str) -> bool:
        """Whether the content of an image is encoded already, as a whole, or about to be."""
        if key in self._pending:
            return self._pending[key].record["digest"] == digest
        row = self.store.row_of.get(key)
        if row is None or not self.store.has_summary[row]:
            return False
        return self.store.records[row]["digest"] == digest

    def _set(self, record: dict[str, Any], picture: Image.Image | None) -> None:
        """Gives an image a new record; a picture if its content is new."""
        key = record["id"]
        pending, row = self._pending.get(key), self.store.row_of.get(key)
        if row is not None:
            self._replaced.add(row)
        if pending is not None and picture is None:
            pending.record = record
        else:
            self._pending[key] = _Pending(record, picture, row if picture is None else None)
            if picture is not None:
                self._waiting.append(self._pending[key])
                self._encode_if_full()
        self._owners |= dict.fromkeys(record["paths"], key)

    def _release(self, path: str | None, key: str) -> bool:
        """Takes a path from the image whose content its file had before; True if there was one."""
        if path is None:
            return False
        row = self.store.owner_of.get(path)
        owner = self._owners.get(path, None if row is None else self.store.records[row]["id"])
        before = None if owner in (None, key) else self._current(owner)
        if before is None or before["id"] != before["digest"] or path not in before["paths"]:
            return False
        paths = [one for one in before["paths"] if one != path]
        if paths:
            self._set({**before, "paths": paths}, None)
        else:
            self._drop(before["id"])
        return True

    def _drop(self, key: str) -> None:
        pending, row = self._pending.pop(key, None), self.store.row_of.get(key)
        if pending in self._waiting:
            self._waiting.remove(pending)
        if row is not None:
            self._replaced.add(row)

    # ---- many images -----------------------------------------------------------------------

    def _encode_if_full(self) -> None:
        pixels = sum(one.picture.width * one.picture.height for one in self._waiting if one.picture)
        if len(self._waiting) >= self.batch_size or pixels >= BATCH_PIXELS:
            self._encode_waiting()

    def _encode_waiting(self) -> None:
        pictures = [one.picture for one in self._waiting if one.picture is not None]
        if pictures:
            for one, vectors in zip(self._waiting, self.encode(pictures), strict=True):
                one.vectors, one.picture = vectors, None
        self._waiting = []

    def flush(self) -> None:
        """Stores what is pending: all of it or, if the process is killed, nothing."""
        self._encode_waiting()
        images = [self._stored(one) for one in self._pending.values()]
        if images or self._replaced:
            self.store.append(images, sorted(self._replaced))
        self._pending, self._replaced, self._owners = {}, set(), {}

    def _stored(self, one: _Pending) -> StoredImage:
        if one.row is not None:
            return self.store.image(one.row, one.record)
        assert one.vectors is not None
        return StoredImage.of(one.record, one.vectors, self.store.dtype)


def _record(
    key: str,
    digest: str,
    image: SourceImage,
    before: dict[str, Any] | None,
    keep_payload: bool,
) -> dict[str, Any]:
    """What an image's record becomes."""
    paths = list(before["paths"]) if before is not None and before["digest"] == digest else []
    if image.path is not None and image.path not in paths:
        paths.append(image.path)
    payload = image.payload
    if payload is None or (keep_payload and before is not None):
        payload = {} if before is None else before["payload"]
    return {"id": key, "digest": digest, "paths": paths, "payload": payload}
