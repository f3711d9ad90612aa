"""Controls: editors that an editor must beat to have learned something.

MEND at identity initialisation; plain gradient descent on the same layers, with or without a cap on the change; and
the new fact put before every prompt, which changes no weight.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, harmonic_mean

import torch

from .data import EditExample, Probe, Tokens
from .edit import Edit, LowRankUpdate, Updates, padded, side_branches
from .editor import MENDEditor, scaled
from .errors import HyperParamError, LimitError
from .evaluate import HARMONIC, EvaluationReport, EvaluationSet, evaluate
from .factors import capture_factors
from .hparams import MENDHyperParams
from .many import Editor, relative_norms, together
from .mend import MEND
from .models import BaseModel
from .scores import summarise
from .texts import edit_tokens, prepare_texts, told
from .trunk import FrozenTrunk
from .validation import validate

IDENTITY_EDIT_LRS = (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)


def identity_editor(base: BaseModel, mend: MEND, /, *, edit_lr: float) -> MENDEditor:
    """MEND at identity initialisation: the normalised gradient with one step size, `mend`'s statistics, no training."""
    fresh = MEND(mend.sites, mend.hparams.replace(edit_lr=edit_lr, init="id_xavier")).to(base.device)
    fresh.moments.load_state_dict(mend.moments.state_dict())
    return MENDEditor(base, fresh, name="identity")


def tune_identity(
    base: BaseModel,
    mend: MEND,
    examples: Sequence[EditExample],
    /,
    *,
    edit_lrs: Sequence[float] = IDENTITY_EDIT_LRS,
) -> tuple[MENDEditor, tuple[dict[str, float], ...]]:
    """The identity control at the step size with the best validation score on `examples`, and one row per step size.

    Rows hold `edit_lr` and the values of `validate`.
    """
    texts, trunk = prepare_texts(base, mend.hparams, examples), FrozenTrunk(base)
    trunk.fill([text for example in texts for text in example.all()])
    unit = identity_editor(base, mend, edit_lr=1.0).mend
    rows = tuple(
        {"edit_lr": edit_lr, **validate(trunk, unit, texts, mend.hparams, strength=edit_lr)} for edit_lr in edit_lrs
    )
    best = max(rows, key=lambda row: row["score"])
    return identity_editor(base, mend, edit_lr=best["edit_lr"]), rows


class FineTuning:
    """Gradient descent on the new answer's loss, at the edit sites: ΔW = −lr Σ_steps Σ_t delta_t u_tᵀ, so of low rank.

    `cap` bounds ‖ΔW‖_F / ‖W‖_F of every site, after each step. Several edits at once descend on the mean of their
    losses. Only texts are made by `hparams`.
    """

    def __init__(
        self, base: BaseModel, hparams: MENDHyperParams, /, *, lr: float, steps: int = 10, cap: float | None = None
    ) -> None:
        if lr <= 0 or steps < 1 or (cap is not None and cap <= 0):
            raise HyperParamError(f"lr, cap must be positive and steps at least 1, got {lr}, {cap}, {steps}")
        self.base, self.hparams = base, hparams.replace(lr_scale=1.0)
        self.lr, self.steps, self.cap = lr, steps, cap
        self.name = "fine-tuning" if cap is None else "fine-tuning, capped"

    def updates(
        self, texts: Sequence[Tokens], /, *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or one of all."""
        trunk, n = trunk or FrozenTrunk(self.base), len(texts)
        made: Updates = {}
        for _ in range(self.steps):
            with side_branches(self.base, made):
                factors = capture_factors(trunk, texts)
            step = {
                name: LowRankUpdate(padded(f.u, f.rows, n), padded(f.delta, f.rows, n), -self.lr)
                for name, f in factors.items()
            }
            if at_once:
                made = together(*([made] if made else []), scaled(step, 1 / n))
            else:
                made = {name: _longer(made[name], u) if made else u for name, u in step.items()}
            made = self._capped(made)
        return made

    def edit(self, examples: EditExample | Sequence[EditExample]) -> Edit:
        """One edit from one example, or one from several at once."""
        several = [examples] if isinstance(examples, EditExample) else list(examples)
        texts = [edit_tokens(self.base, self.hparams, example) for example in several]
        return Edit(self.base, self.updates(texts, at_once=True), several)

    def _capped(self, updates: Updates) -> Updates:
        if self.cap is None:
            return updates
        share = {
            name: (self.cap / n.clamp(min=1e-30)).clamp(max=1) for name, n in relative_norms(self.base, updates).items()
        }
        return {name: replace(u, delta=u.delta * share[name][:, None, None].to(u.delta)) for name, u in updates.items()}


def _longer(a: LowRankUpdate, b: LowRankUpdate) -> LowRankUpdate:
    delta = torch.cat([a.coefficient * a.delta, b.coefficient * b.delta], 1)
    return LowRankUpdate(torch.cat([a.u, b.u], 1), delta, 1.0)


def best_of(editors: Sequence[Editor], on: EvaluationSet, /) -> tuple[Editor, tuple[EvaluationReport, ...]]:
    """The editor with the best headline score (harmonic mean of its shares that `on` has), and everyone's report."""
    reports = tuple(evaluate(editor, on) for editor in editors)
    scores = [harmonic_mean([r.summary[s].mean for s in HARMONIC["score.headline"] if s in r.summary]) for r in reports]
    return editors[scores.index(max(scores))], reports


def fact_in_context(on: EvaluationSet, /) -> EvaluationReport:
    """The control that edits nothing: every prompt is read with the new fact before it.

    Success, paraphrases and neighbours' answers are what the unedited model makes of that; agreement is with what it
    says without the fact. Raises LimitError where a prompt becomes too long.
    """
    start = time.perf_counter()
    context = EvaluationSet(on.base, on.hparams, [_told(e) for e in on.examples], max_new_tokens=on.max_new_tokens)
    if len(context) != len(on):
        raise LimitError(f"with the fact before it: {context.skipped[0]}")
    rows = []
    for i in on.to_edit:
        n, m = len(on.cards[i].neighbours), len(on.cards[i].neighbours) + len(on.cards[i].unrelated)
        pairs = list(zip(context.kept_before[i][:m], on.kept_before[i][:m], strict=True))
        values = dict(context.before[i])
        for name, part in (("neighbourhood", pairs[:n]), ("locality", pairs[n:])):
            if part:
                values[f"{name}.argmax_agreement"] = fmean(_agreement(a.argmax, b.argmax) for a, b in part)
        rows.append(on.row(i, values, context.written[i]))
    counts = {"scored": len(rows), "already_true": len(on) - len(rows), "skipped": len(on.skipped)}
    seconds = time.perf_counter() - start
    return EvaluationReport("fact in context", "single", tuple(rows), summarise(rows), counts, seconds)


def _agreement(a: Sequence[int], b: Sequence[int]) -> float:
    return fmean(x == y for x, y in zip(a, b, strict=True))


def _told(e: EditExample) -> EditExample:
    """The example with the new fact before each of its prompts."""

    def probes(role: Sequence[Probe]) -> tuple[Probe, ...]:
        return tuple(replace(probe, prompt=told(e, probe.prompt)) for probe in role)

    return replace(
        e,
        prompt=told(e, e.prompt),
        paraphrases=tuple(told(e, prompt) for prompt in e.paraphrases),
        neighbours=probes(e.neighbours),
        unrelated=probes(e.unrelated),
        relation=None,
        portability=(),
        generation_prompts=(),
    )
