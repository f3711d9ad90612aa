"""Scores of edits, each alone, several at once, or one after another, never reset.

f is the unedited model, y the new answer, y° the old one. Teacher forcing reads the given answer;
free decoding is greedy and stops at the end of text, a newline or ".". P(·) compares
length-normalised log-likelihoods. Edits whose new answer f already writes are counted, not scored.
Intervals are bootstrapped over edits. Those that one model holds together are not independent, so
there the intervals are too narrow. A classifier writes the label that it predicts.
"""

import logging
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch

from ..data.examples import EditExample
from ..errors import DataError, HyperParamError
from ..mend.batches import inner_tokens
from ..mend.updates import Updates, relative_norms, scaled, select, side_branches
from ..models.fingerprint import model_fingerprint, tensors_sha256
from ..models.tokens import Tokens
from ..runs import provenance, sha256
from .prepare import EvaluationSet
from .results import EditRow, EvaluationReport, summarise
from .rows import Kept, Part, keeping
from .sequences import Editor, Growing, in_sequence, one_after_another, so_far, together
from .survival import survival

logger = logging.getLogger(__name__)

MODES = {
    "single": "each edit on a fresh model",
    "batch": "{k} edits at once on a fresh model",
    "sequential": "one edit after another, never reset, scored right after each and at the end",
    "locft": "all edits {k} at once, one such group after another, never reset, scored at the end",
}
"""In words; `k` edits are made at once."""

EDIT_BATCH, SEQUENCE_BLOCK = 32, 16
LOCFT_AFTER, LOCFT_SAMPLE = (1, 10, 30, 100, 300, 1000, 3000), 100
NUMBERS = 200_000_000  # in the updates that one pass reads texts under, at most
AFTER = (1, 10, 100, 1000)
# What a sequence's report tells of the model as it is at its end, not right after each edit.
NOW = ("neighbourhood.", "locality.", "fluency.")


def evaluate(
    editor: Editor,
    examples: Sequence[EditExample] | EvaluationSet,
    *,
    mode: str = "single",
    k: int | None = None,
    strength: float = 1.0,
    max_new_tokens: int = 50,
    rows: str | Path | None = None,
) -> EvaluationReport:
    """Score an editor: each edit alone ("single"), `k` at once ("batch"), or all ("sequential").

    "locft", the protocol of Yang et al. (arXiv 2509.22072) for thousands: all edits are made, one
    after another or `k` at once, and scored at the end; on the way the retention of a sample.
    An `EvaluationSet` serves several editors of one model, and has its own `max_new_tokens`; for
    "locft" it should be `brief`. `strength` multiplies every update. The number of edits is part of
    the result's name: `batch_25`, `sequential_1`, `_10`, `_100`, `_1000` and the last, and
    `locft_3000` or `locft_3000_by_100`. `rows`: a file (JSON lines) for the rows. They are kept as
    they are made, beside it, and the same call goes on from them; meanwhile its folder is locked.
    Raises HyperParamError for another mode or a `k` that does not go with it, DataError if there is
    nothing to score, MendkitError for rows of another evaluation.
    """
    if mode not in MODES:
        raise HyperParamError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    wrong = mode == "batch" if k is None else mode not in ("batch", "locft") or k < 1
    if wrong:
        raise HyperParamError(
            f"k, the number of edits made at once, goes with mode 'batch', got {mode!r} and {k!r}"
        )
    start, on = time.perf_counter(), examples
    if not isinstance(on, EvaluationSet):
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "brief": mode == "locft"}
        on = EvaluationSet(editor.base, editor.hparams, on, **how)
    if not on.to_edit:
        raise DataError(
            f"the unedited model already writes the new answer of all {len(on)} examples; "
            "nothing to score"
        )
    on = on.at(editor.base)
    strength *= editor.hparams.lr_scale
    with keeping(rows, lambda: _run_of(editor, on, mode, k, strength)) as kept:
        run = _Run(editor, on, strength, start, kept)
        if mode == "locft":
            report = run.locft(k or 1)
        elif k is not None:
            report = run.batches(k)
        else:
            report = run.single() if mode == "single" else run.sequence()
        if rows is not None:
            report.save_rows(rows)
    return report


def _run_of(
    editor: Editor, on: EvaluationSet, mode: str, k: int | None, strength: float
) -> dict[str, Any]:
    """What an evaluation is of: it goes on only from rows of the same."""
    mend, versions = getattr(editor, "mend", None), provenance()["versions"]
    windows = on.text and [part.ids for part in on.text.windows]
    texts = [on.max_new_tokens, on.fluency, on.brief, on.follow, sha256(repr(windows))]
    texts += [on.survival] * (on.survival > 0)
    return {
        "mode": mode if k is None else f"{mode} of {k}",
        "strength": strength,
        "editor": editor.name,
        "settings": dict(getattr(editor, "settings", {})),
        "hyperparameters": {**editor.hparams.to_dict(), "archive": None},
        "archive": mend and tensors_sha256(mend.state_dict().items()),
        "base model": model_fingerprint(on.base),
        "examples": sha256(repr([(e, e.roles()) for e in on.examples])),
        "texts": texts,
        "versions": {name: versions[name] for name in ("mendkit", "torch", "transformers")},
    }


@dataclass(frozen=True)
class _Run:
    """One editor on one set of examples."""

    editor: Editor
    on: EvaluationSet
    strength: float
    start: float
    kept: Kept

    def single(self) -> EvaluationReport:
        """Each edit on a fresh model."""
        rows: list[EditRow] = []
        for index in _chunks(self.on.to_edit, EDIT_BATCH):
            rows += self.kept.once(partial(self._alone, index))[0]
        return self._report("single", rows, {})

    def _alone(self, index: Sequence[int]) -> Part:
        updates, seconds = self._edit(index, at_once=False)
        norms = torch.stack(list(relative_norms(self.editor.base, updates).values()))
        rows, lost = self._rows(index, updates, seconds), self._drawdown(updates, len(index))
        for k, norm in enumerate(norms.amax(0).tolist()):
            values = {**rows[k].values, **lost[k], "norm.relative_max": norm}
            i, held = index[k], values["edit_success.free_exact"]
            if held and i in self.on.to_edit[: self.on.survival]:
                values |= survival(self.on, select(updates, [k]), i)
            rows[k] = replace(rows[k], values=values)
        return rows, {}

    def batches(self, k: int) -> EvaluationReport:
        """Groups of k edits in the examples' order, each made at once on a fresh model.

        An incomplete last group is left out and counted.
        """
        index, rows, models = self.on.to_edit, [], []
        for group in _chunks(index[: len(index) // k * k], k):
            made, found = self.kept.once(partial(self._group, group))
            rows += made
            models.append(found)
        if not rows:
            raise DataError(
                f"{len(index)} edits cannot make a batch of {k}; lower k or give more examples"
            )
        values = {name: fmean(found[name] for found in models) for name in models[0]}
        counts = {"groups": len(models), "left_out": len(index) - len(rows)}
        return self._report(f"batch_{k}", rows, values, counts)

    def _group(self, index: Sequence[int]) -> Part:
        updates, seconds = self._edit(index, at_once=True)
        held = together(updates)
        return self._rows(index, held, seconds), self._model_values(held)

    def sequence(self) -> EvaluationReport:
        """One edit after another, never reset.

        Scored right after each edit, and again after 1, 10, … and all edits.
        """
        index, editor = self.on.to_edit, in_sequence(self.editor)
        total: Updates = {}
        rows: list[EditRow] = []
        reports: list[EvaluationReport] = []
        stops = sorted({0, len(index), *(t for t in AFTER if t < len(index))})
        for begin, end in pairwise(stops):
            for block in _chunks(index[begin:end], SEQUENCE_BLOCK):
                start = time.perf_counter()
                texts = self._texts(block)
                with side_branches(self.on.base, total):
                    steps = one_after_another(
                        editor, texts, trunk=self.on.trunk, strength=self.strength
                    )
                seconds, size = (time.perf_counter() - start) / len(block), _at_once(steps)
                for edits, made in zip(_chunks(block, size), _chunks(steps, size), strict=True):
                    with side_branches(self.on.base, total):
                        rows += self.kept.once(partial(self._made, edits, made, seconds))[0]
                    total = together(total, *made)
            reports.append(self._after(rows, total))
            logger.info("sequence: %d of %d edits", end, len(index))
        return replace(reports[-1], earlier=tuple(reports[:-1]))

    def _made(self, index: Sequence[int], steps: Sequence[Updates], seconds: float) -> Part:
        return self._rows(index, so_far(steps), seconds), {}

    def _after(self, rows: Sequence[EditRow], total: Updates) -> EvaluationReport:
        """The report after the edits of `rows`: success as it was then, the rest as it is now."""
        out: list[EditRow] = []
        index = [row.index for row in rows]
        ends, values = self.kept.once(partial(self._at_end, index, total))
        for row, end in zip(rows, ends, strict=True):
            now = {name: value for name, value in end.values.items() if name.startswith(NOW)}
            now["retention.all"] = end.values["edit_success.free_exact"]
            now["retention.tf_token"] = end.values["edit_success.tf_token"]
            if len(out) < 10:
                now["retention.first_10"] = now["retention.all"]
            outputs = []
            for text, left in zip(row.outputs, end.outputs, strict=True):
                outputs.append({**text, "end": left["after"], "end_score": left.get("score")})
            out.append(replace(row, values={**row.values, **now}, outputs=tuple(outputs)))
        return self._report(f"sequential_{len(rows)}", out, values)

    def _at_end(self, index: Sequence[int], total: Updates) -> Part:
        return self._rows(index, total, 0.0), self._model_values(total)

    def locft(self, k: int) -> EvaluationReport:
        """All edits, `k` at once, on one model; then all scores."""
        index, on = self.on.to_edit, self.on
        texts = self._texts(index)
        model = Growing(self.editor, texts, on.trunk, k, self.strength, self.kept.state)
        # 1. All edits; on the way, how many of a fixed sample hold.
        drawn = random.Random(self.editor.hparams.seed).sample(range(len(index)), len(index))
        ends = [min(-(-after // k) * k, len(index)) for after in (*LOCFT_AFTER, len(index))]
        values: dict[str, float] = {}
        for end in sorted(set(ends)):
            model.go_on(end)
            sample = [index[at] for at in drawn if at < end][:LOCFT_SAMPLE]
            held = self.kept.once(partial(self._holding, sample, model.total))[1]
            values |= {f"retention.after_{end}": held["held"]}
            values |= {f"retention.after_{end}.n": len(sample)}
            logger.info("%d of %d edits: %.2f of a sample hold", end, len(index), held["held"])
        # 2. All scores.
        seconds, rows = model.seconds / len(index), list[EditRow]()
        for part in _chunks(index, EDIT_BATCH):
            rows += self.kept.once(partial(self._made, part, [model.total], seconds))[0]
        values |= self.kept.once(partial(self._at_end, [], model.total))[1]
        return self._report(f"locft_{len(index)}" + (f"_by_{k}" if k > 1 else ""), rows, values)

    def _holding(self, index: Sequence[int], total: Updates) -> Part:
        return [], {"held": fmean(self.on.holds(total, index))}

    def _texts(self, index: Sequence[int]) -> list[Tokens]:
        """What this editor edits with: answers, or passages."""
        h = self.on.hparams.model_copy(update={"edit_on": self.editor.hparams.edit_on})
        return [inner_tokens(self.on.base, h, self.on.examples[i]) for i in index]

    def _edit(self, index: Sequence[int], *, at_once: bool) -> tuple[Updates, float]:
        """Updates of these examples at the run's strength, and the seconds that an edit took."""
        start = time.perf_counter()
        texts = self._texts(index)
        made = self.editor.updates(texts, trunk=self.on.trunk, at_once=at_once)
        return scaled(made, self.strength), (time.perf_counter() - start) / len(index)

    def _rows(self, index: Sequence[int], updates: Updates, seconds: float) -> list[EditRow]:
        """Rows of these examples under their edits, or under one that they share."""
        rows = []
        for part in _chunks(index, EDIT_BATCH):
            for row in self.on.score(updates, part):
                rows.append(replace(row, values={**row.values, "edit.seconds": seconds}))
        return rows

    def _drawdown(self, updates: Updates, n_edits: int) -> list[dict[str, float]]:
        """Perplexity gained and accuracy lost on the held-out text, if any (MEND, section 3)."""
        text = self.on.text
        if text is None:
            return [{}] * n_edits
        costs = []
        for score in text.read(self.on.trunk, updates, n_edits):
            gained = score.perplexity - text.before.perplexity
            lost = text.before.accuracy - score.accuracy
            costs.append({"drawdown.perplexity": gained, "drawdown.accuracy": lost})
        return costs

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
        counts |= {"skipped": len(on.skipped), **on.reasons, **(more_counts or {})}
        if mode != "single":
            answers = pd.DataFrame([[row.prompt, row.target_new] for row in rows])
            several = answers.groupby(0)[1].transform("nunique") > 1
            counts["conflicting"] = int(several.sum())
        if on.text:
            before = {f"before.{name}": v for name, v in on.text.before._asdict().items()}
            values = {**values, **before}
        return EvaluationReport(
            editor=self.editor.name,
            mode=mode,
            rows=tuple(rows),
            summary=summarise(rows),
            counts=counts,
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
