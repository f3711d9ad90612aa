"""mendkit: train and use MEND model editors (Mitchell et al., "Fast Model Editing at Scale", ICLR 2022)."""

from .baselines.base import (
    FineTuning,
    LocalisedFineTuning,
    best_of,
    fact_in_context,
    identity_editor,
    tune_identity,
)
from .baselines.gauss_newton import GaussNewton
from .baselines.rome import ROME
from .baselines.tuning import KINDS, running_text, tune
from .data.examples import EditExample, Probe
from .data.files import (
    read_examples,
    read_questions,
    read_text,
    split_examples,
    with_unrelated,
    write_examples,
)
from .errors import ArchiveError, DataError, HyperParamError, MendkitError, ModelError
from .evaluation.evaluate import EvaluationReport, EvaluationSet, Interval, evaluate
from .hparams import MENDHyperParams
from .interop.foreign import export_archive, import_archive
from .mend.archive import inspect_archive, load_archive, save_archive
from .mend.edit import Edit, LowRankUpdate
from .mend.editor import EditSession, MENDEditor
from .mend.scoring import next_tokens
from .mend.training import TrainingResult, train
from .mend.validation import strength_curve
from .models.load import BaseModel, load_model

__all__ = [
    "KINDS", "ROME", "ArchiveError", "BaseModel", "DataError", "Edit", "EditExample", "EditSession",
    "EvaluationReport", "EvaluationSet", "FineTuning", "GaussNewton", "HyperParamError", "Interval",
    "LocalisedFineTuning", "LowRankUpdate", "MENDEditor", "MENDHyperParams", "MendkitError", "ModelError", "Probe",
    "TrainingResult", "best_of", "evaluate", "export_archive", "fact_in_context", "identity_editor", "import_archive",
    "inspect_archive", "load_archive", "load_model", "next_tokens", "read_examples", "read_questions", "read_text",
    "running_text", "save_archive", "split_examples", "strength_curve", "train", "tune", "tune_identity",
    "with_unrelated", "write_examples",
]  # fmt: skip
