"""`pico-hf push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
) -> Answer:
    """Upload a model, its processor, model card and plots to the Hub.

    Of a run's folder the checkpoints, the optimizer and the pickled arguments stay here. The token
    is that of `hf auth login` or HF_TOKEN.
    """
    from huggingface_hub import HfApi

    from pico_hf.cards.redaction import is_hub_id
    from pico_hf.hub.errors import plain_errors

    path = Path(folder)
    if not path.is_dir():
        raise Failed(f"{folder!r} is no folder. Name the one that `pico-hf train` has written.")
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise Failed(f"{folder!r} holds no model: config.json and safetensors are needed.")
    if not is_hub_id(repository) or "/" not in repository:
        raise Failed(f"`repository` must be owner/name, got {repository!r}.")
    api, patterns = HfApi(), [*PUBLISHED, *ALSO]
    with plain_errors(repository):
        address = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=path,
            commit_message=message,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(PRIVATE),
        )
    values = {"repository": repository, "url": str(address), "commit": commit.oid}
    return Answer(values, [f"Uploaded to {address}"])
