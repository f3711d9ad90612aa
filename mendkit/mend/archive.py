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

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import ArchiveError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.fingerprint import model_fingerprint
from .files import Kind, checked_tensor, damage_named, matching_base, read_metadata, save_tensors
from .hypernetwork import MEND

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
    with damage_named(path, "metadata"):
        hparams = MENDHyperParams(**_tuples(metadata["hparams"]))
        checked = matching_base(ARCHIVE, path, base, metadata["base_model"])
    if hparams.n_hidden >= len(metadata["tensors"]):
        raise ArchiveError(
            f"{path}: damaged metadata: n_hidden is {hparams.n_hidden}, more than there are tensors"
        )
    with torch.device("meta"):  # nothing is allocated before the file has shown what it holds
        mend = MEND(checked.sites, hparams)
    with damage_named(path):
        mend.load_state_dict(_tensors(mend, Path(path), metadata), assign=True)
    return Archive(Path(path), checked, mend.to(base.device).eval(), metadata)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _tensors(mend: MEND, path: Path, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The file's tensors. Raises ArchiveError if they are not those of `mend`, or damaged."""
    expected, values = mend.state_dict(), {}
    if "edit_lr_unit" not in {
        *metadata["tensors"],
        *metadata.get("sha256", ()),
    }:  # written by the first version: all are 1
        values["edit_lr_unit"] = torch.ones(expected.pop("edit_lr_unit").shape)
    odd = sorted(set(metadata["tensors"]) ^ set(expected))
    if odd:
        raise ArchiveError(f"{path}: damaged: tensors missing or unknown: {', '.join(odd[:3])}")
    with safe_open(path, "pt") as file:
        for name, value in expected.items():
            values[name] = tensor = checked_tensor(file, path, name, metadata["sha256"])
            if tensor.shape != value.shape or tensor.dtype != value.dtype:
                raise ArchiveError(
                    f"{path}: damaged: tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
    return values
