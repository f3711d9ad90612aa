"""The archive: a trained hypernetwork as one file (files.py).

Tensors: transforms, statistics of the normaliser, log step sizes.
Metadata: hyperparameters, base model, sign of the update, step sizes, training summary, SHA-256.
An archive is refused on another base model than its own (CORRECTNESS rows 3, 23, 24).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArchiveError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.fingerprint import model_fingerprint
from ..runs import archive_file
from .files import Kind, damage_named, matching_base, read_metadata, read_tensors, save_tensors
from .hypernetwork import MEND

ARCHIVE = Kind(
    format="mendkit-2",
    noun="archive",
    made="trained",
    if_missing="train one with `archive: null`, or correct `archive:`",
    if_another_model="load the model it was trained for, or set `archive: null` and train one",
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
    base: BaseModel = field(repr=False)
    mend: MEND = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)


def save_archive(
    path: str | Path, base: BaseModel, mend: MEND, *, training: Mapping[str, Any] | None = None
) -> Path:
    """Write an archive; `training` is its summary. Raises as `save_tensors`."""
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
    """An archive's metadata, with the shapes of its tensors under "tensors".

    Raises ArchiveError if the file is missing, damaged, or no archive of this kit.
    """
    return read_metadata(ARCHIVE, path)


def load_archive(path: str | Path, *, base: BaseModel) -> Archive:
    """Load a hypernetwork for `base`; the archive decides the edit sites of `Archive.base`.

    Raises ArchiveError if it is missing, damaged, or of another model, naming what differs.
    """
    metadata, tensors = read_tensors(ARCHIVE, path)
    with damage_named(path, "metadata"):
        hparams = _hparams(metadata["hparams"])
        checked = matching_base(ARCHIVE, path, base, metadata["base_model"])
    if hparams.n_hidden >= len(tensors):
        raise ArchiveError(
            f"{path}: damaged metadata: n_hidden is {hparams.n_hidden}, with {len(tensors)} tensors"
        )
    # nothing is allocated before the file has shown what it holds
    with torch.device("meta"):
        mend = MEND(checked.sites, hparams)
    if metadata["format"] in ARCHIVE.old_formats:
        # the very first archives have no units: all are 1
        tensors.setdefault("edit_lr_unit", torch.ones(len(checked.sites)))
    _check_tensors(path, mend, tensors)
    with damage_named(path):
        mend.load_state_dict(tensors, assign=True)
    return Archive(archive_file(path), checked, mend.to(base.device).eval(), metadata)


def _hparams(values: Mapping[str, Any]) -> MENDHyperParams:
    """The settings, whose tuples JSON wrote as lists."""
    settings = {}
    for key, value in values.items():
        settings[key] = tuple(value) if isinstance(value, list) else value
    return MENDHyperParams(**settings)


def _check_tensors(path: str | Path, mend: MEND, tensors: Mapping[str, Tensor]) -> None:
    """Raises ArchiveError if the tensors are not those of `mend`."""
    expected = mend.state_dict()
    odd = sorted(set(tensors) ^ set(expected))
    if odd:
        raise ArchiveError(f"{path}: damaged: tensors missing or unknown: {', '.join(odd[:3])}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ArchiveError(
                f"{path}: damaged: tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
