"""The archive: a trained hypernetwork as one safetensors file with JSON metadata.

Tensors: transforms, normaliser moments and counts, log step sizes. Metadata (the string under "mendkit"): format,
hyperparameters, base model (name, class, sites with shapes, SHA-256 of the edited weights, tokenizer hash), sign, loss
reduction, training summary, SHA-256 of every tensor. Written to a temporary file and renamed. Another base model than
the one it was trained for is refused (CORRECTNESS rows 3, 23, 24).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .errors import ArchiveError, HyperParamError
from .files import Kind, checked_tensor, matching_base, read_metadata, save_tensors
from .hparams import MENDHyperParams
from .mend import MEND
from .models import BaseModel, model_fingerprint

ARCHIVE = Kind(
    format="mendkit-1",
    noun="archive",
    made="trained",
    if_missing="train one with `archive: null`, or correct `archive:`",
    if_pickle="import it first: `python -m mendkit import`",
    if_another_model="load the model it was trained for, or set `archive: null` and train one for this model",
)
LOSS_REDUCTION = {
    "edit": "mean over an edit's target tokens, sum over edits",
    "sum": "sum over an edit's target tokens, and over edits",
    "batch": "mean over the target tokens of all edits made at once",
}


@dataclass(frozen=True)
class Archive:
    """A loaded archive: the hypernetwork on the base model it belongs to, and its metadata."""

    path: Path
    base: BaseModel
    mend: MEND
    metadata: Mapping[str, Any]

    def sha256(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def save_archive(
    path: str | Path, base: BaseModel, mend: MEND, /, *, training: Mapping[str, Any] | None = None
) -> Path:
    """Write an archive atomically: the file is whole or not there. `training` is the summary kept in the metadata."""
    metadata = {
        "hparams": mend.hparams.replace(archive=None).to_dict(),
        "base_model": model_fingerprint(base),
        "update_sign": mend.hparams.update_sign,
        "loss_reduction": LOSS_REDUCTION[mend.hparams.loss_reduction],
        "edit_lr": mend.edit_lrs,
        "training": dict(training or {}),
    }
    return save_tensors(ARCHIVE, path, mend.state_dict(), metadata)


def inspect_archive(path: str | Path) -> dict[str, Any]:
    """An archive's metadata, with the shapes of its tensors under "tensors". Reads no tensor data.

    Raises ArchiveError if the file is missing, damaged, or no archive of this kit.
    """
    return read_metadata(ARCHIVE, Path(path))


def load_archive(path: str | Path, *, base: BaseModel) -> Archive:
    """Load a hypernetwork for `base`. Raises ArchiveError naming what differs if it was trained for another model,
    or which tensor is damaged.

    The archive decides the edit sites: the returned `Archive.base` shares the given model.
    """
    metadata = inspect_archive(path)
    try:
        hparams = MENDHyperParams(**_tuples(metadata["hparams"]))
        checked = matching_base(ARCHIVE, path, base, metadata["base_model"])
    except (KeyError, TypeError, HyperParamError) as error:
        raise ArchiveError(f"{path}: damaged metadata: {error!r}") from None
    mend = MEND(checked.sites, hparams)
    _fill(mend, Path(path), metadata)
    return Archive(Path(path), checked, mend.to(base.device).eval(), metadata)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _fill(mend: MEND, path: Path, metadata: Mapping[str, Any]) -> None:
    expected = mend.state_dict()
    sums = metadata.get("sha256", {})
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        if "edit_lr_unit" not in names:  # written by the first version: all are 1
            del expected["edit_lr_unit"]
        if names != set(expected):
            odd = sorted(names ^ set(expected))
            raise ArchiveError(f"{path}: damaged: tensors missing or unknown: {', '.join(odd[:3])}")
        for name, value in expected.items():
            tensor = checked_tensor(file, path, name, sums)
            if tensor.shape != value.shape or tensor.dtype != value.dtype:
                raise ArchiveError(f"{path}: damaged: tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
            value.copy_(tensor)
