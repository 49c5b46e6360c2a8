"""Prototypes as two files in a folder or Hub repository, without their encoder."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import PushToHubMixin

from pico_hf.configuration_pico import PROTOTYPE_FIELDS, PicoConfig
from pico_hf.core.prototypes import StylePrototypes, ask_again
from pico_hf.core.state import SOURCES
from pico_hf.encoders.projection_modules import embedding_dim, projection_parameters
from pico_hf.hub.errors import plain_errors
from pico_hf.hub.files import find_file, read_json, refuse_pickle
from pico_hf.hub.fingerprint import encoder_fingerprint
from pico_hf.hub.permissions import ordinary_permissions
from pico_hf.hub.prototype_checks import FACTS_FILE, WEIGHTS_FILE, check_buffers, checked_fields
from pico_hf.hub.tensors import checked_tensors


def _fingerprint(encoder: PreTrainedModel) -> dict[str, str]:
    return encoder_fingerprint(encoder, projection_parameters(encoder))


class _EncoderLink:
    """A weak reference to the encoder of some prototypes; it is neither state nor saved."""

    def __init__(self, encoder: PreTrainedModel | None = None) -> None:
        self._reference = weakref.ref(encoder) if encoder is not None else lambda: None

    @property
    def encoder(self) -> PreTrainedModel | None:
        return self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> _EncoderLink:
        """Refers to the copied encoder if the model is copied, else to the same encoder."""
        encoder = self.encoder
        return _EncoderLink(memo.get(id(encoder), encoder))

    def __reduce__(self) -> tuple[type[_EncoderLink], tuple[()]]:
        return _EncoderLink, ()


class PicoPrototypes(StylePrototypes, PushToHubMixin):
    """Prototypes that can be saved, loaded and pushed to the Hub without their encoder.

    A model's own prototypes are part of its `model.safetensors`; the files written here hand them
    to somebody who has the encoder already. `prototypes.safetensors` has the buffers,
    `prototypes.json` says what they are: D, K, R, estimators, τ, the package's version and the
    encoder's fingerprint.

    Args:
        num_columns: D.
        num_prototypes: K, from 1 to D.
        probe_size: R, pairs of the probe set.
        estimators: See [`PicoConfig`].
        feedback_temperature: τ, in rSum points.

    Raises:
        ValueError: If `num_prototypes` is not in [1, D].
    """

    # What is loaded in fp32 whatever the model's type; counts and flags keep their own types.
    exact_buffers = tuple(
        f"prototypes.{name}"
        for name, value in StylePrototypes(2, 1, 2).named_buffers()
        if value.is_floating_point()
    )

    def __init__(
        self,
        num_columns: int,
        num_prototypes: int,
        probe_size: int,
        *,
        estimators: Collection[str] = tuple(SOURCES),
        feedback_temperature: float = 5.0,
    ) -> None:
        super().__init__(
            num_columns,
            num_prototypes,
            probe_size,
            estimators=estimators,
            feedback_temperature=feedback_temperature,
        )
        self.fingerprint: dict[str, str] | None = None
        self._link = _EncoderLink()

    @classmethod
    def for_config(cls, config: PicoConfig, encoder: PreTrainedModel) -> PicoPrototypes:
        """Makes the prototypes that a model's configuration describes.

        Args:
            config: The model's configuration.
            encoder: The model's encoder, whose columns they weigh.
        """
        fields = {name: getattr(config, name) for name in PROTOTYPE_FIELDS}
        prototypes = cls(embedding_dim(encoder), **fields)
        prototypes.place_beside(encoder)
        return prototypes

    def init_buffers(self) -> None:
        """Sets every buffer that was not loaded to what new prototypes have."""
        first = {"ones": init.ones_, "eye": init.eye_}
        for name, buffer in self.declared().items():
            first.get(buffer.start, init.zeros_)(getattr(self, name))
        init.zeros_(self.evaluated)
        ask_again(self)

    def place_beside(self, encoder: PreTrainedModel) -> None:
        """Remembers the encoder whose columns these prototypes weigh."""
        self._link = _EncoderLink(encoder)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes `prototypes.safetensors` and `prototypes.json`; other files stay as they are.

        Args:
            save_directory: Folder, created if need be.
            kwargs: Ignored (`push_to_hub` of transformers hands over options for models).

        Raises:
            ValueError: If it is not known which encoder the prototypes belong to.
        """
        facts = self._facts()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        buffers = {name: value.contiguous() for name, value in self.named_buffers()}
        save_file(buffers, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
        (folder / FACTS_FILE).write_text(text, encoding="utf-8")
        ordinary_permissions(folder, WEIGHTS_FILE)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads the two files and a card; see `PreTrainedModel.push_to_hub` for the arguments."""
        kwargs.setdefault("tags", ["pico", "prototypes"])
        with plain_errors(repo_id):
            return super().push_to_hub(repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> PicoPrototypes:
        """Loads prototypes that were saved or pushed, alone or with a model.

        Args:
            path: Folder or Hub repository.
            options: Hub options such as `revision`, `token` or `local_files_only`.

        Raises:
            OSError: If there are no such files, or no access to them.
            ValueError: If the files do not hold prototypes.
        """
        facts_file = _required(path, FACTS_FILE, options)
        weights = _required(path, WEIGHTS_FILE, options)
        return cls._build(read_json(facts_file), dict(checked_tensors(weights)))

    @property
    def num_prototypes(self) -> int:
        """K, per modality."""
        return self.sizes.prototypes

    @property
    def probe_size(self) -> int:
        """R, pairs of the probe set."""
        return self.sizes.instances

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of [`PicoConfig`] as these prototypes have them."""
        return {name: getattr(self, name) for name in PROTOTYPE_FIELDS}

    def check_fit(self, encoder: PreTrainedModel, num_columns: int) -> None:
        """Raises ValueError unless the encoder's columns are those the prototypes were made for.

        Args:
            encoder: The encoder to be used with them.
            num_columns: Its D.
        """
        own = len(self.semantic_probability)
        if own != num_columns:
            raise ValueError(
                f"The prototypes have {own} columns, the encoder has {num_columns}. Load them with "
                "the encoder they were made for."
            )
        saved, live = self.fingerprint or {}, _fingerprint(encoder)
        if not saved.keys() & live.keys():
            raise ValueError(
                f"The prototypes' fingerprint was taken in {' and '.join(saved) or 'no type'}, the "
                f"encoder is in {' and '.join(live)}: load the encoder in float32 to compare them."
            )
        if not saved.items() & live.items():
            raise ValueError(
                "The prototypes were made for another encoder: the fingerprint of its projections "
                "differs, so their columns mean something else. Load them with that encoder, or "
                "refine new ones."
            )

    def _facts(self) -> dict[str, Any]:
        encoder = self._link.encoder
        fingerprint = self.fingerprint if encoder is None else _fingerprint(encoder)
        if fingerprint is None:
            raise ValueError(
                "These prototypes do not know their encoder, so nobody could check that they fit. "
                "Call `prototypes.place_beside(encoder)` before saving them."
            )
        return {
            **self.config_fields,
            "num_columns": len(self.semantic_probability),
            "encoder_fingerprint": fingerprint,
            "pico_hf_version": _package_version(),
        }

    @classmethod
    def _build(cls, facts: dict[str, Any], buffers: dict[str, Tensor]) -> PicoPrototypes:
        fields = checked_fields(facts)
        check_buffers(facts, buffers)  # before anything of these sizes is made
        prototypes = cls(facts["num_columns"], **fields)
        prototypes.load_state_dict(buffers)
        prototypes.fingerprint = dict(facts["encoder_fingerprint"])
        return prototypes


def _required(path: str | os.PathLike, name: str, options: dict[str, Any]) -> Path:
    return find_file(path, name, options, required=True) or refuse_pickle(path, name)


def _package_version() -> str | None:
    try:
        return version("pico-hf")
    except PackageNotFoundError:  # the modules were taken from a repository or a source folder
        return None


def save_prototypes(model: Any, folder: str | os.PathLike) -> None:
    """Writes the files of a model's prototypes, with its encoder's fingerprint.

    Args:
        model: A [`PicoModel`].
        folder: Created if need be.
    """
    model.prototypes.place_beside(model.encoder)  # a pickled copy has forgotten
    model.prototypes.save_pretrained(folder)
