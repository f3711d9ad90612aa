"""The kit's own files: safetensors with JSON metadata, tied to a base model.

A file is whole or not there. Its metadata name the base model: another one is refused (CORRECTNESS
rows 23, 24). Whatever is wrong becomes one ArchiveError, before anything is built. Files of the
first format are still read.
"""

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
from ..places import archive_file, archives_here
from ..runs import DAMAGE, atomically, sha256, user_path, without_repeats

CHECKSUM = "sha256"
OLD_SEAL = "metadata_sha256"  # the metadata's own checksum in the first format, where it has one


@dataclass(frozen=True)
class Kind:
    """A kind of file, in words for its errors; the last two say what to do."""

    format: str  # ends with the number of its version
    noun: str  # "archive"
    made: str  # "trained": how it came about from its base model
    if_missing: str
    if_another_model: str

    @property
    def old_formats(self) -> tuple[str, str]:
        """The first format, without and with a checksum of the metadata."""
        first = self.format[:-1] + "1"
        return first, f"{first}, sealed"


def content_sha256(metadata: Any, tensors: Mapping[str, Tensor]) -> str:
    """One SHA-256 over metadata and the name, dtype, shape and bytes of every tensor."""
    parts: list[str | memoryview] = [json.dumps(metadata, sort_keys=True)]
    for name in sorted(tensors):
        parts += [name, *_tensor_parts(tensors[name])]
    return sha256(*parts)


def old_checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The first format's checksums, one for each tensor."""
    return {name: sha256(*_tensor_parts(tensor)) for name, tensor in tensors.items()}


def _tensor_parts(tensor: Tensor) -> tuple[str, memoryview]:
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)}", values.numpy().data


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of the tensor is NaN or infinite."""
    return bool(tensor.isfinite().all())


def save_tensors(
    kind: Kind, path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Path:
    """Write a file of this kind; its format and checksum join the metadata.

    Raises ArchiveError for numbers that are not finite, MendkitError if it cannot be written: what
    was there stays.
    """
    path = user_path(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    odd = [name for name, value in tensors.items() if not is_finite(value)]
    if odd:
        raise ArchiveError(
            f"{path}: not written: {', '.join(odd[:3])} not finite; this {kind.noun} is unusable"
        )
    told = {"format": kind.format, **metadata}
    told[CHECKSUM] = content_sha256(told, tensors)
    header = {"mendkit": json.dumps(told, sort_keys=True)}
    try:
        return atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    except (OSError, SafetensorError) as error:
        kept = "what was there is as it was" if path.exists() else "nothing was left there"
        raise MendkitError(
            f"cannot write the {kind.noun} {path}: {error}; {kept}; make room there"
        ) from None


def read_tensors(kind: Kind, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's metadata, with the shapes of its tensors under "tensors", and its tensors.

    Raises ArchiveError if the file is missing, damaged or of another kind.
    """
    path = archive_file(path)
    if not path.is_file():
        found = "a folder without an archive" if path.is_dir() else f"no such {kind.noun}"
        there = archives_here() if kind.noun == "archive" else ""
        raise ArchiveError(f"{path}: {found}; {kind.if_missing}{there}")
    # 1. The container. Tensors are copied, for the file may change later.
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except DAMAGE as error:
        raise ArchiveError(
            f"{path}: not a readable {kind.noun} ({error}); is it a whole safetensors file? "
            "Import pickles of published code with `python -m mendkit import`"
        ) from None
    # 2. The metadata.
    if "mendkit" not in header:
        raise ArchiveError(f"{path}: a safetensors file, but no {kind.noun} of mendkit")
    with damage_named(path, "metadata"):
        metadata = json.loads(header["mendkit"], object_pairs_hook=without_repeats)
    known = (kind.format, kind.format[:-1] + "2", *kind.old_formats)
    if not isinstance(metadata, dict) or metadata.get("format") not in known:
        raise ArchiveError(f"{path}: unknown format; this version reads {kind.format}")
    # 3. The checksums.
    with damage_named(path):
        intact = set(header) == {"mendkit"} and _is_intact(kind, metadata, tensors)
    if not intact or not all(map(is_finite, tensors.values())):
        raise ArchiveError(
            f"{path}: damaged: it does not match its checksum, or is not finite; make it anew"
        )
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return metadata | {"tensors": shapes}, tensors


def _is_intact(kind: Kind, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    told = dict(metadata)
    if told["format"] not in kind.old_formats:
        return told.pop(CHECKSUM, None) == content_sha256(told, tensors)
    seal = told.pop(OLD_SEAL, None)
    is_sealed = told["format"] == kind.old_formats[1]
    expected = content_sha256(told, {}) if is_sealed else None
    return seal == expected and told.get(CHECKSUM) == old_checksums(tensors)


@contextmanager
def damage_named(path: str | Path, what: str = "file") -> Iterator[None]:
    """Whatever damaged content raises in here becomes an ArchiveError naming the file."""
    try:
        yield
    except ArchiveError:
        raise
    except DAMAGE as error:
        why = " ".join(str(error).split())[:200]
        raise ArchiveError(f"{path}: damaged {what}: {type(error).__name__}: {why}") from None


def matching_base(
    kind: Kind, path: str | Path, base: BaseModel, fingerprint: Mapping[str, Any]
) -> BaseModel:
    """`base` with the sites of the file's base model, whose `fingerprint` is given.

    Raises ArchiveError naming what differs if it is another model.
    """
    try:
        checked = base.with_sites(tuple(site["name"] for site in fingerprint["sites"]))
        differences = _differences(fingerprint, model_fingerprint(checked))
    except ValueError as error:
        differences = _differences(fingerprint, {"class": type(base.model).__name__})
        differences = differences or str(error).partition("; ")[0]  # without its advice
    if differences:
        name = fingerprint.get("name", base.name)
        theirs = f" ({name})" if name != base.name else ""
        raise ArchiveError(
            f"{path}: {kind.made} for another model{theirs} than {base.name}: {differences}; "
            f"{kind.if_another_model}"
        )
    return checked


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What tells two base models apart, in words; the name alone does not."""
    words = {
        "class": f"class {theirs.get('class')}, here {ours['class']}",
        "sites": "other shapes of the edited layers",
        "sites_sha256": "other weights in the edited layers (another one, or already edited)",
        "tokenizer_sha256": "another tokenizer",
    }
    return "; ".join(words[key] for key in words if key in ours and theirs.get(key) != ours[key])
