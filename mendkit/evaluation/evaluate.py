"""Scores of edits: teacher-forced and free decoding side by side, with intervals and rows.

f is the unedited model, y the new answer, y° the old one. Teacher forcing reads the given answer;
free decoding is greedy and stops at the end of text, a newline or ".". P(·) compares
length-normalised log-likelihoods. Edits whose new answer f already writes are counted, not scored.
Intervals are bootstrapped over edits: those that one model holds together are not independent, so
there the intervals are too narrow. A classifier writes the label that it predicts.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from ..data.examples import EditExample
from ..errors import DataError, HyperParamError
from ..mend.updates import Updates, relative_norms, scaled
from .many import Editor, in_sequence, one_after_another, so_far, together
from .prepare import EvaluationSet
from .results import EditRow, EvaluationReport, summarise

logger = logging.getLogger(__name__)

MODES = ("single", "batch", "sequential")
EDIT_BATCH = 64
SEQUENCE_BLOCK = 16
NUMBERS = 200_000_000  # in the updates that one pass reads texts under, at most
AFTER = (1, 10, 100, 1000)
NOW = ("neighbourhood.", "locality.", "fluency.")
"""What a sequence's report tells of the model as it is at its end, not right after each edit."""


def evaluate(
    editor: Editor,
    examples: Sequence[EditExample] | EvaluationSet,
    *,
    mode: str = "single",
    k: int | None = None,
    strength: float = 1.0,
    max_new_tokens: int = 50,
    text: str | None = None,
    fluency: bool = False,
) -> EvaluationReport:
    """Score an editor: each edit alone ("single"), `k` at once ("batch"), or all ("sequential").

    Pass an `EvaluationSet` to score several editors of one model on the same examples without
    preparing them again; `max_new_tokens`, `text` and `fluency` are then its own. `strength`
    multiplies every update. The number of edits is part of the result's name: `batch_25`, and
    `sequential_1`, `_10`, `_100`, `_1000` and the last. Raises HyperParamError for another mode or
    a `k` that does not go with it, DataError if there is nothing to score.
    """
    if mode not in MODES:
        raise HyperParamError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (mode == "batch") != (k is not None) or (k is not None and k < 1):
        raise HyperParamError(
            f"k, the number of edits made at once, goes with mode 'batch', got {mode!r} and {k!r}"
        )
    start = time.perf_counter()
    if not isinstance(examples, EvaluationSet):
        examples = EvaluationSet(
            editor.base,
            editor.hparams,
            examples,
            max_new_tokens=max_new_tokens,
            text=text,
            fluency=fluency,
        )
    if not examples.to_edit:
        raise DataError(
            f"the unedited model already writes the new answer of all {len(examples)} examples; "
            "nothing to score"
        )
    run = _Run(editor, examples.at(editor.base), strength * editor.hparams.lr_scale, start)
    if k is not None:
        return run.batches(k)
    return run.single() if mode == "single" else run.sequence()


@dataclass(frozen=True)
class _Run:
    """One editor on one set of examples."""

    editor: Editor
    on: EvaluationSet
    strength: float
    start: float

    def single(self) -> EvaluationReport:
        """Each edit on a fresh model."""
        rows = []

        for index in _chunks(self.on.to_edit, EDIT_BATCH):
            updates, seconds = self._edit(index, at_once=False)
            scores = self.on.score(updates, index)
            norms = torch.stack(list(relative_norms(self.editor.base, updates).values()))
            largest, drawdown = norms.amax(0).tolist(), self._drawdown(updates, len(index))
            for i, after, norm, lost in zip(index, scores, largest, drawdown, strict=True):
                more = {"edit.seconds": seconds, "norm.relative_max": norm} | lost
                rows.append(self.on.row(i, after, more))
        return self._report("single", rows, {})

    def batches(self, k: int) -> EvaluationReport:
        """Groups of k edits in the examples' order, each made at once on a fresh model.

        An incomplete last group is left out and counted.
        """
        index = self.on.to_edit
        groups = [group for group in _chunks(index, k) if len(group) == k]
        if not groups:
            raise DataError(
                f"{len(index)} edits cannot make a batch of {k}; lower k or give more examples"
            )
        rows, models = [], []
        for group in groups:
            updates, seconds = self._edit(group, at_once=True)
            held = together(updates)
            models.append(self._model_values(held))
            for part in _chunks(group, EDIT_BATCH):
                for i, after in zip(part, self.on.score(held, part), strict=True):
                    rows.append(self.on.row(i, after, {"edit.seconds": seconds}))
        shared = {name: fmean(values[name] for values in models) for name in models[0]}
        counts = {"groups": len(groups), "left_out": len(index) - k * len(groups)}
        return self._report(f"batch_{k}", rows, shared, counts)

    def sequence(self) -> EvaluationReport:
        """One edit after another, never reset.

        Scored right after each edit, and again after 1, 10, … and all edits.
        """
        index, editor = self.on.to_edit, in_sequence(self.editor)
        total: Updates = {}
        rows: list[EditRow] = []
        reports: list[EvaluationReport] = []
        stops = sorted({*(t for t in AFTER if t < len(index)), len(index)})
        for begin, end in zip([0, *stops], stops, strict=False):
            for block in _chunks(index[begin:end], SEQUENCE_BLOCK):
                start = time.perf_counter()
                texts = [self.on.prompts[i][0].text for i in block]
                steps = one_after_another(
                    editor, texts, before=total, trunk=self.on.trunk, strength=self.strength
                )
                seconds = (time.perf_counter() - start) / len(block)
                for part in _chunks(list(zip(block, steps, strict=True)), _at_once(steps)):
                    edits, made = zip(*part, strict=True)
                    scores = self.on.score(so_far(made, total), edits)
                    for i, after in zip(edits, scores, strict=True):
                        rows.append(self.on.row(i, after, {"edit.seconds": seconds}))
                    total = together(total, *made)
            reports.append(self._after(rows, total))
            logger.info("sequence: %d of %d edits", end, len(index))
        return replace(reports[-1], earlier=tuple(reports[:-1]))

    def _after(self, rows: Sequence[EditRow], total: Updates) -> EvaluationReport:
        """The report after the edits of `rows`: success as it was then, the rest as it is now."""
        out: list[EditRow] = []
        for part in _chunks(rows, EDIT_BATCH):
            for row, now in zip(part, self.on.score(total, [r.index for r in part]), strict=True):
                values = {
                    name: (now.values if name.startswith(NOW) else row.values)[name]
                    for name in row.values
                }
                success = now.values["edit_success.free_exact"]
                values["retention.all"] = success
                values["retention.tf_token"] = now.values["edit_success.tf_token"]
                if len(out) < 10:
                    values["retention.first_10"] = success
                outputs = [
                    {**output, "end": written, "end_score": scores.get("score")}
                    for output, written, scores in zip(
                        row.outputs, now.written, now.scores, strict=True
                    )
                ]
                out.append(replace(row, values=values, outputs=tuple(outputs)))
        return self._report(f"sequential_{len(rows)}", out, self._model_values(total))

    def _edit(self, index: Sequence[int], *, at_once: bool) -> tuple[Updates, float]:
        """Updates of these examples at the run's strength, and the seconds that an edit took."""
        start = time.perf_counter()
        texts = [self.on.prompts[i][0].text for i in index]
        made = self.editor.updates(texts, trunk=self.on.trunk, at_once=at_once)
        return scaled(made, self.strength), (time.perf_counter() - start) / len(index)

    def _drawdown(self, updates: Updates, n_edits: int) -> list[dict[str, float]]:
        """What each of the edits costs on the held-out text, if there is one."""
        text = self.on.text
        if text is None:
            return [{}] * n_edits
        return [score.drawdown(text.before) for score in text.read(updates, n_edits)]

    def _model_values(self, updates: Updates) -> dict[str, float]:
        """Norms and drawdown of a model that holds many edits."""
        norms = relative_norms(self.editor.base, updates)
        values = {f"norm.relative.{name}": float(norm) for name, norm in norms.items()}
        largest = {"norm.relative_max": max(values.values())}
        return largest | values | self._drawdown(updates, 1)[0]

    def _report(
        self,
        mode: str,
        rows: Sequence[EditRow],
        values: Mapping[str, float],
        more_counts: Mapping[str, int] | None = None,
    ) -> EvaluationReport:
        on = self.on
        counts = {"scored": len(rows), "already_true": len(on) - len(on.to_edit)}
        counts["skipped"] = len(on.skipped)
        for reason in ("empty_target", "too_long", "invalid_records"):
            counts[reason] = on.reasons[reason]
        if mode != "single":
            answers: dict[str, set[str]] = {}
            for row in rows:
                answers.setdefault(row.prompt, set()).add(row.target_new)
            counts["conflicting"] = sum(len(answers[row.prompt]) > 1 for row in rows)
        if on.text:
            before = on.text.before
            texts = {"before.perplexity": before.perplexity, "before.accuracy": before.accuracy}
            values = {**values, **texts}
        return EvaluationReport(
            editor=self.editor.name,
            mode=mode,
            rows=tuple(rows),
            summary=summarise(rows),
            counts=counts | dict(more_counts or {}),
            seconds=time.perf_counter() - self.start,
            values=values,
        )


def _at_once(steps: Sequence[Updates]) -> int:
    """How many steps of a sequence to score in one pass: each holds the tokens of all of them."""
    numbers = [sum(u.u.numel() + u.delta.numel() for u in step.values()) for step in steps]
    return max(1, math.isqrt(NUMBERS // max(numbers)))


def _chunks(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for at in range(0, len(values), size):
        yield list(values[at : at + size])
