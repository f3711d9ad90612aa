"""mendkit: train and use MEND model editors.

Mitchell, Lin, Bosselut, Finn and Manning, "Fast Model Editing at Scale", ICLR 2022.

A name is imported from its module when it is first used (PEP 562), so `import mendkit` does not
load torch. `__init__.pyi` has the same names for type checkers.
"""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "ArchiveError": "errors",
    "BaseModel": "models.base",
    "DataError": "errors",
    "Edit": "mend.edit",
    "EditExample": "data.examples",
    "EditSession": "mend.editor",
    "EvaluationReport": "evaluation.results",
    "EvaluationSet": "evaluation.prepare",
    "FineTuning": "baselines.fine_tuning",
    "GaussNewton": "baselines.gauss_newton",
    "HyperParamError": "errors",
    "Interval": "evaluation.results",
    "KINDS": "baselines.tuning",
    "LocalisedFineTuning": "baselines.fine_tuning",
    "LowRankUpdate": "mend.updates",
    "MENDEditor": "mend.editor",
    "MENDHyperParams": "hparams",
    "MendkitError": "errors",
    "ModelError": "errors",
    "Probe": "data.examples",
    "ROME": "baselines.rome",
    "TrainingResult": "mend.archive",
    "best_of": "baselines.tuning",
    "compare": "evaluation.results",
    "evaluate": "evaluation.evaluate",
    "export_archive": "interop.foreign",
    "fact_in_context": "baselines.base",
    "identity_editor": "baselines.base",
    "import_archive": "interop.foreign",
    "inspect_archive": "mend.archive",
    "load_archive": "mend.archive",
    "load_model": "models.load",
    "next_tokens": "mend.validation",
    "read_examples": "data.files",
    "read_questions": "data.files",
    "read_text": "data.files",
    "running_text": "baselines.tuning",
    "save_archive": "mend.archive",
    "split_examples": "data.sampling",
    "strength_curve": "mend.validation",
    "train": "mend.training",
    "tune": "baselines.tuning",
    "tune_identity": "baselines.base",
    "with_unrelated": "data.sampling",
    "write_examples": "data.files",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
