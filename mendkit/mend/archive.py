"""The two files of a training run: the archive it ends with, and the checkpoint it goes on from.

The archive is a trained hypernetwork: transforms, statistics of the normaliser, log step sizes. It
is refused on another base model than its own (CORRECTNESS rows 3, 23, 24).

The checkpoint holds what the next steps depend on; as metadata how far the run has come and what it
is a run of. A run that goes on ends with the archive, bit for bit, of a run that was never stopped.
Other settings, examples or versions would change the result, so they are refused. When a run has
ended only the metadata stay.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.examples import EditExample
from ..errors import HyperParamError, MendkitError, shown
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.fingerprint import model_fingerprint
from ..places import ARCHIVE_FILE, archive_file
from ..runs import provenance, sha256
from .batches import read_beside
from .files import Kind, damage_named, matching_base, read_tensors, save_tensors
from .hypernetwork import MEND
from .packing import packed, unpacked

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

ARCHIVE = Kind(
    format="mendkit-3",
    noun="archive",
    made="trained",
    if_missing="train one with `archive: null`, or correct `archive:`",
    if_another_model="load the model it was trained for, or set `archive: null` and train one",
)


@dataclass(frozen=True)
class Archive:
    """A loaded archive: the hypernetwork on the base model it belongs to, and its metadata."""

    path: Path
    base: BaseModel = field(repr=False)
    mend: MEND = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)


def save_archive(
    path: str | Path,
    base: BaseModel,
    mend: MEND,
    *,
    training: Mapping[str, Any] | None = None,
    compact: bool = False,
) -> Path:
    """Write an archive; `training` is its summary. It holds no path of this machine.

    `compact` rounds its matrices (packing.py). Raises as `save_tensors`.
    """
    settings = mend.hparams.replace(archive=None, model_name=base.name).to_dict()
    if os.path.isdir(settings["tokenizer_name"] or ""):
        settings["tokenizer_name"] = Path(settings["tokenizer_name"]).resolve().name
    tensors, packing = packed(mend.state_dict(), compact=compact)
    metadata = {
        "hparams": {key: settings[key] for key in settings if key not in FREE},
        "base_model": model_fingerprint(base),
        "precision": "matrices in 8 and 12 bits" if compact else "exact",
        "packing": packing,
        "update_sign": mend.hparams.update_sign,
        "loss_reduction": mend.hparams.loss_reduction,
        "edit_lr": mend.edit_lrs,
        "training": dict(training or {}),
    }
    return save_tensors(ARCHIVE, path, tensors, metadata)


# Hyperparameters that no number depends on: they may differ when a run goes on.
FREE = {
    "cache_dir",
    "disk_cache_bytes",
    "results_dir",
    "logger",
    "checkpoint_interval",
    "stream_trunk",
}
# What an archive decides, besides its sites, step sizes and ridges.
STRUCTURE = (
    *("add_eos", "aggregate", "combine", "delta_only", "edit_on", "edit_tokens", "init"),
    *("loss_reduction", "n_hidden", "norm", "norm_stats", "one_sided", "rank", "shared"),
    *("site_share", "std_eps", "std_floor", "target_prefix", "unit_response", "update_sign"),
    *("value_coefficient", "whiten", "whiten_pairs", "whiten_values", "x_only", "z_clip"),
)
# What an archive decides unless whoever edits does.
OF_EITHER = ("max_relative_norm", "lifelong_norm", "max_length", "max_target_tokens", "seed")
# What whoever edits decides.
OF_EDITING = (
    *("model_name", "tokenizer_name", "dtype", "device", "trust_remote_code", "archive"),
    *("lr_scale", "cache_dir", "disk_cache_bytes", "cache_bytes", "release_trunk", "stream_trunk"),
    *("results_dir", "columns", "logger", "log_interval", *OF_EITHER),
)


def look_at_archive(hparams: MENDHyperParams, *, to_train: bool = False) -> None:
    """Find what is wrong with `hparams.archive` before a model is loaded.

    Raises ArchiveError as `inspect_archive`, and HyperParamError for a setting that a caller gave
    beside it, but that it decides or only training knows. Of a file's it says what does not hold.
    """
    path = hparams.archive
    assert path is not None
    metadata = inspect_archive(path)
    with damage_named(path, "metadata"):
        trained = dict(metadata["hparams"])
        sites = metadata["base_model"]["sites"]
        trained["inner_params"] = [site["name"] for site in sites]
        widest = max(sum(site["shape"]) for site in sites)
    decided = {*STRUCTURE, "edit_lr", "inner_params", "ridge", "ridge_shared"}
    if to_train and trained.get("aggregate") == "sum":  # which training may change
        decided -= {"aggregate", "ridge", "ridge_shared"}
    without_effect = []
    for key, about in type(hparams).model_fields.items():
        asked, is_given = hparams.to_dict()[key], key in hparams.model_fields_set
        there = trained.get(key, about.default)
        if key in OF_EDITING or (asked == about.default and not is_given):
            continue
        if key == "rank":
            asked, there = min(asked or widest, widest), min(there or widest, widest)
        if key == "inner_params" and asked != "auto":
            asked, there = sorted(asked), sorted(there)
        if asked in ("auto", there) or (to_train and key not in decided):
            continue
        if is_given:
            raise HyperParamError(
                f"{key}: {shown(asked)}, but that belongs to the archive {path}, which has "
                f"{shown(there)}; leave it out, or train another archive with it",
                key,
            )
        if key in decided:
            without_effect.append(f"{key} {shown(there)}, not {shown(asked)}")
    if without_effect:
        told = "; ".join(without_effect)
        logger.warning("the archive %s decides these settings, not the file: %s", path, told)


def inspect_archive(path: str | Path) -> dict[str, Any]:
    """An archive's metadata, with the shapes of its tensors under "tensors".

    Raises ArchiveError if the file is missing, damaged, or no archive of this kit.
    """
    return read_tensors(ARCHIVE, path)[0]


def load_archive(path: str | Path, *, base: BaseModel) -> Archive:
    """Load a hypernetwork for `base`; the archive decides the edit sites of `Archive.base`.

    Raises ArchiveError if it is missing, damaged, or of another model, naming what differs.
    """
    metadata, tensors = read_tensors(ARCHIVE, path)
    with damage_named(path, "metadata"):
        packing = metadata.get("packing", {"same": {}, "triangles": []})
        settings = {}  # whose tuples JSON wrote as lists
        for key, value in metadata["hparams"].items():
            settings[key] = tuple(value) if isinstance(value, list) else value
        # what its method has set stands in the file: a later preset changes nothing
        method = settings.pop("method", None)
        hparams = MENDHyperParams(**settings).model_copy(update={"method": method})
        checked = matching_base(ARCHIVE, path, base, metadata["base_model"])
        held = len(tensors) + len(packing["same"])
        if hparams.n_hidden >= held:
            raise ValueError(f"n_hidden is {hparams.n_hidden}, with {held} tensors")
    # Nothing is allocated before the file has shown what it holds.
    with torch.device("meta"):
        mend = MEND(checked.sites, hparams)
    if metadata["format"] in ARCHIVE.old_formats:
        # the very first archives have no units: all are 1
        tensors.setdefault("edit_lr_unit", torch.ones(len(checked.sites)))
    with damage_named(path):
        # torch would take a number in brackets for a number, and any dtype.
        forms = {name: (value.dtype, value.shape) for name, value in mend.state_dict().items()}
        tensors = unpacked(tensors, packing, forms)
        mend.load_state_dict(tensors, assign=True)  # raises for other names
        for name, tensor in tensors.items():
            if (tensor.dtype, tensor.shape) != forms[name]:
                raise TypeError(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}")
    for other in mend.others.values():
        other.restore()
    return Archive(archive_file(path), checked, mend.to(base.device).eval(), metadata)


# ---------------------------------------- checkpoint

CHECKPOINT = Kind(
    format="mendkit-checkpoint-2",
    noun="checkpoint",
    made="written",
    if_missing="train anew",
    if_another_model="load the model of that run, or delete the file to start anew",
)
CHECKPOINT_FILE = "checkpoint.safetensors"
VERSIONS = ("mendkit", "torch", "transformers")


@dataclass(repr=False)
class TrainingResult:
    """How far a training run has come, and in the end what came of it."""

    archive: Path  # the best one
    steps: int  # how many steps the run is to make
    step: int = 0  # the last one made
    best: dict[str, float] = field(default_factory=dict)  # the validation row of the archive
    best_step: int = 0
    # One row per logged step and per validation.
    history: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0  # steps whose loss or gradient was not finite
    in_a_row: int = 0  # the last ones of these
    elapsed: float = 0.0  # seconds in the training loop when the last step ended
    seconds: float = 0.0  # wall time over all starts, the preparation included
    normaliser_examples: int = 0  # 0 if an archive was trained on
    edit_lr: float | None = None  # where the step sizes start, if that was measured
    continued_from: str | None = None  # SHA-256 of the archive that was trained on
    cache: dict[str, float] = field(default_factory=dict)  # seconds and bytes
    stopped: str | None = None  # why training ended

    def frame(self) -> "pandas.DataFrame":
        """The history: one row per logged step or validation, columns by name."""
        import pandas

        return pandas.DataFrame(self.history)

    def __repr__(self) -> str:
        score, step = self.best.get("val.score", float("nan")), self.best_step
        return f"TrainingResult({self.archive}, score {score:.3f} at step {step}: {self.stopped})"


class Checkpoint:
    """The checkpoint of a run of these settings and examples. The folder may hold another's."""

    def __init__(
        self,
        run_dir: Path,
        hparams: MENDHyperParams,
        train: Sequence[EditExample],
        validation: Sequence[EditExample],
    ) -> None:
        self.path, self.archive = run_dir / CHECKPOINT_FILE, run_dir / ARCHIVE_FILE
        settings = {key: value for key, value in hparams.to_dict().items() if key not in FREE}
        examples = tuple(train), tuple(validation[: hparams.val_steps])
        read = repr(examples)
        for role in read_beside(hparams):
            read += repr([getattr(example, role) for part in examples for example in part])
        versions = provenance()["versions"]
        self.run_of: dict[str, Any] = {
            "hparams": settings,
            "examples_sha256": sha256(read),
            "versions": {name: versions[name] for name in VERSIONS},
        }

    def write(self, base: BaseModel, course: TrainingResult, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file. Raises MendkitError if it cannot be written; the old one stays."""
        told = asdict(course)
        del told["archive"]
        metadata = {"run_of": self.run_of, "course": told, "base_model": model_fingerprint(base)}
        save_tensors(CHECKPOINT, self.path, tensors, metadata)

    def unfinished(self) -> TrainingResult | None:
        """As `read`; None if that run, whichever it is, has ended."""
        if not self.path.exists():
            return None
        stopped = read_tensors(CHECKPOINT, self.path)[0]["course"]["stopped"]
        return None if stopped else self.read()

    def read(self) -> TrainingResult | None:
        """The run's course so far; None if there is no checkpoint.

        Raises ArchiveError if it is damaged, MendkitError naming what differs for another run's.
        """
        if not self.path.exists():
            return None
        metadata = read_tensors(CHECKPOINT, self.path)[0]
        course, theirs = TrainingResult(self.archive, **metadata["course"]), metadata["run_of"]
        differences = []
        for part in ("hparams", "versions"):
            for key, value in self.run_of[part].items():
                if theirs[part].get(key) != value:
                    differences.append(f"{key} {theirs[part].get(key)}, here {value}")
        if theirs["examples_sha256"] != self.run_of["examples_sha256"]:
            differences.append("other examples")
        if differences:
            raise MendkitError(
                f"{self.path}: the checkpoint of another run ({'; '.join(differences)}), at step "
                f"{course.step} of {course.steps}; go on with that run's settings and examples, "
                "give this one another folder, or delete the file"
            )
        return course

    def tensors(self, base: BaseModel) -> dict[str, Tensor]:
        """The tensors. Raises ArchiveError if one is damaged, or for another base model."""
        metadata, tensors = read_tensors(CHECKPOINT, self.path)
        matching_base(CHECKPOINT, self.path, base, metadata["base_model"])
        return tensors
