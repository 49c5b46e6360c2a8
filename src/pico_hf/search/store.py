"""The images of an index on disk: shards that are only added, and a manifest that says what counts.

A change is one new manifest. Whatever a killed process left beside it was never part of the index.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pico_hf.search.file_view import FileView, passing
from pico_hf.search.files import PARTIAL, changing, new_folder, read_manifest, write_manifest
from pico_hf.search.payload import Filter
from pico_hf.search.shards import (
    RECORDS,
    TENSORS,
    DamagedShardError,
    Shard,
    StoredImage,
    as_damaged,
    grouped,
    read_shard,
    set_aside,
    write_shard,
)
from pico_hf.search.vectors import ShardVectors

logger = logging.getLogger(__name__)


class ImageStore:
    """Tokens and records of many images in a folder; rows count images of all shards in order.

    Args:
        folder: Holds a manifest.
        verify: See `read_shard`.
        damaged: `"refuse"` raises for a damaged shard, `"leave_out"` sets its files aside and goes
            on without its images.

    Attributes:
        records: Of every row, deleted ones included.
        alive: (rows,) False = deleted.
        known: (rows,) False = the encoder's pooled feature is not known.
        vectors: Of every row.
    """

    def __init__(self, folder: Path, *, verify: bool = True, damaged: str = "refuse") -> None:
        self.folder, self._shards_folder, self.place = folder, folder / "shards", str(folder)
        self.manifest: dict[str, Any] = read_manifest(folder)
        if "store" in self.manifest:
            raise ValueError(f"{self.place!r} is an index on Qdrant: `PicoIndex.open` reads it.")
        self._lock = FileLock(folder / "index.lock")
        self._read_shards(verify)
        if self._damaged and damaged != "leave_out":
            raise self._damaged[0][1]
        if self._damaged:
            with self.writing():
                self._set_aside()

    @classmethod
    def create(cls, folder: Path, facts: dict[str, Any]) -> ImageStore:
        """Makes an empty index.

        Args:
            folder: Created if need be.
            facts: `dtype`, `width` (None until the first image), `merging`, `encoder`.

        Raises:
            ValueError: If the folder holds an index, or other files.
        """
        new_folder(folder)
        write_manifest(folder, {**facts, "generation": 0, "next_shard": 1, "shards": []})
        return cls(folder)

    def __len__(self) -> int:
        return len(self.row_of)

    @property
    def facts(self) -> dict[str, Any]:
        """`dtype`, `width` (None until the first image), `merging` and `encoder`."""
        return {key: self.manifest[key] for key in ("dtype", "width", "merging", "encoder")}

    @property
    def dtype(self) -> str:
        """In which tokens are stored."""
        return self.manifest["dtype"]

    def keys(self) -> list[str]:
        """Ids in the order of rows."""
        return list(self.row_of)

    def look_up(self, keys: Sequence[str], paths: Sequence[str]) -> None:
        """Nothing: all records are in memory."""

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a living image by its id."""
        row = self.row_of.get(key)
        return None if row is None else self.records[row]

    def owner(self, path: str, besides: str) -> str | None:
        """Id of the image that has a path, if it is another one."""
        row = self.owner_of.get(path)
        owner = None if row is None else self.records[row]["id"]
        return None if owner == besides else owner

    def has_summary(self, key: str) -> bool:
        """Whether a living image has the encoder's pooled feature."""
        return bool(self.known[self.row_of[key]])

    def view(self, chosen: Filter | None) -> FileView:
        """Living images that pass a filter."""
        rows = passing(self.records, self.alive.nonzero().flatten(), chosen)
        return FileView(self.records, self.vectors, self.known, rows)

    def image(self, row: int, record: dict[str, Any] | None = None) -> StoredImage:
        """One image as it is stored, with another record if one is given."""
        for shard, start in zip(self._shards, self._starts, strict=True):
            if row < start + len(shard.records):
                return shard.image(row - start, record)
        raise IndexError(row)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """For a change: alone among all processes, on top of what others have changed."""
        with changing(self._lock, self.folder):
            self.refresh()
            self._clear_leftovers()
            yield

    def refresh(self) -> None:
        """Takes over what another process has changed."""
        manifest = read_manifest(self.folder)
        if manifest["generation"] != self.manifest["generation"]:
            self.manifest = manifest
            self._read_shards(verify=False)
            if self._damaged:
                raise self._damaged[0][1]

    def close(self) -> None:
        """Nothing: files are closed already."""

    def change(
        self, puts: Sequence[StoredImage | dict[str, Any]], deleted: Iterable[str] = ()
    ) -> None:
        """Adds or replaces images and deletes others in one step, see `Store`."""
        images = [
            put if isinstance(put, StoredImage) else self.image(self.row_of[put["id"]], put)
            for put in puts
        ]
        keys = {*deleted, *(image.record["id"] for image in images)}
        replaced = sorted(self.row_of[key] for key in keys if key in self.row_of)
        manifest = self._with_deleted(replaced)
        if images:
            name = f"{manifest['next_shard']:06d}"
            self._shards_folder.mkdir(exist_ok=True)
            facts = write_shard(self._shards_folder, name, images)
            manifest["shards"] = [*manifest["shards"], facts]
            manifest["next_shard"] += 1
            manifest["width"] = images[0].tokens.shape[1]
        self._commit(manifest)
        self.alive[replaced] = False
        if images:
            self._take(read_shard(self._shards_folder, facts, verify=False), ())
        self._index_rows()

    def compact(self) -> None:
        """Writes the living rows anew, in few large shards, and removes the old files.

        Raises:
            DamagedShardError: If a shard is damaged: its digest must not be replaced.
        """
        self.verify()
        manifest = {**self.manifest, "shards": []}
        for images in self.groups():
            name = f"{manifest['next_shard']:06d}"
            manifest["shards"].append(write_shard(self._shards_folder, name, images))
            manifest["next_shard"] += 1
        self._commit(manifest)
        self._read_shards(verify=False)
        self._clear_leftovers()

    def verify(self) -> None:
        """Reads every byte and raises DamagedShardError for the first shard that is damaged."""
        for facts in self.manifest["shards"]:
            read_shard(self._shards_folder, facts, verify=True)

    def groups(self) -> Iterator[list[StoredImage]]:
        """The living rows, in parts that fit into one shard each."""
        rows = self.alive.nonzero().flatten().tolist()
        return grouped(self.image(row) for row in rows)

    def _with_deleted(self, rows: Sequence[int]) -> dict[str, Any]:
        """The manifest with some rows deleted."""
        shards = [dict(facts) for facts in self.manifest["shards"]]
        for facts, start in zip(shards, self._starts, strict=True):
            own = [row - start for row in rows if start <= row < start + facts["images"]]
            facts["deleted"] = sorted({*facts["deleted"], *own})
        return {**self.manifest, "shards": shards}

    def _commit(self, manifest: dict[str, Any]) -> None:
        manifest["generation"] = self.manifest["generation"] + 1
        write_manifest(self.folder, manifest)
        self.manifest = manifest

    def _clear_leftovers(self) -> None:
        """Removes what a killed process wrote and never made part of the index."""
        named = {facts["name"] for facts in self.manifest["shards"]}
        if self._shards_folder.is_dir():
            for path in self._shards_folder.iterdir():
                whole = path.suffix in (TENSORS, RECORDS)
                if path.suffix == PARTIAL or (whole and path.stem not in named):
                    path.unlink()

    def _read_shards(self, verify: bool) -> None:
        self.records: list[dict[str, Any]] = []
        self.alive = self.known = torch.zeros(0, dtype=torch.bool)
        self._shards: list[Shard] = []
        self._starts: list[int] = []
        self._damaged: list[tuple[dict[str, Any], Exception]] = []
        for facts in self.manifest["shards"]:
            try:
                shard = read_shard(self._shards_folder, facts, verify=verify)
            except (DamagedShardError, FileNotFoundError) as error:
                self._damaged.append((facts, as_damaged(error, facts)))
                continue
            self._take(shard, facts["deleted"])
        self._index_rows()

    def _take(self, shard: Shard, deleted: Sequence[int]) -> None:
        alive = torch.ones(len(shard.records), dtype=torch.bool)
        alive[list(deleted)] = False
        self._starts.append(len(self.records))
        self._shards.append(shard)
        self.records.extend(shard.records)
        self.alive = torch.cat([self.alive, alive])
        self.known = torch.cat([self.known, shard.has_summary])

    def _index_rows(self) -> None:
        self.vectors = ShardVectors(self._shards, self.dtype)
        living = self.alive.nonzero().flatten().tolist()
        self.row_of: dict[str, int] = {self.records[row]["id"]: row for row in living}
        self.owner_of = {path: row for row in living for path in self.records[row]["paths"]}

    def _set_aside(self) -> None:
        """Renames the files of damaged shards and goes on without them."""
        lost = {facts["name"] for facts, _ in self._damaged}
        kept = [facts for facts in self.manifest["shards"] if facts["name"] not in lost]
        for name in lost:
            set_aside(self._shards_folder, name)
        images = sum(facts["images"] for facts, _ in self._damaged)
        message = "%d images of %d damaged shards of %s are left out. Add the same images again."
        logger.warning(message, images, len(lost), self.folder)
        self._damaged = []
        self._commit({**self.manifest, "shards": kept})
