"""Every baseline at its best: each kind of editor gets the same number of settings, tried on the same validation edits.

The budget is `BUDGET` settings a kind, all scored by `evaluate` on one validation set; the one with the best headline
score (harmonic mean of edit success and paraphrase by free decoding, neighbourhood and locality) is kept. The trained
editor had its own validation, and the fact in the context has nothing to choose.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import Any

from ..data.examples import EditExample, join
from ..errors import MendkitError
from ..evaluation.many import Editor
from ..evaluation.prepare import EvaluationSet
from ..evaluation.results import HARMONIC, EvaluationReport
from ..mend.editor import MENDEditor
from ..models.base import BaseModel
from .base import (
    IDENTITY_EDIT_LRS,
    Baseline,
    FineTuning,
    LocalisedFineTuning,
    best_of,
    down_projections,
    identity_editor,
)
from .gauss_newton import GaussNewton
from .rome import ROME, key_moments

logger = logging.getLogger(__name__)

BUDGET = 4
DEPTHS = (0.4, 0.75)


@dataclass(frozen=True)
class Tuned:
    """A kind of editor at the best of its settings, and a row for each setting that was tried: `editor` (its name),
    its settings in words, the headline `score`, the shares behind it, and whether it was `chosen`."""

    editor: Editor
    rows: tuple[Mapping[str, Any], ...]

    def to_dict(self, prefix: str = "") -> dict[str, Any]:
        """Flat results: how many settings were tried, which one was kept, and its validation score."""
        kept = next(row for row in self.rows if row["chosen"])
        return {
            f"{prefix}tuning.{k}": v
            for k, v in (
                ("tried", len(self.rows)),
                ("kept", kept["settings"]),
                ("score", kept["score"]),
            )
        }


def tune(kind: str, on: EvaluationSet, /, *, text: str, mend: MENDEditor | None = None) -> Tuned:
    """The best of a kind's `BUDGET` settings on the validation set `on`.

    `kind` is one of `KINDS`; `text` gives the covariance of ROME and of Gauss-Newton, which keeps texts of `on`;
    "identity" needs the statistics of `mend`. Raises MendkitError for another kind, or if the model does not allow it.
    """
    if kind not in KINDS:
        raise MendkitError(f"no such kind of editor: {kind!r}; expected one of {', '.join(KINDS)}")
    editors, settings = zip(*KINDS[kind](on, text, mend), strict=True)
    logger.info(
        "tuning %s: %d settings on %d edits", editors[0].name, len(editors), len(on.to_edit)
    )
    best, reports = best_of(editors, on)
    return Tuned(
        best,
        tuple(_row(e, s, r, e is best) for e, s, r in zip(editors, settings, reports, strict=True)),
    )


def running_text(examples: Sequence[EditExample], /) -> str:
    """The examples' own prompts with their old answers, a line each: a text where there is no other."""
    told = (join(e.prompt, e.ground_truth) if e.ground_truth else e.prompt for e in examples)
    return "\n".join(f"{sentence}." for sentence in told)


# ------------------------------------------------------------------------------------------------- what is tried


Candidates = list[tuple[Editor, Mapping[str, float | str]]]


def _identity(_: EvaluationSet, __: str, mend: MENDEditor | None) -> Candidates:
    if mend is None:
        raise MendkitError(
            "identity: the untrained MEND takes its statistics from an archive; set `archive`"
        )
    lrs = IDENTITY_EDIT_LRS[-BUDGET:]
    return [(identity_editor(mend.base, mend.mend, edit_lr=lr), {"edit_lr": lr}) for lr in lrs]


def _plain(on: EvaluationSet, _: str, __: MENDEditor | None) -> Candidates:
    return _own(
        FineTuning(on.base, on.hparams, lr=lr, steps=25) for lr in (0.001, 0.003, 0.01, 0.03)
    )


def _capped(on: EvaluationSet, _: str, __: MENDEditor | None) -> Candidates:
    caps, lrs = (0.001, 0.002), (0.01, 0.03)
    return _own(
        FineTuning(on.base, on.hparams, lr=lr, steps=25, cap=cap) for cap in caps for lr in lrs
    )


def _localised(on: EvaluationSet, _: str, __: MENDEditor | None) -> Candidates:
    sites, lrs = _at_depths(on.base), (1e-3, 3e-3)
    return _own(
        LocalisedFineTuning(on.base, on.hparams, site=site, lr=lr) for site in sites for lr in lrs
    )


def _rome(on: EvaluationSet, text: str, _: MENDEditor | None) -> Candidates:
    sites, clamps = _at_depths(on.base), (4.0, 12.0)
    key_moments(on.base.with_sites(sites), on.hparams, text)  # of all sites in one pass
    return _own(
        ROME(on.base, on.hparams, text, site=site, clamp=clamp)
        for site in sites
        for clamp in clamps
    )


def _gauss_newton(on: EvaluationSet, text: str, _: MENDEditor | None) -> Candidates:
    ridges, every = (0.05, 0.2), (0, 16)
    return _own(
        GaussNewton(on.base, on.hparams, text, keep=on.examples, ridge=ridge, kept=kept)
        for ridge in ridges
        for kept in every
    )


def _own(editors: Iterable[Baseline]) -> Candidates:
    return [(editor, editor.settings) for editor in editors]


def _at_depths(base: BaseModel) -> list[str]:
    """Down-projections at some of the depths, each once."""
    names = down_projections(base)
    return list(
        dict.fromkeys(names[min(len(names) - 1, round(depth * len(names)))] for depth in DEPTHS)
    )


def _row(
    editor: Editor, settings: Mapping[str, float | str], report: EvaluationReport, chosen: bool
) -> dict[str, Any]:
    said = ", ".join(
        f"{k} {v if isinstance(v, str) else format(v, 'g')}" for k, v in settings.items()
    )
    shares = {
        name: report.summary[name].mean
        for name in HARMONIC["score.headline"]
        if name in report.summary
    }
    return {
        "editor": editor.name,
        "settings": said,
        **shares,
        "score": harmonic_mean(list(shares.values())),
        "chosen": chosen,
    }


KINDS: dict[str, Callable[[EvaluationSet, str, MENDEditor | None], Candidates]] = {
    "identity": _identity,
    "finetune": _plain,
    "finetune_capped": _capped,
    "localised": _localised,
    "rome": _rome,
    "gauss_newton": _gauss_newton,
}
"""Kinds of editors that are not trained, by name."""
