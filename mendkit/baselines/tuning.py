"""Every baseline at its best: each kind of editor gets the same number of settings to try.

All `BUDGET` settings of a kind are scored by `evaluate` on one validation set; the one with the
best headline score is kept. The trained editor had its own validation, and the fact in the context
has nothing to choose.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..data.examples import EditExample, join
from ..errors import MendkitError
from ..evaluation.evaluate import evaluate
from ..evaluation.many import Editor
from ..evaluation.prepare import EvaluationSet
from ..evaluation.results import HEADLINE_KEYS, EvaluationReport, headline_score
from ..mend.editor import MENDEditor
from ..models.base import BaseModel
from .base import IDENTITY_EDIT_LRS, Baseline, down_projections, identity_editor
from .fine_tuning import FineTuning, LocalisedFineTuning
from .gauss_newton import GaussNewton
from .rome import ROME

logger = logging.getLogger(__name__)

BUDGET = 4
DEPTHS = (0.4, 0.75)
Candidates = list[tuple[Editor, Mapping[str, float | str]]]
"""Editors with their settings."""


@dataclass(frozen=True)
class Tuned:
    """A kind of editor at the best of its settings.

    `rows` has one for each setting that was tried: `editor` (its name), its settings in words, the
    headline `score`, the shares behind it, and whether it was `chosen`.
    """

    editor: Editor
    rows: tuple[Mapping[str, Any], ...]

    def to_dict(self, prefix: str = "") -> dict[str, Any]:
        """Flat results: how many settings were tried, which was kept, its validation score."""
        kept = next(row for row in self.rows if row["chosen"])
        found = {"tried": len(self.rows), "kept": kept["settings"], "score": kept["score"]}
        return {f"{prefix}tuning.{name}": value for name, value in found.items()}


def tune(kind: str, on: EvaluationSet, *, text: str, mend: MENDEditor | None = None) -> Tuned:
    """The best of a kind's `BUDGET` settings on the validation set `on`.

    `kind` is one of `KINDS`; `text` gives the covariance of ROME and of Gauss-Newton, which keeps
    texts of `on`; "identity" needs the statistics of `mend`. Raises MendkitError for another kind,
    or if the model does not allow it.
    """
    if kind not in KINDS:
        raise MendkitError(f"no such kind of editor: {kind!r}; expected one of {', '.join(KINDS)}")
    candidates = KINDS[kind](on, text, mend)
    editors = [editor for editor, _ in candidates]
    name, count = editors[0].name, len(on.to_edit)
    logger.info("tuning %s: %d settings on %d edits", name, len(editors), count)
    best, reports = best_of(editors, on)
    rows = []
    for (editor, settings), report in zip(candidates, reports, strict=True):
        rows.append(_tried(editor, settings, report) | {"chosen": editor is best})
    return Tuned(best, tuple(rows))


def best_of(
    editors: Sequence[Editor], on: EvaluationSet
) -> tuple[Editor, tuple[EvaluationReport, ...]]:
    """The editor with the best headline score on `on`, and everyone's report."""
    reports = tuple(evaluate(editor, on) for editor in editors)
    scores = [headline_score(report.summary) for report in reports]
    return editors[scores.index(max(scores))], reports


def _tried(
    editor: Editor, settings: Mapping[str, float | str], report: EvaluationReport
) -> dict[str, Any]:
    said = []
    for name, value in settings.items():
        said.append(f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}")
    row: dict[str, Any] = {"editor": editor.name, "settings": ", ".join(said)}
    for name in HEADLINE_KEYS:
        if name in report.summary:
            row[name] = report.summary[name].mean
    return row | {"score": headline_score(report.summary)}


def running_text(examples: Sequence[EditExample]) -> str:
    """The examples' prompts with their old answers, a line each: a text where there is no other."""
    sentences = []
    for example in examples:
        old = example.ground_truth
        sentences.append(join(example.prompt, old) if old else example.prompt)
    return "\n".join(f"{sentence}." for sentence in sentences)


# ------------------------------------------------------------------------------- what is tried


def _try_identity(_: EvaluationSet, __: str, mend: MENDEditor | None) -> Candidates:
    if mend is None:
        raise MendkitError("identity needs the statistics of an archive; set `archive`")
    rates = IDENTITY_EDIT_LRS[-BUDGET:]
    editors = [identity_editor(mend.base, mend.mend, edit_lr=lr) for lr in rates]
    return [(editor, {"edit_lr": lr}) for editor, lr in zip(editors, rates, strict=True)]


def _try_plain(on: EvaluationSet, _: str, __: MENDEditor | None) -> Candidates:
    rates = (0.001, 0.003, 0.01, 0.03)
    return _with_settings([FineTuning(on.base, on.hparams, lr=lr, steps=25) for lr in rates])


def _try_capped(on: EvaluationSet, _: str, __: MENDEditor | None) -> Candidates:
    pairs = product((0.001, 0.002), (0.01, 0.03))
    return _with_settings(
        [FineTuning(on.base, on.hparams, cap=cap, lr=lr, steps=25) for cap, lr in pairs]
    )


def _try_localised(on: EvaluationSet, _: str, __: MENDEditor | None) -> Candidates:
    pairs = product(_at_depths(on.base), (1e-3, 3e-3))
    return _with_settings(
        [LocalisedFineTuning(on.base, on.hparams, site=site, lr=lr) for site, lr in pairs]
    )


def _try_rome(on: EvaluationSet, text: str, _: MENDEditor | None) -> Candidates:
    pairs = product(_at_depths(on.base), (4.0, 12.0))
    return _with_settings(
        [ROME(on.base, on.hparams, text, site=site, clamp=clamp) for site, clamp in pairs]
    )


def _try_gauss_newton(on: EvaluationSet, text: str, _: MENDEditor | None) -> Candidates:
    pairs, keep = product((0.05, 0.2), (0, 16)), on.examples
    return _with_settings(
        [
            GaussNewton(on.base, on.hparams, text, ridge=ridge, kept=kept, keep=keep)
            for ridge, kept in pairs
        ]
    )


def _with_settings(editors: Sequence[Baseline]) -> Candidates:
    return [(editor, editor.settings) for editor in editors]


def _at_depths(base: BaseModel) -> list[str]:
    """Down-projections at some of the depths, each once."""
    names = down_projections(base)
    places = [min(len(names) - 1, round(depth * len(names))) for depth in DEPTHS]
    return [names[place] for place in dict.fromkeys(places)]


KINDS: dict[str, Callable[[EvaluationSet, str, MENDEditor | None], Candidates]] = {
    "identity": _try_identity,
    "finetune": _try_plain,
    "finetune_capped": _try_capped,
    "localised": _try_localised,
    "rome": _try_rome,
    "gauss_newton": _try_gauss_newton,
}
"""Kinds of editors that are not trained, by name."""
