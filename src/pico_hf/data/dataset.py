"""A retrieval split: images with their captions, as training pairs and for ranking."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from pico_hf.data.checking import CHECKED, checked_rows
from pico_hf.data.identity import canonical_order, content_digest, identity_codes
from pico_hf.data.images import open_image
from pico_hf.data.negatives import Negatives
from pico_hf.data.reading import is_made_on_the_fly


class StoredImages(Dataset):
    """Every image as a row `{"image": PIL image}`, opened when it is asked for.

    Args:
        rows: With a column `image`.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        stored = isinstance(rows.features["image"], datasets.Image)
        # The collator is the one place where images are turned and converted.
        if stored:
            rows = rows.with_format(None).cast_column("image", datasets.Image(decode=False))
        self.rows, self.stored = rows.select_columns("image"), stored

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = self.rows[row]["image"]
        return {"image": open_image(image) if self.stored else image}


class _Captions(Dataset):
    """Every caption as a row `{"caption": str}`."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"caption": self.texts[row]}


class _Pairs(Dataset):
    """Some images, each with one caption, in fixed order."""

    def __init__(self, images: Dataset, captions: Dataset) -> None:
        self.images, self.captions = images, captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.images[row], **self.captions[row]}


class ImageTextDataset(Dataset):
    """A retrieval split: images with one or several captions each.

    Rows of one image are one image, see `load_image_text`. `images()` and `captions()` keep the
    order in which images first appear in the rows.

    As a sequence it gives training pairs in *canonical order*, which depends on what images and
    captions are and not on how rows list them: one caption per image and epoch, chosen by a
    function of (seed, epoch, image, captions) alone. An interrupted run resumes exactly, and the
    same data trains alike as one row per caption, shuffled, or from files.

    Args:
        rows: From `load_image_text`, or any data set with an image and a caption column.
        seed: Seed of the choice of captions.
        image_column: See `load_image_text`, as for the rest.
        caption_column, image_id_column, gallery_column, skip_bad_images: Likewise.

    Attributes:
        text_to_image: (captions,) row of the image each caption belongs to.
        image_ids: (images,) identity; images of one identity are no negatives of each other.
        gallery: (images,) which images are ranked together.
        image_order: (images,) rows of images in canonical order.
        negatives: Mined negatives of the pairs, None if the rows have none.
        caption_order: (captions,) rows of captions in canonical order: image by image.

    Raises:
        ValueError: If a column is missing, an image unreadable or a caption empty.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        seed: int = 0,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        image_id_column: str | None = None,
        gallery_column: str | None = None,
        skip_bad_images: bool = False,
    ) -> None:
        if getattr(rows, "column_names", None) not in CHECKED or is_made_on_the_fly(rows):
            rows = checked_rows(
                rows,
                image_column=image_column,
                caption_column=caption_column,
                image_id_column=image_id_column,
                gallery_column=gallery_column,
                skip_bad_images=skip_bad_images,
            )
        self.rows, self.seed = rows, seed
        self._images = StoredImages(rows)
        # Workers that live on between epochs have copies of all but what is in shared memory.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        facts = rows.with_format(None)
        captions, self._digests = list(facts["captions"]), list(facts["digest"])
        galleries, identities = list(facts["gallery"]), list(facts["image_id"])
        self._texts = [text for texts in captions for text in texts]
        counts = torch.tensor([len(texts) for texts in captions])
        self.text_to_image: Tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self.image_ids = identity_codes(identities)
        self.gallery = identity_codes([f"gallery {name}" for name in galleries])
        order = canonical_order(self._digests, galleries, captions, identities)
        self.image_order = torch.tensor(order)
        self.caption_order = self._order_captions(counts)
        ordered = counts[self.image_order]
        self._counts, self._starts = ordered.tolist(), (ordered.cumsum(0) - ordered).tolist()
        self.negatives = Negatives.of(rows, order)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One training pair, with the identity of its image as `image_ids`."""
        row = int(self.image_order[number])
        caption = self.captions()[int(self.caption_order[self._choice(number)])]
        return {**self.images()[row], **caption, "image_ids": int(self.image_ids[row])}

    def __getitems__(self, batch: list[int]) -> list[dict[str, Any]]:
        """Training pairs, and after them one mined negative of each; see `mine_hard_negatives`."""
        mined = self.negatives
        numbers = batch if mined is None else mined.joined(batch, f"{self.seed}/{self.epoch}")
        return [self[number] for number in numbers]

    @property
    def epoch(self) -> int:
        """Whose captions the pairs have."""
        return int(self._epoch)

    @property
    def fingerprint(self) -> str:
        """Changes with images and captions, and with a transform, but not with the order of rows.

        That is the order of `in_order`, which features are to be stored in.
        """
        digest = hashlib.sha256()
        for number, row in enumerate(self.image_order.tolist()):
            digest.update(repr((self._digests[row], self.own_texts(number))).encode())
        if self.rows.format["type"] == "custom":
            digest.update(self.rows._fingerprint.encode())
        return digest.hexdigest()

    @property
    def identity(self) -> str:
        """Changes with what a run trains or ranks: images, captions, galleries and identities.

        Unlike `fingerprint` it leaves out a transform, whose name may change from process to
        process.
        """
        digest, numbers = hashlib.sha256(), dict[int, int]()
        for number, row in enumerate(self.image_order.tolist()):
            own = self.own_texts(number)
            shared = numbers.setdefault(int(self.image_ids[row]), len(numbers))
            digest.update(repr((self._digests[row], own, shared)).encode())
        galleries = identity_codes(self.gallery[self.image_order].tolist())
        digest.update(repr(galleries.tolist()).encode())
        if self.negatives is not None:
            digest.update(repr(self.negatives.numbers).encode())
        return digest.hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the captions of an epoch; accelerate's data loaders call it."""
        self._epoch.fill_(epoch)

    def images(self) -> Dataset:
        """Every image once, as rows `{"image": PIL image}`."""
        return self._images

    def captions(self) -> Dataset:
        """Every caption once, as rows `{"caption": str}`."""
        return _Captions(self._texts)

    def in_order(self) -> tuple[Dataset, Dataset]:
        """Images and captions in canonical order: what is computed in it is equal to the bit."""
        images, captions = self.image_order.tolist(), self.caption_order.tolist()
        return Subset(self.images(), images), Subset(self.captions(), captions)

    @property
    def ordered_text_to_image(self) -> Tensor:
        """(captions,) place of the image each caption belongs to, both in canonical order."""
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self._counts))

    def part(self, rows: Sequence[int]) -> ImageTextDataset:
        """Some images with all their captions."""
        return ImageTextDataset(self.rows.select(rows), self.seed)

    def sample(self, images: int) -> ImageTextDataset:
        """Fixed random subset of `images` images with all their captions; this split if smaller."""
        return self if images >= len(self) else self.part(self._drawn(images))

    def _drawn(self, images: int) -> list[int]:
        """At random: even steps through rows in which styles take turns may meet one style only."""
        chosen = random.Random(0).sample(range(len(self)), images)
        return sorted(self.image_order[chosen].tolist())

    def probe(self, size: int) -> Dataset:
        """The first `size` images and their first captions in canonical order, in every epoch."""
        images, captions = self.in_order()
        starts = self._starts[:size]
        return _Pairs(Subset(images, range(len(starts))), Subset(captions, starts))

    def own_texts(self, number: int) -> list[str]:
        """Captions of the image of this number, in canonical order."""
        start = self._starts[number]
        order = self.caption_order[start : start + self._counts[number]].tolist()
        return [self._texts[caption] for caption in order]

    def _order_captions(self, counts: Tensor) -> Tensor:
        """Image by image, the captions of one image by their digests: their order says nothing."""
        first = (counts.cumsum(0) - counts).tolist()
        order: list[int] = []
        for image in self.image_order.tolist():
            own = range(first[image], first[image] + int(counts[image]))
            order.extend(sorted(own, key=lambda row: content_digest(self._texts[row])))
        return torch.tensor(order)

    def _choice(self, number: int) -> int:
        """Which caption in canonical order the pair of this number has."""
        digest = self._digests[int(self.image_order[number])]
        key = f"{self.seed}/{self.epoch}/{digest}".encode()
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
        return self._starts[number] + drawn % self._counts[number]
