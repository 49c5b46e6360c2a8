"""`pico-hf push`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from pico_hf.cli.answers import Answer, Failed

PANEL = "Models"
# A list of what goes, not of what stays: a run's folder also holds optimizer and pickled arguments.
PUBLISHED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.py", "*.md", "*.txt")
ALSO = ("*.model", "*.jinja", "plots/*.png", "plots/*.svg", "LICENSE*")
PRIVATE = ("trainer_state.json", "pico_checkpoint.json", "checkpoint-*/*", "_*", "_*/*", ".*")


def command(
    folder: Annotated[str, typer.Argument(help="Folder of a model or adapter.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hub; made if need be.")],
    private: Annotated[
        bool, typer.Option("--private", help="A new repository can be seen by its owner only.")
    ] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload model",
    revision: Annotated[str | None, typer.Option(help="Branch; default: main.")] = None,
    space: Annotated[
        bool, typer.Option("--space", help="Make a Space of the demo page with this model instead.")
    ] = False,
    images: Annotated[
        str | None,
        typer.Option(
            help="For --space: folder or table of its images; default: the embedded drawings."
        ),
    ] = None,
) -> Answer:
    """Upload a model, its processor, model card and plots to the Hub.

    pico-hf push outputs/mine me/my-model --private

    Of a run's folder the checkpoints, the optimizer and the pickled arguments stay here. The token
    is that of `hf auth login` or HF_TOKEN. A Space holds the model, its images and the code of the
    page.
    """
    from pico_hf.cards.redaction import is_hub_id

    path = Path(folder)
    if not path.is_dir():
        raise Failed(f"{folder!r} is no folder. Name the one that `pico-hf train` has written.")
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise Failed(f"{folder!r} holds no model: config.json and safetensors are needed.")
    if not is_hub_id(repository) or "/" not in repository:
        raise Failed(f"`repository` must be owner/name, got {repository!r}.")
    if images is not None and not space:
        raise Failed("`--images` is for --space: a model has no images.")
    options = {"commit_message": message, "revision": revision}
    if not space:
        patterns = {"allow_patterns": [*PUBLISHED, *ALSO], "ignore_patterns": list(PRIVATE)}
        return _upload(path, repository, private, options | patterns)
    with tempfile.TemporaryDirectory() as made:
        _make_space(Path(made), path, repository, images)
        kind = {"repo_type": "space"}
        return _upload(Path(made), repository, private, options | kind, {"space_sdk": "gradio"})


def _upload(
    path: Path,
    repository: str,
    private: bool,
    options: dict[str, Any],
    creation: dict[str, Any] | None = None,
) -> Answer:
    from huggingface_hub import HfApi

    from pico_hf.hub.errors import plain_errors

    api, made = HfApi(), dict(creation or {})
    made |= {key: own for key, own in options.items() if key == "repo_type"}
    with plain_errors(repository):
        address = api.create_repo(repository, private=private, exist_ok=True, **made)
        commit = api.upload_folder(repo_id=repository, folder_path=path, **options)
    values = {"repository": repository, "url": str(address), "commit": commit.oid}
    return Answer(values, [f"Uploaded to {address}"])


def _make_space(folder: Path, model: Path, repository: str, images: str | None) -> None:
    from huggingface_hub.utils import filter_repo_objects

    from pico_hf.demo.embedded import embedded_images
    from pico_hf.demo.space import write_space

    source = embedded_images() if images is None else Path(images)
    if source is None or not source.exists():
        raise Failed(
            "A Space needs images: name a folder or a table by --images"
            f"{f', got {images!r}, which is not there' if images else ''}."
        )
    if (source / "index.json").is_file():
        raise Failed(f"`--images` must be a folder or a table, got the index {images!r}.")
    _check_classes(model)
    names = sorted(p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file())
    rules = {"allow_patterns": [*PUBLISHED, *ALSO], "ignore_patterns": list(PRIVATE)}
    write_space(
        folder, model, filter_repo_objects(names, **rules), source, repository.rpartition("/")[2]
    )


def _check_classes(model: Path) -> None:
    """A Space has the classes of transformers and of this package, and no other code."""
    from pico_hf.modeling_pico import PicoModel

    loaded: Any = PicoModel.from_pretrained(model)
    origin = type(loaded.encoder).__module__
    if origin.partition(".")[0] not in ("transformers", "pico_hf"):
        raise Failed(
            f"The encoder's class is code of your own ({origin}), which a Space would not have. "
            "Add that module to a Space of your own; `pico_hf.demo.page` builds the page."
        )
