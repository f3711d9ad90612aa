"""The checkpoint of a training run in its folder: how a run that was stopped goes on.

Tensors: the hypernetwork with its statistics, the optimiser's state, the generator of all draws and
what is left of the epoch. Metadata: the run's course so far (`Course`) and what it is a run of:
hyperparameters, examples, versions, base model. A run that goes on ends with the archive, bit for
bit, of a run that was never stopped. Other settings, examples or versions would change the result,
so they are refused. The file is replaced in one rename. When a run has ended only the metadata
stay, to say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.examples import EditExample
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.fingerprint import model_fingerprint
from ..runs import provenance, sha256
from .files import Kind, matching_base, read_metadata, read_tensors, save_tensors

CHECKPOINT = Kind(
    format="mendkit-checkpoint-2",
    noun="checkpoint",
    made="written",
    if_missing="train anew",
    if_another_model="load the model of that run, or delete the file to start anew",
)
FILE = "checkpoint.safetensors"
# Hyperparameters that no number depends on: they may differ when a run goes on.
FREE = {
    "cache_dir",
    "disk_cache_bytes",
    "results_dir",
    "logger",
    "checkpoint_interval",
    "stream_trunk",
}

VERSIONS = ("mendkit", "torch", "transformers")


@dataclass
class Course:
    """How far a run has come."""

    steps: int  # how many it is to make
    step: int = 0  # the last one made
    best: dict[str, float] = field(default_factory=dict)  # validation of the kept archive
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0  # steps without a finite loss and gradient
    in_a_row: int = 0  # the last ones of these
    elapsed: float = 0.0  # seconds in the training loop when the last step ended
    seconds: float = 0.0  # wall time, the preparation included
    normaliser_examples: int = 0
    cache: dict[str, float] = field(default_factory=dict)  # seconds and bytes of the caches
    stopped: str | None = None  # why it ended


class Checkpoint:
    """The checkpoint of a run of these settings and examples. The folder may hold another's."""

    def __init__(
        self,
        run_dir: Path,
        hparams: MENDHyperParams,
        train: Sequence[EditExample],
        validation: Sequence[EditExample],
    ) -> None:
        self.path = run_dir / FILE
        settings = {key: value for key, value in hparams.to_dict().items() if key not in FREE}
        examples = repr((tuple(train), tuple(validation[: hparams.val_steps])))
        versions = provenance()["versions"]
        self.run_of: dict[str, Any] = {
            "hparams": settings,
            "examples_sha256": sha256(examples),
            "versions": {name: versions[name] for name in VERSIONS},
        }

    def write(self, base: BaseModel, course: Course, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file. Raises MendkitError if it cannot be written; the old one stays."""
        metadata = {"run_of": self.run_of, "course": asdict(course)}
        metadata["base_model"] = model_fingerprint(base)
        save_tensors(CHECKPOINT, self.path, tensors, metadata)

    def read(self) -> Course | None:
        """The run's course so far; None if there is no checkpoint.

        Raises ArchiveError if it is damaged, MendkitError naming what differs for another run's.
        """
        if not self.path.exists():
            return None
        metadata = read_metadata(CHECKPOINT, self.path)
        course, theirs = Course(**metadata["course"]), metadata["run_of"]
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
                f"{course.step} of {course.steps}; give the settings and examples of that run to "
                "go on with it, give this one another folder, or delete the file to start anew"
            )
        return course

    def unfinished(self) -> Course | None:
        """As `read`; None if that run has ended."""
        if (
            self.path.exists()
            and read_metadata(CHECKPOINT, self.path)["course"]["stopped"] is not None
        ):
            return None
        return self.read()

    def tensors(self, base: BaseModel) -> dict[str, Tensor]:
        """The tensors. Raises ArchiveError if one is damaged, or for another base model."""
        metadata, tensors = read_tensors(CHECKPOINT, self.path)
        matching_base(CHECKPOINT, self.path, base, metadata["base_model"])
        return tensors
