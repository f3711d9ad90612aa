"""The page of an archive on the hub, made of what the archive says of itself, and its upload."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import MendkitError
from ..evaluation.results import Summary
from ..hparams import MENDHyperParams
from ..runs import ARCHIVE_FILE
from .report import render

TRAINING = ("best", "examples", "texts_sha256", "continued_from", "commit", "versions")


def card(
    metadata: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    repo: str,
    base_model: str | None = None,
    licence: str | None = None,
) -> str:
    """A README.md in Markdown.

    `metadata` are the archive's, `results` flat ones of its scores, `base_model` is a hub id.
    """
    name, training = metadata["base_model"]["name"], metadata["training"]
    settings = metadata["hparams"] | {"model_name": name}
    defaults = MENDHyperParams(model_name=name).to_dict() | {"model_name": None}
    changed = {key: value for key, value in settings.items() if value != defaults.get(key)}
    header = {"base_model": base_model, "license": licence, "library_name": "mendkit"}
    header = {key: value for key, value in header.items() if value}
    return render(
        "card.md.j2",
        about=metadata,
        base=metadata["base_model"],
        training={key: training.get(key) for key in TRAINING},
        header=yaml.safe_dump({**header, "tags": ["model-editing", "mend"]}),
        settings=yaml.safe_dump(changed),
        scores=Summary.from_dict(results),
        repo=repo,
        licence=licence,
    )


def upload(archive: Path, text: str, repo: str, *, private: bool) -> str:
    """Upload an archive and its card `text` in one commit; returns the address.

    Raises MendkitError naming what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files: dict[str, Path | bytes] = {ARCHIVE_FILE: archive, "README.md": text.encode()}
    added = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        api = HfApi()
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.create_commit(repo, added, commit_message="Upload an archive of mendkit")
    except Exception as error:  # the hub's client has many
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MendkitError(
            f"cannot push to {repo}: {reason}; log in with `hf auth login`, and check name and "
            "network"
        ) from None
    return address
