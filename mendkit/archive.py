"""The archive: a trained hypernetwork as one safetensors file with JSON metadata.

Tensors: transforms, normaliser moments and counts, log step sizes. Metadata (the string under "mendkit"): format,
hyperparameters, base model (name, class, sites with shapes, SHA-256 of the edited weights, tokenizer hash), sign, loss
reduction, training summary, SHA-256 of every tensor. Written to a temporary file and renamed. Another base model than
the one it was trained for is refused (CORRECTNESS rows 3, 23, 24).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import ArchiveError, HyperParamError
from .hparams import MENDHyperParams
from .mend import MEND
from .models import BaseModel, model_fingerprint
from .runs import atomically

FORMAT = "mendkit-1"
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


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_archive(
    path: str | Path, base: BaseModel, mend: MEND, /, *, training: Mapping[str, Any] | None = None
) -> Path:
    """Write an archive atomically: the file is whole or not there. `training` is the summary kept in the metadata."""
    path = Path(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in mend.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "hparams": mend.hparams.replace(archive=None).to_dict(),
        "base_model": model_fingerprint(base),
        "update_sign": mend.hparams.update_sign,
        "loss_reduction": LOSS_REDUCTION[mend.hparams.loss_reduction],
        "edit_lr": mend.edit_lrs,
        "training": dict(training or {}),
        "sha256": {name: tensor_sha256(tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(metadata, sort_keys=True)
    return atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"mendkit": text}))


def inspect_archive(path: str | Path) -> dict[str, Any]:
    """An archive's metadata, with the shapes of its tensors under "tensors". Reads no tensor data.

    Raises ArchiveError if the file is missing, damaged, or no archive of this kit.
    """
    path = Path(path)
    if not path.is_file():
        raise ArchiveError(f"{path}: no such archive; train one with `archive: null`, or correct `archive:`")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("mendkit")
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        pickled = path.is_file() and path.read_bytes()[:2] == b"PK"
        hint = "import it first: `python -m mendkit import`" if pickled else "is it a whole safetensors file?"
        raise ArchiveError(f"{path}: not a readable archive ({error}); {hint}") from None
    if text is None:
        raise ArchiveError(f"{path}: a safetensors file, but not an archive of mendkit (no metadata)")
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArchiveError(f"{path}: damaged metadata: {error}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ArchiveError(f"{path}: unknown format; this version reads {FORMAT}")
    return metadata | {"tensors": shapes}


def load_archive(path: str | Path, *, base: BaseModel) -> Archive:
    """Load a hypernetwork for `base`. Raises ArchiveError naming what differs if it was trained for another model,
    or which tensor is damaged.

    The archive decides the edit sites: the returned `Archive.base` shares the given model.
    """
    metadata = inspect_archive(path)
    try:
        hparams = MENDHyperParams(**_tuples(metadata["hparams"]))
        sites = metadata["base_model"]["sites"]
        checked = base.with_sites(tuple(site["name"] for site in sites))
    except (KeyError, TypeError, HyperParamError) as error:
        raise ArchiveError(f"{path}: damaged metadata: {error!r}") from None
    except ValueError as error:
        raise ArchiveError(f"{path}: trained for another model than {base.name}: {error}; {_REMEDY}") from None
    differences = _differences(metadata["base_model"], model_fingerprint(checked))
    if differences:
        raise ArchiveError(f"{path}: trained for another model: {'; '.join(differences)}; {_REMEDY}")
    mend = MEND(checked.sites, hparams)
    _fill(mend, Path(path), metadata)
    return Archive(Path(path), checked, mend.to(base.device).eval(), metadata)


_REMEDY = "load the model it was trained for, or set `archive: null` and train one for this model"


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What tells two base models apart, in words; the name alone does not."""
    out = []
    if theirs.get("class") != ours["class"]:
        out.append(f"class {theirs.get('class')}, here {ours['class']}")
    for a, b in zip(theirs.get("sites", []), ours["sites"], strict=False):
        if a != b:
            shapes = {k: (a.get(k), b.get(k)) for k in b if a.get(k) != b.get(k)}
            out.append(f"site {a.get('name')}: " + ", ".join(f"{k} {x}, here {y}" for k, (x, y) in shapes.items()))
    if not out and theirs.get("sites_sha256") != ours["sites_sha256"]:
        out.append("the edited layers have other weights (another checkpoint, or a model already edited)")
    if theirs.get("tokenizer_sha256") != ours["tokenizer_sha256"]:
        out.append("another tokenizer")
    return out


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
            tensor = file.get_tensor(name)
            if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor_sha256(tensor) != sums.get(name):
                raise ArchiveError(f"{path}: damaged: tensor {name} does not match its checksum; restore or retrain it")
            value.copy_(tensor)
