"""Every baseline at its best: each kind of editor gets the same number of settings to try.

All `BUDGET` settings of a kind are scored by `evaluate` on one validation set; the one with the
best headline score is kept. The trained editor had its own validation, and the fact in the context
has nothing to choose.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from ..data.examples import EditExample, join
from ..errors import MendkitError
from ..evaluation.evaluate import Editor, evaluate
from ..evaluation.prepare import EvaluationSet
from ..evaluation.results import HEADLINE_KEYS, EvaluationReport, headline_score
from ..mend.editor import MENDEditor
from .base import (
    Baseline,
    down_projections,
    held_moments,
    identity_edit_lrs,
    identity_editor,
)
from .fine_tuning import FineTuning, LocalisedFineTuning
from .gauss_newton import CrispEdit, GaussNewton
from .memit import MEMIT, AlphaEdit
from .rome import ROME

logger = logging.getLogger(__name__)

KINDS = (
    *("identity", "finetune", "finetune_capped", "localised"),
    *("rome", "memit", "alphaedit", "gauss_newton", "crispedit"),
)
"""Kinds of editors that are not trained."""

BUDGET = 4
DEPTHS = (0.4, 0.75)
# Of LocFT-BF: block 6 of 28 (Qwen2.5) and 22 of 32 (Llama-3); its rate, and a larger one.
LOCALISED_DEPTHS, LOCALISED_RATES = (6 / 28, 22 / 32), (5e-4, 2e-3)
# The last of MEMIT's layers: of 32 (Llama-3) and of 48 (GPT-2 XL), in the papers' settings.
MEMIT_DEPTHS, MEMIT_LAYERS = (8 / 32, 17 / 48), 5


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


def tune(
    kind: str,
    on: EvaluationSet,
    *,
    text: str,
    mend: MENDEditor | None = None,
    keep: Sequence[EditExample] = (),
) -> Tuned:
    """The best of a kind's `BUDGET` settings on the validation set `on`.

    `kind` is one of `KINDS`; `text` gives the covariance of keys; Gauss-Newton takes wordings and
    texts to keep from the examples `keep`, or else from `on`; "identity" needs the statistics of
    `mend`. Raises MendkitError for another kind, or if the model does not allow it.
    """
    if kind not in KINDS:
        raise MendkitError(f"no such kind of editor: {kind!r}; expected one of {', '.join(KINDS)}")
    editors = candidates(kind, on, text, mend, keep)
    name, count = editors[0].name, len(on.to_edit)
    logger.info("tuning %s: %d settings on %d edits", name, len(editors), count)
    best, reports = best_of(editors, on)
    rows = []
    for editor, report in zip(editors, reports, strict=True):
        row: dict[str, Any] = {"editor": editor.name, "settings": _settings(editor)}
        for metric in HEADLINE_KEYS:
            if metric in report.summary:
                row[metric] = report.summary[metric].mean
        score = headline_score(report.summary)
        rows.append(row | {"score": score, "chosen": editor is best})
    return Tuned(best, tuple(rows))


def best_of(
    editors: Sequence[Editor], on: EvaluationSet
) -> tuple[Editor, tuple[EvaluationReport, ...]]:
    """The editor with the best headline score on `on`, and everyone's report."""
    reports = tuple(evaluate(editor, on) for editor in editors)
    scores = [headline_score(report.summary) for report in reports]
    return editors[scores.index(max(scores))], reports


def candidates(
    kind: str,
    on: EvaluationSet,
    text: str,
    mend: MENDEditor | None = None,
    keep: Sequence[EditExample] = (),
) -> Sequence[Editor]:
    """A kind's editors at the settings to try."""
    base, h = on.base, on.hparams
    if kind == "identity":
        if mend is None:
            raise MendkitError("identity needs the statistics of an archive; set `archive`")
        rates = identity_edit_lrs(mend.base, mend.mend, on.examples)[-BUDGET:]
        return [identity_editor(mend.base, mend.mend, edit_lr=lr) for lr in rates]
    if kind == "finetune":
        return [FineTuning(base, h, lr=lr, steps=25) for lr in (0.001, 0.003, 0.01, 0.03)]
    if kind == "finetune_capped":
        pairs = product((0.001, 0.002), (0.01, 0.03))
        return [FineTuning(base, h, cap=cap, lr=lr, steps=25) for cap, lr in pairs]
    if kind == "gauss_newton":
        of = partial(GaussNewton, base, h, text, keep=keep or on.examples)
        return [of(kept=n, reworded=r) for n, r in ((0, 0), (16, 0), (16, 3), (64, 3))]
    names = down_projections(base)
    if kind == "crispedit":
        crisp = partial(CrispEdit, base, h, text, sites=names[len(names) // 2 :])
        crisp = partial(crisp, keep=keep or on.examples)
        return [crisp(spared=share, kept=n) for share, n in product((0.8, 0.95), (0, 16))]
    if kind in ("memit", "alphaedit"):
        spans = [names[: round(d * len(names)) + 1][-MEMIT_LAYERS:] for d in MEMIT_DEPTHS]
        held_moments(base.with_sites(sorted({*spans[0], *spans[1]})), text, ridge=ROME.ridge)
        if kind == "memit":
            return [MEMIT(base, h, text, sites=s, weight=w) for s in spans for w in (1.5e3, 1.5e4)]
        return [AlphaEdit(base, h, text, sites=s, l2=l2) for s in spans for l2 in (1.0, 10.0)]
    # Down-projections at some of the depths, each once.
    depths = LOCALISED_DEPTHS if kind == "localised" else DEPTHS
    places = [min(len(names) - 1, round(depth * len(names))) for depth in depths]
    sites = [names[place] for place in dict.fromkeys(places)]
    if kind == "localised":
        rates = LOCALISED_RATES
        return [LocalisedFineTuning(base, h, site=site, lr=lr) for site in sites for lr in rates]
    held_moments(base.with_sites(sites), text, ridge=ROME.ridge)
    return [ROME(base, h, text, site=site, clamp=clamp) for site in sites for clamp in (4.0, 12.0)]


def _settings(editor: Editor) -> str:
    """An editor's settings in words."""
    settings: Mapping[str, float | str] = {"edit_lr": editor.hparams.edit_lr}
    if isinstance(editor, Baseline):
        settings = editor.settings
    said = [f"{k} {v}" if isinstance(v, str) else f"{k} {v:g}" for k, v in settings.items()]
    return ", ".join(said)


def running_text(examples: Sequence[EditExample]) -> str:
    """The examples' prompts with their old answers, a line each: a text where there is no other."""
    lines = []
    for example in examples:
        old = example.ground_truth
        lines.append(f"{join(example.prompt, old) if old else example.prompt}.")
    return "\n".join(lines)
