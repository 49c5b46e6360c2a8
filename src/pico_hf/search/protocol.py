"""What an index needs of the place where its images are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pico_hf.search.payload import Filter
from pico_hf.search.queries import Queries
from pico_hf.search.shards import StoredImage
from pico_hf.search.vectors import Candidates


class View(Protocol):
    """The images of a store that pass a filter."""

    def __len__(self) -> int:
        """How many there are."""

    def keys(self) -> list[str]:
        """Their ids."""

    def lacking_summary(self) -> int:
        """How many have no pooled feature of the encoder."""

    def blocks(self) -> Iterator[Candidates]:
        """All of them, in parts that fit into memory."""

    def nearest(self, queries: Queries, depth: int) -> Iterator[Candidates]:
        """For every query the `depth` images that are best by one vector each, in any order."""


class Store(Protocol):
    """Images by their ids, each with a record (`id`, `digest`, `paths`, `payload`) and vectors.

    Attributes:
        facts: `dtype`, `width` (None until the first image), `merging`, `encoder`.
        place: Folder or address, for messages.
        dtype: In which it takes tokens.
    """

    place: str

    @property
    def dtype(self) -> str:
        """See the class."""

    @property
    def facts(self) -> dict[str, Any]:
        """See the class."""

    def __len__(self) -> int:
        """How many images there are."""

    def writing(self) -> AbstractContextManager[None]:
        """For a change: alone where the store allows but one writer, and up to date."""

    def refresh(self) -> None:
        """Takes over what other processes have changed."""

    def compact(self) -> None:
        """Frees the space of what was deleted."""

    def verify(self) -> None:
        """Raises ValueError for damage that can be found."""

    def close(self) -> None:
        """Lets go of files and connections."""

    def keys(self) -> list[str]:
        """Ids of all images."""

    def look_up(self, keys: Sequence[str], paths: Sequence[str]) -> None:
        """Says which ids and paths will be asked for next, so that one request answers all."""

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of an image; None if there is none of this id."""

    def owner(self, path: str, besides: str) -> str | None:
        """Id of an image that has a path, other than `besides`."""

    def has_summary(self, key: str) -> bool:
        """Whether an image that is there has the encoder's pooled feature."""

    def change(self, puts: Sequence[StoredImage | dict[str, Any]], deleted: Iterable[str]) -> None:
        """Adds or replaces images, and deletes others.

        Args:
            puts: Images; or records alone, which replace those of images that are there.
            deleted: Ids.
        """

    def view(self, chosen: Filter | None) -> View:
        """The images that pass a filter.

        Raises:
            ValueError: If the filter names a field that no image has.
        """

    def groups(self) -> Iterator[list[StoredImage]]:
        """All images, in parts that fit into memory."""
