"""Scores of edits, each alone, several at once, or one after another, never reset.

f is the unedited model, y the new answer, y° the old one. Teacher forcing reads the given answer;
free decoding is greedy and stops at the end of text, a newline or ".". P(·) compares
length-normalised log-likelihoods. Edits whose new answer f already writes are counted, not scored.
Intervals are bootstrapped over edits. Those that one model holds together are not independent, so
there the intervals are too narrow. A classifier writes the label that it predicts.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch

from ..data.examples import EditExample
from ..errors import DataError, HyperParamError
from ..hparams import MENDHyperParams
from ..mend.updates import (
    LowRankUpdate,
    Updates,
    relative_norms,
    scaled,
    side_branches,
    side_by_side,
    summed,
)
from ..models.base import BaseModel
from ..models.fingerprint import model_fingerprint, tensors_sha256
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk
from ..runs import provenance, sha256
from .prepare import EvaluationSet
from .results import EditRow, EvaluationReport, summarise
from .rows import Kept, Part, keeping

logger = logging.getLogger(__name__)

MODES = ("single", "batch", "sequential")
EDIT_BATCH, SEQUENCE_BLOCK = 32, 16
NUMBERS = 200_000_000  # in the updates that one pass reads texts under, at most
AFTER = (1, 10, 100, 1000)
# What a sequence's report tells of the model as it is at its end, not right after each edit.
NOW = ("neighbourhood.", "locality.", "fluency.")


@runtime_checkable
class Editor(Protocol):
    """What makes edits: MEND, or a baseline. `hparams` says how texts are made."""

    base: BaseModel
    name: str

    @property
    def hparams(self) -> MENDHyperParams: ...

    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None, at_once: bool
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or all made at once."""


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

    An `EvaluationSet` serves several editors of one model, and has its own `max_new_tokens`.
    `strength` multiplies every update. The number of edits is part of the result's name:
    `batch_25`, and `sequential_1`, `_10`, `_100`, `_1000` and the last. `rows`: a file (JSON lines)
    for the rows. They are kept as they are made, beside it, and the same call goes on from them;
    meanwhile its folder is locked. Raises HyperParamError for another mode or a `k` that does not
    go with it, DataError if there is nothing to score, MendkitError for rows of another evaluation.
    """
    if mode not in MODES:
        raise HyperParamError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (mode == "batch") != (k is not None) or (k is not None and k < 1):
        raise HyperParamError(
            f"k, the number of edits made at once, goes with mode 'batch', got {mode!r} and {k!r}"
        )
    start, on = time.perf_counter(), examples
    if not isinstance(on, EvaluationSet):
        on = EvaluationSet(editor.base, editor.hparams, on, max_new_tokens=max_new_tokens)
    if not on.to_edit:
        raise DataError(
            f"the unedited model already writes the new answer of all {len(on)} examples; "
            "nothing to score"
        )
    on = on.at(editor.base)
    strength *= editor.hparams.lr_scale
    with keeping(rows, lambda: _run_of(editor, on, mode, k, strength)) as kept:
        run = _Run(editor, on, strength, start, kept)
        if k is not None:
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
    return {
        "mode": mode if k is None else f"{mode} of {k}",
        "strength": strength,
        "editor": editor.name,
        "settings": dict(getattr(editor, "settings", {})),
        "hyperparameters": {**editor.hparams.to_dict(), "archive": None},
        "archive": mend and tensors_sha256(mend.state_dict().items()),
        "base model": model_fingerprint(on.base),
        "examples": sha256(repr(on.examples)),
        "texts": [on.max_new_tokens, on.fluency, sha256(repr(windows))],
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
                texts = [self.on.prompts[i][0].text for i in block]
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

    def _edit(self, index: Sequence[int], *, at_once: bool) -> tuple[Updates, float]:
        """Updates of these examples at the run's strength, and the seconds that an edit took."""
        start = time.perf_counter()
        texts = [self.on.prompts[i][0].text for i in index]
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


# --------------------------------------------------------------------- many edits of one model


def in_sequence(editor: Editor) -> Editor:
    """The editor as it starts a sequence: one that remembers its edits gets an empty memory."""
    return editor.remembering() if hasattr(editor, "remembering") else editor


def one_after_another(
    editor: Editor, texts: Sequence[Tokens], *, trunk: FrozenTrunk, strength: float = 1.0
) -> list[Updates]:
    """Updates of edits in sequence: each is made on the model as edited by all before it."""
    steps: list[Updates] = []
    for text in texts:
        with side_branches(editor.base, together(*steps)):
            made = editor.updates([text], trunk=trunk, at_once=True)
        steps.append(scaled(made, strength))
    return steps


def so_far(steps: Sequence[Updates]) -> Updates:
    """For each step an edit that holds it and all steps before it."""
    out, order = {}, torch.arange(len(steps))
    for name in steps[0]:
        whole = side_by_side([step[name] for step in steps])
        counts = torch.tensor([step[name].u.shape[1] for step in steps])
        step_of_token = order.repeat_interleave(counts)
        made = (step_of_token[None, :] <= order[:, None]).to(whole.delta)
        u = whole.u.expand(len(steps), -1, -1)
        out[name] = LowRankUpdate(u, whole.delta * made[:, :, None], 1.0)
    return out


def together(*updates: Updates) -> Updates:
    """The sum of all edits in all `updates` as one edit (b = 1), which serves any texts.

    A site's tokens add up. Beyond twice its smaller width its update is written as ΔW times a
    unit matrix, so that a thousand edits cost about as much as the layer itself.
    """
    out: Updates = {}
    held = [update for update in updates if update]
    for name in held[0] if held else ():
        out[name] = whole = side_by_side([summed(update[name]) for update in held])
        width = min(whole.u.shape[2], whole.delta.shape[2])
        if whole.u.shape[1] > 2 * width:
            change = whole.dense()[None]
            one = torch.eye(width, dtype=change.dtype, device=change.device)[None]
            pair = (one, change.mT) if whole.u.shape[2] == width else (change, one)
            out[name] = LowRankUpdate(*pair, 1.0)
    return out
