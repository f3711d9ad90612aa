"""mendkit: train and use MEND model editors (Mitchell et al., "Fast Model Editing at Scale", ICLR 2022)."""

from .archive import inspect_archive, load_archive, save_archive
from .baselines import FineTuning, best_of, fact_in_context, identity_editor, tune_identity
from .data import EditExample, Probe
from .edit import Edit, LowRankUpdate
from .editor import EditSession, MENDEditor
from .errors import ArchiveError, DataError, HyperParamError, MendkitError, ModelError
from .evaluate import EvaluationReport, EvaluationSet, Interval, evaluate
from .foreign import export_archive, import_archive
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
from .scoring import next_tokens
from .training import TrainingResult, train
from .validation import strength_curve

__all__ = [
    "ArchiveError", "BaseModel", "DataError", "Edit", "EditExample", "EditSession", "EvaluationReport",
    "EvaluationSet", "FineTuning", "HyperParamError", "Interval", "LowRankUpdate", "MENDEditor",
    "MENDHyperParams", "MendkitError", "ModelError", "Probe", "TrainingResult", "best_of", "evaluate",
    "export_archive", "fact_in_context", "identity_editor", "import_archive", "inspect_archive", "load_archive",
    "load_model", "next_tokens", "read_examples", "read_questions", "read_text", "save_archive", "split_examples",
    "strength_curve", "train", "tune_identity", "with_unrelated", "write_examples",
]  # fmt: skip
