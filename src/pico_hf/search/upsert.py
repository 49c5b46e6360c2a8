"""Adds images to a store: what is there already stays, what changed is replaced, batch by batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pico_hf.data.images import reason
from pico_hf.data.progress import progress_bar
from pico_hf.search.add_report import AddReport
from pico_hf.search.protocol import Store
from pico_hf.search.records import merged_record, new_record
from pico_hf.search.shards import ImageVectors, StoredImage
from pico_hf.search.sources import ReadImage, SourceImage, read_ahead

logger = logging.getLogger(__name__)

BATCH_PIXELS = 2**26  # decoded at a time: 200 MB, one photo of 64 megapixels


@dataclass
class _Pending:
    """What an image of the next group becomes: encoded anew, given another record, or deleted.

    Attributes:
        source: Where it comes from.
        base: Its record before; None: it was not there.
        record: Its record then; None: it goes.
        picture: To encode; None once it is, or if its content stays.
        vectors: Of the new content.
    """

    source: SourceImage
    base: dict[str, Any] | None
    record: dict[str, Any] | None
    picture: Image.Image | None = None
    vectors: ImageVectors | None = None


Encode = Callable[[list[Image.Image]], list[ImageVectors]]
Decode = Callable[[Any], Image.Image]


class Upsert:
    """Takes images one by one and stores them for good in groups of `commit_images`.

    Args:
        store: Where they go.
        encode: RGB images to the vectors of each.
        decode: Content to an RGB image.
        batch_size: Images that are encoded at a time, at most.
        commit_images: Images of a shard.
    """

    def __init__(
        self, store: Store, encode: Encode, decode: Decode, batch_size: int, commit_images: int
    ) -> None:
        self.store, self.encode, self.decode = store, encode, decode
        self.batch_size, self.commit_images = batch_size, commit_images
        self.report = AddReport()
        self._seen: dict[str, str] = {}  # id → digest, of this source
        self._pending: dict[str, _Pending] = {}
        self._owners: dict[str, str] = {}  # path → id, where it differs from the store's
        self._waiting: list[_Pending] = []
        self._gone: list[SourceImage] = []  # deleted by another process meanwhile

    def run(self, images: Sequence[SourceImage], skip_bad: bool, show_progress: bool) -> AddReport:
        """Adds all images of a source.

        Raises:
            ValueError: If one cannot be read and `skip_bad` is False.
            OSError: If the disk is full; what was stored before stays.
        """
        with progress_bar(None, "Indexing", total=len(images), hidden=not show_progress) as bar:
            for group in read_ahead(images):
                self._look_up(group)
                for image, content in group:
                    self._put(image, content, skip_bad)
                    if len(self._pending) >= self.commit_images:
                        self.flush()
                    bar.update()
            self.flush()
        if self._gone:
            again, self._gone = self._gone, []
            return self.run(again, skip_bad, show_progress=False)
        if self.report.duplicates:
            logger.warning(
                "%d images have the content of another one and are stored once, with the payload "
                "of the first. Name them with `ids` or `id_column` to keep each.",
                self.report.duplicates,
            )
        return self.report

    def _look_up(self, group: list[ReadImage]) -> None:
        named = [image.key for image, _ in group if image.key is not None]
        digests = [read[0] for _, read in group if not isinstance(read, Exception)]
        paths = [image.path for image, _ in group if image.path is not None]
        self.store.look_up([*named, *digests], paths)

    # ---- one image -------------------------------------------------------------------------

    def _put(self, image: SourceImage, read: tuple[str, Any] | Exception, skip_bad: bool) -> None:
        if isinstance(read, Exception):
            self._skip(image, read, skip_bad)
            return
        digest, content = read
        key = digest if image.key is None else image.key
        encoded = self._encoded(key, digest)
        try:
            picture = None if encoded else self.decode(content)
        except (ValueError, OSError) as error:
            self._skip(image, error, skip_bad)
            return
        before = self._current(key)
        again = key in self._seen
        if again and self._seen[key] != digest:
            self.flush()
            raise ValueError(f"`source` has two images with the id {key!r}. Ids must differ.")
        self._seen[key] = digest
        record = new_record(key, digest, image, before, keep_payload=again)
        released = image.key is None and self._release(image, key)
        if record == before and picture is None:
            kind = "duplicates" if again else "unchanged"
        else:
            self._set(image, key, record, picture)
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
        return self.store.record(key)

    def _encoded(self, key: str, digest: str) -> bool:
        """Whether the content of an image is encoded already, as a whole, or about to be."""
        pending = self._pending.get(key)
        record = self.store.record(key) if pending is None else pending.record or pending.base
        if record is None or record["digest"] != digest:
            return False
        return bool(pending and (pending.picture or pending.vectors)) or self.store.has_summary(key)

    def _set(
        self,
        image: SourceImage,
        key: str,
        record: dict[str, Any] | None,
        picture: Image.Image | None = None,
    ) -> None:
        """Gives an image a new record or, with None, lets it go; a picture if it is new."""
        pending = self._pending.get(key)
        if pending is not None and picture is None and record is not None:
            pending.record = record
        else:
            base = self.store.record(key) if pending is None else pending.base
            if pending in self._waiting:
                self._waiting.remove(pending)
            self._pending[key] = _Pending(image, base, record, picture)
            if picture is not None:
                self._waiting.append(self._pending[key])
                self._encode_if_full()
        self._owners |= dict.fromkeys(record["paths"] if record else (), key)

    def _release(self, image: SourceImage, key: str) -> bool:
        """Takes a path from the image whose content its file had before; True if there was one."""
        path = image.path
        if path is None:
            return False
        owner = self._owners.get(path) or self.store.owner(path, besides=key)
        before = None if owner in (None, key) else self._current(owner)
        if before is None or before["id"] != before["digest"] or path not in before["paths"]:
            return False
        paths = [one for one in before["paths"] if one != path]
        self._set(image, before["id"], {**before, "paths": paths} if paths else None)
        return True

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
        """Stores what is pending; if the process is killed, whole images or none."""
        self._encode_waiting()
        if not self._pending:
            return
        with self.store.writing():
            self.store.look_up(list(self._pending), [])
            puts: list[StoredImage | dict[str, Any]] = []
            deleted: list[str] = []
            for key, one in self._pending.items():
                put = self._outcome(one, self.store.record(key))
                if put is not None:
                    puts.append(put)
                elif one.record is None:
                    deleted.append(key)
            if puts or deleted:
                self.store.change(puts, deleted)
        self._pending, self._owners = {}, {}

    def _outcome(
        self, one: _Pending, now: dict[str, Any] | None
    ) -> StoredImage | dict[str, Any] | None:
        """What is stored of an image, given its record now; None: nothing."""
        record = one.record if now == one.base else merged_record(one.base, one.record, now)
        if one.vectors is None:
            if record is not None and now is None:
                self._gone.append(one.source)
                return None
            one.record = record
            return None if record == now else record
        assert record is not None
        if now != one.base and now is not None and now["digest"] == record["digest"]:
            if one.base is None:  # another process has just stored it
                self.report.added -= 1
                self.report.duplicates += 1
            return None if record == now else record
        return StoredImage.of(record, one.vectors, self.store.dtype)
