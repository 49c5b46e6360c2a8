"""An index of images that is searched with words or images."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pico_hf.core.token_features import TokenFeatures
from pico_hf.search.add_report import AddReport
from pico_hf.search.copying import copy_whole
from pico_hf.search.encoding import IndexEncoder, check_features
from pico_hf.search.fingerprint import check_same_encoder
from pico_hf.search.hits import hits_of
from pico_hf.search.payload import Filter, Payload, checked_payload, payload_of
from pico_hf.search.protocol import Store
from pico_hf.search.qdrant_places import create_qdrant, is_url, open_qdrant
from pico_hf.search.qdrant_store import QdrantStore
from pico_hf.search.ranking import best_images
from pico_hf.search.shards import DTYPES, StoredImage
from pico_hf.search.sources import SourceImage, images_of
from pico_hf.search.store import ImageStore
from pico_hf.search.upsert import Upsert


class PicoIndex:
    """Images on disk, found by what they show: words or an image in, ranked images out.

    Made by [`PicoIndex.create`] and opened by [`PicoIndex.open`]. Tokens are kept in the encoder's
    own columns; column weights, and the columns that an alignment has found, go into the query.
    One index therefore serves a model before and after its columns are estimated anew, and refuses
    only a model that encodes images differently.

    A change is on disk, whole, when its method returns, or is not there at all. Several processes
    may search; one at a time changes an index. See [`PicoIndex.create`] for an index on Qdrant.
    """

    def __init__(self, store: Store, encoder: IndexEncoder) -> None:
        self._store, self._encoder = store, encoder
        self._temporary: tempfile.TemporaryDirectory | None = None

    # ---- files -----------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike | None = None,
        retriever: Any = None,
        *,
        dtype: str = "float16",
        token_merging: int = 1,
        store: str = "files",
        client: Any = None,
    ) -> PicoIndex:
        """Makes an empty index.

        Args:
            folder: New or empty; None: a temporary one, which goes away with the index. Or a new
                collection on a Qdrant server, as `"http://localhost:6333/photos"`; the environment
                variable `QDRANT_API_KEY` is its key. The extra `qdrant` is needed for it.
            retriever: A [`PicoRetriever`], which encodes images and queries. None: vectors are
                added and searched as they are.
            dtype: How tokens are stored: `"float16"`, `"float32"`, or `"int8"` with a scale per
                token.
            token_merging: 2 or 4 keeps a half or a quarter of the tokens of every image, means of
                those that lie closest; 1 keeps all.
            store: `"files"`, or `"qdrant"` for Qdrant's engine in this process, which no other
                process can open meanwhile.
            client: A `qdrant_client.QdrantClient` in place of an address; `folder` is then the name
                of the collection.

        Raises:
            ValueError: If an argument is out of range, the folder holds files, or there is such a
                collection.
            ConnectionError: If no server answers.
            ImportError: If the extra `qdrant` is not installed.
        """
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if isinstance(token_merging, bool) or token_merging not in range(1, 17):
            raise ValueError(
                f"`token_merging` must be an integer from 1 to 16, got {token_merging}."
            )
        if store not in ("files", "qdrant"):
            raise ValueError(f"`store` must be 'files' or 'qdrant', got {store!r}.")
        encoder = IndexEncoder(retriever, token_merging)
        facts: dict[str, Any] = {"dtype": dtype, "width": None, "merging": token_merging}
        facts["encoder"] = encoder.fingerprint()
        temporary = None
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="pico-hf-")
            folder = temporary.name
        if store == "qdrant" or client is not None or is_url(folder):
            facts["width"] = encoder.width()
            index = cls(QdrantStore.create(*create_qdrant(folder, facts, client)), encoder)
        else:
            index = cls(ImageStore.create(Path(folder), facts), encoder)
        index._temporary = temporary
        return index

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        retriever: Any = None,
        *,
        verify: bool = True,
        damaged: str = "refuse",
        client: Any = None,
    ) -> PicoIndex:
        """Opens an index.

        Args:
            folder: Where it is: a folder, or the address of a collection, see `create`.
            retriever: A [`PicoRetriever`] of the model that the index was made with; its column
                weights may differ.
            verify: True reads every byte once and finds any damage, about a second per GB.
            damaged: `"refuse"` raises for a damaged shard; `"leave_out"` sets it aside, says how
                many images are gone, and opens the rest. Adding the same images again repairs it.
                Qdrant looks after its own files, whatever these two say.
            client: See `create`.

        Raises:
            ValueError: If there is no index, it is damaged, or it was made with another model.
            ConnectionError: If no server answers.
            TimeoutError: If another process has the index open and only one can.
        """
        if damaged not in ("refuse", "leave_out"):
            raise ValueError(f"`damaged` must be 'refuse' or 'leave_out', got {damaged!r}.")
        place = open_qdrant(folder, client)
        if place is None:
            store: Store = ImageStore(Path(folder), verify=verify, damaged=damaged)
        else:
            store = QdrantStore(*place)
        try:
            encoder = IndexEncoder(retriever, store.facts["merging"])
            check_same_encoder(store.facts["encoder"], encoder.fingerprint())
        except ValueError:
            store.close()
            raise
        return cls(store, encoder)

    @property
    def retriever(self) -> Any:
        """What encodes images and queries; None in an index of vectors alone."""
        return self._encoder.retriever

    def with_model(self, model: Any) -> PicoIndex:
        """The same images, searched with a model that encodes images alike and scores otherwise.

        Raises:
            ValueError: If it encodes images in another way, or there is no retriever.
        """
        retriever = copy.copy(self._encoder.required("search with another model"))
        retriever.model = model
        encoder = IndexEncoder(retriever, self._store.facts["merging"])
        check_same_encoder(self._store.facts["encoder"], encoder.fingerprint())
        other = type(self)(self._store, encoder)
        other._temporary = self._temporary
        return other

    @property
    def storage(self) -> dict[str, Any]:
        """`dtype` and `token_merging` that it was made with."""
        facts = self._store.facts
        return {"dtype": facts["dtype"], "token_merging": facts["merging"]}

    @property
    def place(self) -> str:
        """Folder or address of the index, as `open` takes it."""
        return self._store.place

    @property
    def folder(self) -> Path:
        """Where the index is, unless it is on a server."""
        return Path(self._store.place)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a copy to files, without what was deleted; the index itself is on disk already.

        Args:
            folder: New or empty.

        Raises:
            ValueError: If the folder holds files.
        """
        facts = self._store.facts
        copy_whole(self._store, Path(folder), lambda new: ImageStore.create(new, facts))

    def refresh(self) -> None:
        """Takes over what other processes have changed."""
        self._store.refresh()

    def compact(self) -> None:
        """Frees the space of deleted images and joins small shards; ids and scores stay."""
        with self._store.writing():
            self._store.compact()

    def verify(self) -> None:
        """Reads every byte and raises ValueError for the first damaged shard."""
        self._store.verify()

    def close(self) -> None:
        """Lets other processes open an index that one at a time can; it cannot be used any more."""
        self._store.close()

    # ---- images ----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, key: str) -> bool:
        return self._store.record(key) is not None

    def ids(self) -> list[str]:
        """Of all images, in the order in which they were stored."""
        return self._store.keys()

    def payload(self, key: str) -> Payload:
        """What is kept beside an image; KeyError if there is none of this id."""
        record = self._store.record(key)
        if record is None:
            raise KeyError(key)
        return payload_of(record)

    def payloads(self) -> dict[str, Payload]:
        """What is kept beside every image, by its id."""
        keys = self._store.keys()
        self._store.look_up(keys, [])
        records = {key: self._store.record(key) for key in keys}
        return {key: payload_of(own) for key, own in records.items() if own is not None}

    def add(
        self,
        source: Any,
        *,
        ids: Sequence[str] | None = None,
        payloads: Sequence[Mapping[str, Any]] | None = None,
        image_column: str | None = None,
        id_column: str | None = None,
        skip_bad_images: bool = True,
        commit_images: int = 256,
        show_progress: bool = True,
    ) -> AddReport:
        """Adds images; those that are there are not encoded again.

        An image is known by its id, without one by its content: the same file under another name is
        the same image, and a file that changed replaces what it was. A run that was killed goes on
        where the last stored images end.

        Args:
            source: A folder (with its subfolders), a path, a PIL image or an array, a list of them,
                a `datasets.Dataset` or an [`ImageTextDataset`].
            ids: Of each image.
            payloads: Of each image: a dict that JSON can hold. Rows of a data set bring their other
                columns.
            image_column: Of a data set; None finds it.
            id_column: Of a data set; None: ids are digests of the content.
            skip_bad_images: True leaves out what cannot be read, with a warning and a line in the
                report; False raises for the first one.
            commit_images: Images after which they are stored for good.
            show_progress: False shows no progress bar.

        Raises:
            ValueError: If there is no image that can be read, or arguments do not fit.
            OSError: If the disk is full; what was stored before stays.
        """
        self._encoder.required("add images")
        if commit_images < 1:
            raise ValueError(f"`commit_images` must be >= 1, got {commit_images}.")
        images = images_of(source, ids, payloads, image_column, id_column)
        with self._store.writing():
            report = self.add_share(images, skip_bad_images, commit_images, show_progress)
        report.check(len(images))
        return report

    def add_share(
        self,
        images: Sequence[SourceImage],
        skip_bad_images: bool,
        commit_images: int,
        show_progress: bool,
    ) -> AddReport:
        """What `add` does, beside other processes that do the same; see `pico_hf.search.bulk`."""
        self._store.refresh()
        encoder = self._encoder
        size = encoder.required("add images").batch_size
        upsert = Upsert(self._store, encoder.images, encoder.decode, size, commit_images)
        return upsert.run(images, skip_bad_images, show_progress)

    def add_features(
        self,
        features: TokenFeatures,
        ids: Sequence[str],
        payloads: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Adds images that were encoded before, and replaces those with the same ids.

        Args:
            features: What `PicoRetriever.encode_images` gives. Without pooled vectors no model can
                search them whose score these are part of.
            ids: Of each image, all different.
            payloads: Of each image.

        Raises:
            ValueError: If the numbers of entries differ, an id comes twice, an image has no token,
                values are not finite, or the width is not that of the index.
        """
        keys = [str(key) for key in ids]
        check_features(features, keys, payloads, self._store.facts["width"])
        vectors = self._encoder.vectors(features)
        images = []
        for row, (key, own) in enumerate(zip(keys, vectors, strict=True)):
            payload = checked_payload(payloads[row] if payloads else None, f"image {key!r}")
            record = {"id": key, "digest": own.digest(), "paths": [], "payload": payload}
            images.append(StoredImage.of(record, own, self._store.dtype))
        with self._store.writing():
            self._store.look_up(keys, [])
            new = [i for i in images if self._store.record(i.record["id"]) != i.record]
            if new:
                self._store.change(new, [])

    def delete(
        self, ids: str | Sequence[str] | None = None, *, filter: Filter | None = None
    ) -> int:
        """Deletes images by id or by payload; `compact` frees their space.

        Args:
            ids: One id or several.
            filter: See `search`.

        Returns:
            How many were deleted.

        Raises:
            ValueError: If not exactly one of both is given, or an id is not there.
        """
        if (ids is None) == (filter is None):
            raise ValueError("Give either `ids` or `filter`, and not both.")
        with self._store.writing():
            if ids is None:
                keys = self._store.view(filter).keys()
            else:
                keys = list(dict.fromkeys([ids] if isinstance(ids, str) else ids))
                self._store.look_up(keys, [])
                missing = [key for key in keys if self._store.record(key) is None]
                if missing:
                    raise ValueError(
                        f"`ids` must be of images in the index, got {missing[0]!r}"
                        f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which "
                        "are not there. Nothing was deleted."
                    )
            if keys:
                self._store.change([], keys)
        return len(keys)

    # ---- search ----------------------------------------------------------------------------

    def search(
        self,
        queries: Any,
        top_k: int = 10,
        *,
        filter: Filter | None = None,
        depth: int = 100,
        exact: bool | None = None,
    ) -> Any:
        """Finds the images with the highest scores.

        Args:
            queries: A text, or an image (a `Path`, a PIL image, bytes or an array); a list of texts
                or of images; or [`TokenFeatures`] of several. A string is always a text.
            top_k: How many images per query, >= 1.
            filter: Which images are searched: a dict of payload fields, all of which must pass (a
                value is equal, a list is one of, a function is called with the value; one entry of
                a stored list has to pass), or a function of the whole payload.
            depth: How many images that are best by one pooled vector each are scored exactly.
            exact: True scores every image exactly, False goes by pooled vectors first; None decides
                by their number (exact up to 2,000).

        Returns:
            A list of [`Hit`]s, best first; of several queries a list of such lists.

        Raises:
            ValueError: If a query is empty or cannot be read, a number is below 1, the filter names
                a field that no image has, or images lack the pooled feature that the score needs.
        """
        for name, number in (("top_k", top_k), ("depth", depth)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"`{name}` must be an integer >= 1, got {number!r}.")
        alone = not isinstance(queries, list | tuple | TokenFeatures)
        width = self._store.facts["width"]
        encoded = self._encoder.queries([queries] if alone else queries, width)
        best = best_images(self._store.view(filter), encoded, top_k, depth, exact)
        found = [hits_of(own) for own in best]
        return found[0] if alone else found
