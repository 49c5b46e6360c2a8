"""A Pico model as files: loading with checks before anything is built, saving, the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pico_hf.configuration_pico import PicoConfig
from pico_hf.encoders.check import load_encoder
from pico_hf.hub.adapter_files import has_adapter
from pico_hf.hub.adapter_loading import merge_adapter
from pico_hf.hub.errors import plain_errors
from pico_hf.hub.files import NoSafetensorsError, converted_revision
from pico_hf.hub.prototype_files import PicoPrototypes
from pico_hf.hub.remote_code import write_modules
from pico_hf.hub.source import check_source, safe_options, split_config_kwargs

SHARED_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
HUB_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "revision",
    "create_pr",
    "tags",
)
# Names in early checkpoints, in which the scale and the bias were no module's but the model's own.
RENAMED = {f"^{name}$": f"pair_logits.{name}" for name in ("logit_scale", "logit_bias")}

_ADAPTER: dict[str, Any] = {}  # stands for the configuration of weights that need a base


class StoredPicoModel(PreTrainedModel):
    """The part of [`PicoModel`] that reads and writes folders and Hub repositories."""

    config: PicoConfig
    config_class = PicoConfig
    encoder: PreTrainedModel
    prototypes: PicoPrototypes

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        prototypes: str | os.PathLike | PicoPrototypes | None = None,
        base: str | os.PathLike | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> StoredPicoModel:
        """Loads a Pico model, or loads any other dual encoder and wraps it, or merges an adapter.

        The stock method would build a *randomly initialised* encoder from a plain CLIP repository
        without saying so. Weights are read as safetensors only, and are checked before. Of a
        repository with pickle files only, the conversion that the Hub's bot proposes is read. Of a
        LoRA adapter that [`PicoTrainer`] saved, a plain model with the adapter merged is made;
        `pico_hf.load_adapter_model` keeps the two apart.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository.
            args: See `PreTrainedModel.from_pretrained`.
            prototypes: Prototypes saved alone for this very encoder: a folder, a Hub repository or
                the live object. A Hub `token` is used for both repositories, a `revision` is not.
            base: For an adapter: what it was trained on, a folder, a Hub repository or a live
                model; None takes the one that the adapter names.
            kwargs: See `PreTrainedModel.from_pretrained`. Fields of [`PicoConfig`] and,
                for another dual encoder, `fallback_projection` may be given as well.

        Returns:
            The model in eval mode.

        Raises:
            OSError: If the path holds no model that may be read.
            ValueError: If a keyword is neither a loading option nor a field of [`PicoConfig`], if a
                file is damaged or hostile, if the checkpoint of another dual encoder lacks its
                projections, or if the prototypes do not fit the encoder.
        """
        path = _unwrap_auto(kwargs) or pretrained_model_name_or_path
        if prototypes is not None and not isinstance(prototypes, PicoPrototypes):
            shared = {key: kwargs[key] for key in SHARED_HUB_OPTIONS if key in kwargs}
            prototypes = PicoPrototypes.from_pretrained(prototypes, **shared)
        source = {} if path is None else _checked(path, kwargs)
        foreign = source.get("model_type") not in (None, cls.config_class.model_type)
        if base is not None and source is not _ADAPTER:
            raise ValueError(f"`base` is for adapters, which '{path}' is not. Leave it out.")
        with plain_errors(path or ""):
            if source is _ADAPTER:
                model = merge_adapter(cls, path, base=base, **kwargs)
            elif foreign and kwargs.get("config") is None and not args:
                pico, rest = split_config_kwargs(kwargs)
                model = cls.from_encoder(load_encoder(path, source, **safe_options(rest)), **pico)
            else:
                kwargs.pop("fallback_projection", None)  # a saved Pico model knows what it has
                kwargs["key_mapping"] = {**RENAMED, **(kwargs.get("key_mapping") or {})}
                model = super().from_pretrained(path, *args, **safe_options(kwargs))
        if prototypes is not None:
            model.adopt_prototypes(prototypes)
        return model

    def adopt_prototypes(self, prototypes: PicoPrototypes) -> None:
        """Takes prototypes that were saved alone; the model is unchanged if they do not fit.

        Args:
            prototypes: Made for this very encoder.

        Raises:
            ValueError: If they have another number of columns or another encoder's fingerprint.
        """
        prototypes.check_fit(self.encoder, len(self.semantic_probability))
        prototypes.place_beside(self.encoder)
        for name, value in prototypes.knobs.items():
            setattr(self.config, name, value)
        wrapper: Any = self.prototypes
        if hasattr(wrapper, "modules_to_save"):  # an adapter's copy stands for them
            wrapper.modules_to_save[wrapper.active_adapters[0]] = prototypes.to(self.device)
        else:
            self.prototypes = prototypes.to(self.device)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves weights, prototypes and configuration under the names the live modules have.

        The original-format key names of some towers cannot be read back by
        `Trainer(resume_from_checkpoint=…)`, which loads with `strict=False` and would lose those
        weights in silence; so `save_original_format` is False here. After `register_for_auto_class`
        the folder holds the package's modules too.

        Args:
            save_directory: Folder, created if need be.
            push_to_hub: True uploads as well, to `repo_id` or the folder's name.
            kwargs: See `PreTrainedModel.save_pretrained`; with `push_to_hub` also its arguments.
        """
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if push_to_hub and key in kwargs}
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            self.save_prototypes(save_directory)
            if self._auto_class is not None:
                write_modules(save_directory)
        if push_to_hub:  # only now: the stock method would upload before these files are written
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def save_prototypes(self, save_directory: str | os.PathLike) -> None:
        """Writes the prototypes' own files, with this encoder's fingerprint.

        Args:
            save_directory: Folder, created if need be.
        """
        self.prototypes.place_beside(self.encoder)  # a pickled copy has forgotten
        self.prototypes.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` writes; see `PreTrainedModel.push_to_hub`."""
        kwargs.setdefault("tags", ["pico", "image-text-retrieval", "late-interaction"])
        with plain_errors(repo_id):
            return super().push_to_hub(repo_id, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """From now on saves the package's modules with the model.

        Whoever has not installed the package loads such a repository by
        `AutoModel.from_pretrained(repository, trust_remote_code=True)`; the configuration is
        registered too, since their `AutoConfig` does not know it either.

        Args:
            auto_class: The Auto class that loads the model.
        """
        super().register_for_auto_class(auto_class)
        cls.config_class.register_for_auto_class()


def _unwrap_auto(options: dict[str, Any]) -> str | None:
    """The adapter that `AutoModel` was asked for, which it hands on as an option of its base.

    Stock code would put it onto a base whose weights it reads under other names, at random then.
    """
    adapter = options.get("adapter_kwargs") or {}
    path = adapter.get("_adapter_model_path")
    if path is not None:
        for name in ("adapter_kwargs", "config", "_from_auto", "revision"):
            options.pop(name, None)
        options |= {key: adapter[key] for key in ("revision", "token") if adapter.get(key)}
    return path


def _checked(path: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """The raw configuration; `revision` moves to the bot's conversion if that is all there is."""
    try:
        source = check_source(path, options)
        if source.get("model_type") == PicoConfig.model_type and has_adapter(path, options):
            raise ValueError(  # transformers would put the one onto the other: twice, if merged
                f"'{os.fspath(path)}' holds a whole model and an adapter as well. Keep them in "
                "folders of their own."
            )
        return source
    except NoSafetensorsError:
        if has_adapter(path, options):
            return _ADAPTER
        revision = converted_revision(path, options)
        if revision is None:
            raise
        options["revision"] = revision
        return check_source(path, options)
