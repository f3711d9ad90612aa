"""mendkit: train and use MEND model editors.

Mitchell, Lin, Bosselut, Finn and Manning, "Fast Model Editing at Scale", ICLR 2022.

A name is imported from its module when it is first used (PEP 562), so `import mendkit` does not
load torch. `__init__.pyi` has the same names for type checkers.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "baselines.base": "fact_in_context identity_editor tune_identity",
    "baselines.fine_tuning": "FineTuning LocalisedFineTuning",
    "baselines.gauss_newton": "GaussNewton",
    "baselines.rome": "ROME",
    "baselines.tuning": "KINDS best_of running_text tune",
    "data.examples": "EditExample Probe",
    "data.files": "read_examples read_text write_examples",
    "data.sampling": "split_examples",
    "errors": "ArchiveError DataError HyperParamError MendkitError ModelError",
    "evaluation.evaluate": "evaluate",
    "evaluation.prepare": "EvaluationSet",
    "evaluation.results": "EvaluationReport Interval compare",
    "hparams": "MENDHyperParams",
    "interop.foreign": "export_archive import_archive",
    "mend.archive": "TrainingResult inspect_archive load_archive save_archive",
    "mend.edit": "Edit",
    "mend.editor": "EditSession MENDEditor",
    "mend.training": "train",
    "mend.updates": "LowRankUpdate",
    "mend.validation": "next_tokens strength_curve",
    "models.base": "BaseModel",
    "models.load": "load_model",
}
"""The public names of each module."""

_MODULE_OF: dict[str, str] = {}
for _module, _names in _NAMES.items():
    _MODULE_OF |= dict.fromkeys(_names.split(), _module)

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
