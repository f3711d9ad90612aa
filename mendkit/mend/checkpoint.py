"""Going on with a training run that was stopped, by whatever: the checkpoint in its folder.

    <run folder>/checkpoint.safetensors

Tensors: the hypernetwork with its statistics, the optimiser's state, the generator of all draws and what is left of the
epoch. Metadata: the run's course so far (`Course`), and what it is a run of: hyperparameters, examples, versions, base
model. A run that goes on from it ends with the archive, bit for bit, of a run that was never stopped; with anything
else than what it is a run of that would not hold, so it is refused. The file is replaced in one rename. When a run has
ended, the metadata alone stays, to say so.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from ..data.examples import EditExample
from ..errors import MendkitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.fingerprint import model_fingerprint
from ..runs import provenance
from .files import Kind, matching_base, read_metadata, read_tensors, save_tensors

CHECKPOINT = Kind(
    format="mendkit-checkpoint-2",
    noun="checkpoint",
    made="written",
    if_missing="train anew",
    if_another_model="load the model of that run, or delete the file to start anew",
)
FILE = "checkpoint.safetensors"
ELSEWHERE = (
    "cache_dir",
    "disk_cache_bytes",
    "results_dir",
    "logger",
    "checkpoint_interval",
    "stream_trunk",
)
"""Hyperparameters that no number depends on: they may be others when a run goes on."""

VERSIONS = ("mendkit", "torch", "transformers")


@dataclass
class Course:
    """How far a run has come."""

    steps: int  # how many it is to make
    step: int = 0  # the last one made
    best: dict[str, float] = field(
        default_factory=dict
    )  # the validation row of the archive that is kept
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0  # steps without a finite loss and gradient
    in_a_row: int = 0  # the last ones of these
    elapsed: float = 0.0  # seconds in the training loop when that step ended
    seconds: float = 0.0  # wall time, the preparation included
    normaliser_examples: int = 0
    cache: dict[str, float] = field(default_factory=dict)  # seconds and bytes of the caches
    stopped: str | None = None  # why it ended


class Checkpoint:
    """The checkpoint of the run of these settings and examples, in a run folder that may hold another's, or none."""

    def __init__(
        self,
        run_dir: Path,
        hparams: MENDHyperParams,
        train_examples: Sequence[EditExample],
        val_examples: Sequence[EditExample],
    ) -> None:
        self.path = run_dir / FILE
        examples = repr((tuple(train_examples), tuple(val_examples[: hparams.val_steps])))
        self.run_of = {
            "hparams": {
                key: value for key, value in hparams.to_dict().items() if key not in ELSEWHERE
            },
            "examples_sha256": hashlib.sha256(examples.encode()).hexdigest(),
            "versions": {name: provenance()["versions"][name] for name in VERSIONS},
        }

    def write(self, base: BaseModel, course: Course, tensors: Mapping[str, Tensor], /) -> None:
        """Replace the file. Raises MendkitError if it cannot be written; what was there stays."""
        metadata = {
            "run_of": self.run_of,
            "course": asdict(course),
            "base_model": model_fingerprint(base),
        }
        save_tensors(CHECKPOINT, self.path, tensors, metadata)

    def read(self) -> Course | None:
        """The run's course so far, if the folder holds a checkpoint.

        Raises ArchiveError if it is damaged, MendkitError naming what differs if it is another run's.
        """
        if not self.path.exists():
            return None
        metadata = read_metadata(CHECKPOINT, self.path)
        course, theirs = Course(**metadata["course"]), metadata["run_of"]
        differences = [
            f"{key} {theirs[part].get(key)}, here {value}"
            for part in ("hparams", "versions")
            for key, value in self.run_of[part].items()
            if theirs[part].get(key) != value
        ]
        if theirs["examples_sha256"] != self.run_of["examples_sha256"]:
            differences.append("other examples")
        if differences:
            raise MendkitError(
                f"{self.path}: the checkpoint of another run ({'; '.join(differences)}), at step {course.step} of "
                f"{course.steps}; give the settings and examples of that run to go on with it, give this one another "
                "folder, or delete the file to start anew"
            )
        return course

    def unfinished(self) -> Course | None:
        """As `read`; None if that run has ended."""
        if self.path.exists() and read_metadata(CHECKPOINT, self.path)["course"]["stopped"] is not None:
            return None
        return self.read()

    def tensors(self, base: BaseModel) -> dict[str, Tensor]:
        """The tensors. Raises ArchiveError if one is damaged, or if they are for another base model."""
        metadata, tensors = read_tensors(CHECKPOINT, self.path)
        matching_base(CHECKPOINT, self.path, base, metadata["base_model"])
        return tensors
