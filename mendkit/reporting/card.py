"""The page of an archive on the hub, made of what the archive says of itself, and its upload."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import MendkitError, reason
from ..evaluation.results import Summary
from ..places import ARCHIVE_FILE
from .report import changed, render


def card(
    metadata: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    repo: str,
    base_model: str = "",
    licence: str | None = None,
) -> str:
    """A README.md in Markdown.

    `metadata` are the archive's, `results` flat ones of its scores.
    `base_model` is left out if it is no hub id.
    """
    model = {"model_name": metadata["base_model"]["name"]}
    header = {"library_name": "mendkit", "tags": ["model-editing", "mend"]}
    if "/" in base_model:  # a hub id
        header["base_model"] = base_model
    if licence:
        header["license"] = licence
    return render(
        "card.md.j2",
        about=metadata,
        header=yaml.safe_dump(header),
        settings=yaml.safe_dump(model | changed(metadata["hparams"] | model)),
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
        raise MendkitError(
            f"cannot push to {repo}: {reason(error)}; log in with `hf auth login`, and check "
            "name and network"
        ) from None
    return address
