"""The kit's own files: safetensors with JSON metadata, tied to a base model.

A file is whole or not there (written to a temporary one and renamed), carries the SHA-256 of every tensor, and names
the base model it belongs to; another one is refused (CORRECTNESS rows 23, 24). The metadata have a checksum of their
own among them, which files of the first versions lack. A file is not trusted: what it declares is compared with what
it holds before anything is made from it, and what is wrong with it is told as one ArchiveError.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ArchiveError, MendkitError
from ..models.base import BaseModel
from ..models.fingerprint import model_fingerprint
from ..runs import DAMAGE, atomically

SEAL = "metadata_sha256"  # the key of the metadata's own checksum
SEALED = ", sealed"  # what the format is followed by where there is one


@dataclass(frozen=True)
class Kind:
    """A kind of file, in words for its errors; the last three say what to do."""

    format: str
    noun: str  # "archive"
    made: str  # "trained": how it came about from its base model
    if_missing: str
    if_pickle: str
    if_another_model: str


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_folder(path: str | Path) -> Path:
    """Make a folder if it is not there. Raises MendkitError if it cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MendkitError(f"cannot make the folder {path}: {error}; give another") from None
    return path


@contextmanager
def damage_named(path: str | Path, what: str = "") -> Iterator[None]:
    """Within the context whatever reading damaged content raises becomes one ArchiveError that names the file."""
    try:
        yield
    except ArchiveError:
        raise
    except DAMAGE as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise ArchiveError(
            f"{path}: damaged {what or 'file'}: {type(error).__name__}: {first}"
        ) from None


def save_tensors(
    kind: Kind, path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Path:
    """Write a file of this kind; its format and the tensors' checksums join the metadata.

    Raises ArchiveError for numbers that no reader would take, MendkitError if it cannot be written; what was there
    stays.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    odd = [name for name, value in tensors.items() if not is_finite(value)]
    if odd:
        raise ArchiveError(
            f"{path}: not written: {', '.join(odd[:3])} not finite; this {kind.noun} is of no use"
        )
    sums = {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
    told = {"format": kind.format + SEALED, **metadata, "sha256": sums}
    header = {"mendkit": json.dumps(told | {SEAL: _digest(told)}, sort_keys=True)}
    try:
        return atomically(
            Path(path), lambda temporary: save_file(tensors, temporary, metadata=header)
        )
    except (OSError, SafetensorError) as error:
        kept = "what was there is as it was" if Path(path).exists() else "nothing was left there"
        raise MendkitError(
            f"cannot write the {kind.noun} {path}: {error}; {kept}; make room there"
        ) from None


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of the tensor is NaN or infinite."""
    return bool(tensor.isfinite().all())


def read_metadata(kind: Kind, path: Path) -> dict[str, Any]:
    """A file's metadata, with the shapes of its tensors under "tensors". Reads no tensor data.

    Raises ArchiveError if the file is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise ArchiveError(f"{path}: no such {kind.noun}; {kind.if_missing}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        hint = kind.if_pickle if _begins(path, b"PK") else "is it a whole safetensors file?"
        raise ArchiveError(f"{path}: not a readable {kind.noun} ({error}); {hint}") from None
    if "mendkit" not in header:
        raise ArchiveError(
            f"{path}: a safetensors file, but no {kind.noun} of mendkit (no metadata)"
        )
    with damage_named(path, "metadata"):
        metadata = json.loads(header["mendkit"], object_pairs_hook=_each_once)
    if not isinstance(metadata, dict) or metadata.get("format") not in (
        kind.format,
        kind.format + SEALED,
    ):
        raise ArchiveError(f"{path}: unknown format; this version reads {kind.format}")
    seal = metadata.pop(SEAL, None)
    expected = None if metadata["format"] == kind.format else _digest(metadata)
    if set(header) > {"mendkit"} or seal != expected:
        raise ArchiveError(
            f"{path}: damaged metadata: they do not match their checksum; restore it or make it anew"
        )
    return metadata | {"format": kind.format, "tensors": shapes}


def _digest(metadata: Any) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def checked_tensor(file: Any, path: str | Path, name: str, sums: Mapping[str, str]) -> Tensor:
    """A copy of a tensor of an open safetensors file, which may change later.

    Raises ArchiveError if it does not match its checksum, or is not finite.
    """
    with damage_named(path, f"tensor {name}"):
        tensor = file.get_tensor(name).clone()
        matches, finite = tensor_sha256(tensor) == sums.get(name), is_finite(tensor)
    if not matches:
        raise ArchiveError(
            f"{path}: damaged: tensor {name} does not match its checksum; restore it or make it anew"
        )
    if not finite:
        raise ArchiveError(f"{path}: damaged: tensor {name} is not finite; make it anew")
    return tensor


def matching_base(
    kind: Kind, path: str | Path, base: BaseModel, theirs: Mapping[str, Any]
) -> BaseModel:
    """`base` with the sites of the file's base model, whose fingerprint is `theirs`.

    Raises ArchiveError naming what differs if it is another model.
    """
    names = tuple(site["name"] for site in theirs["sites"])
    try:
        checked = base.with_sites(names)
    except ValueError as error:
        raise ArchiveError(
            f"{path}: {kind.made} for another model than {base.name}: {error}; {kind.if_another_model}"
        ) from None
    differences = _differences(theirs, model_fingerprint(checked))
    if differences:
        raise ArchiveError(
            f"{path}: {kind.made} for another model: {'; '.join(differences)}; {kind.if_another_model}"
        )
    return checked


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What tells two base models apart, in words; the name alone does not."""
    out = []
    if theirs.get("class") != ours["class"]:
        out.append(f"class {theirs.get('class')}, here {ours['class']}")
    if len(theirs["sites"]) != len(ours["sites"]):
        out.append(f"{len(theirs['sites'])} sites, here {len(ours['sites'])}")
    for a, b in zip(theirs["sites"], ours["sites"], strict=False):
        if a != b:
            shapes = {k: (a.get(k), b.get(k)) for k in b if a.get(k) != b.get(k)}
            out.append(
                f"site {a.get('name')}: "
                + ", ".join(f"{k} {x}, here {y}" for k, (x, y) in shapes.items())
            )
    if not out and theirs.get("sites_sha256") != ours["sites_sha256"]:
        out.append(
            "the edited layers have other weights (another checkpoint, or a model already edited)"
        )
    if theirs.get("tokenizer_sha256") != ours["tokenizer_sha256"]:
        out.append("another tokenizer")
    return out
