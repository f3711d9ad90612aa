"""mendkit: train and use MEND model editors (Mitchell et al., "Fast Model Editing at Scale", ICLR 2022)."""

from .archive import inspect_archive, load_archive, save_archive
from .baselines import (
    FineTuning,
    LocalisedFineTuning,
    best_of,
    fact_in_context,
    identity_editor,
    tune_identity,
)
from .data import EditExample, Probe
from .edit import Edit, LowRankUpdate
from .editor import EditSession, MENDEditor
from .errors import ArchiveError, DataError, HyperParamError, MendkitError, ModelError
from .evaluate import EvaluationReport, EvaluationSet, Interval, evaluate
from .foreign import export_archive, import_archive
from .gauss_newton import GaussNewton
from .hparams import MENDHyperParams
from .models import BaseModel, load_model
from .readers import (
    read_examples,
    read_questions,
    read_text,
    split_examples,
    with_unrelated,
    write_examples,
)
from .rome import ROME
from .scoring import next_tokens
from .training import TrainingResult, train
from .tuning import KINDS, running_text, tune
from .validation import strength_curve

__all__ = [
    "KINDS", "ROME", "ArchiveError", "BaseModel", "DataError", "Edit", "EditExample", "EditSession",
    "EvaluationReport", "EvaluationSet", "FineTuning", "GaussNewton", "HyperParamError", "Interval",
    "LocalisedFineTuning", "LowRankUpdate", "MENDEditor", "MENDHyperParams", "MendkitError", "ModelError", "Probe",
    "TrainingResult", "best_of", "evaluate", "export_archive", "fact_in_context", "identity_editor", "import_archive",
    "inspect_archive", "load_archive", "load_model", "next_tokens", "read_examples", "read_questions", "read_text",
    "running_text", "save_archive", "split_examples", "strength_curve", "train", "tune", "tune_identity",
    "with_unrelated", "write_examples",
]  # fmt: skip
