"""Results of an evaluation: a row an edit, means with intervals, flat numbers, frames.

Needs no torch.
"""

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.examples import headline_mean
from ..errors import MendkitError
from ..runs import user_path, write_text

RESAMPLES, FEWEST, Z = 2000, 3, 1.96  # of a bootstrap; edits of an interval; normal quantile

# The four shares by which editors are compared, by the role of an example's prompts.
HEADLINE = {
    "edit": "edit_success.free_exact",
    "paraphrases": "paraphrase.free_exact",
    "neighbours": "neighbourhood.argmax_agreement",
    "unrelated": "locality.argmax_agreement",
}
HEADLINE_KEYS = tuple(HEADLINE.values())

# Harmonic means: S of CounterFact's efficacy scores, and the headline score.
HARMONIC = {
    "score.harmonic": ("edit_success.es", "paraphrase.ps", "neighbourhood.ns"),
    "score.headline": HEADLINE_KEYS,
}

# Scores that are also given apart for facts that the unedited model knew, and for the others.
GROUPS = {"known": True, "unknown": False}
APART = (*HEADLINE_KEYS, "neighbourhood.retained", "retention.all")

SHARES = (
    *("edit_success", "paraphrase", "neighbourhood", "locality", "retention", "portability"),
    *("consequence", "context", "negation", "truth", "survival"),
)
LOWER_IS_BETTER = ("negation.", "kl_nats", "log_p.old", "drawdown.", "norm.", "edit.seconds")
ABOUT = ("id", "subject", "relation", "prompt", "target_new", "ground_truth")


# A full stop between digits and a minus before one tell numbers apart, + and # languages.
MARKS = re.compile(
    r"""["'`!?;:()\[\]{},…“”‘’«»。，、！？；：।｡؟،؛]"""
    r"""|(?<!\d)\.|\.(?!\d)|(?<=\w)-(?=\w)|(?<!\S)-(?!\S)"""
)
ARTICLES = re.compile(r"\b(a|an|the)\s+(?=\S)")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no article before a word, single spaces.

    What tells answers apart stays: `C++`, `3.5`, `-5`, `Hepatitis A`, and signs that stand alone.
    """
    text = " ".join(unicodedata.normalize("NFC", text.lower()).split())
    plain = " ".join(MARKS.sub("", text).split())
    return ARTICLES.sub("", plain) or text


def is_said(text: str, answers: Sequence[str], old: str | None = None) -> bool:
    """Whether a text is one of the answers, in other case, punctuation or articles perhaps.

    These count where they are all that differs from the `old` answer.
    """
    if old is not None and old not in answers and normalise(old) in map(normalise, answers):
        return text.strip() in map(str.strip, answers)
    return normalise(text) in map(normalise, answers)


@dataclass(frozen=True)
class Interval:
    """A mean over n edits with its 95 % interval; `low` and `high` are NaN for fewer than three."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], *, share: bool = False, seed: int = 0) -> "Interval":
        """Bootstrap the mean of `values` (at least one).

        A `share` that is 0 or 1 for every edit cannot be resampled: it has Wilson's interval.
        """
        x = np.asarray(values, dtype=np.float64)
        n, mean, low, high = len(x), float(x.mean()), math.nan, math.nan
        if n >= FEWEST and share and mean in (0, 1):
            reach = Z**2 / (n + Z**2)
            low, high = (0.0, reach) if mean == 0 else (1 - reach, 1.0)
        elif n >= FEWEST:
            draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
            low, high = map(float, np.quantile(x[draws].mean(1), [0.025, 0.975]))
        return cls(mean, low, high, n)

    def __str__(self) -> str:
        bounds = "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f}{bounds}, n = {self.n}"

    def to_dict(self, name: str) -> dict[str, float]:
        """Flat results: the mean under `name`, `.n` beside it, and `.low`, `.high` if known."""
        parts = {"": self.mean, ".n": self.n, ".low": self.low, ".high": self.high}
        return {name + part: value for part, value in parts.items() if not math.isnan(value)}


class Summary(dict[str, Interval]):
    """Intervals by metric. An unknown name raises MendkitError, which names the nearest."""

    @classmethod
    def from_dict(cls, results: Mapping[str, Any], prefix: str = "") -> "Summary":
        """The intervals whose flat names start with `prefix`, by the rest of their names.

        Raises MendkitError for a mean without a count.
        """
        found = cls()
        for key in results:
            name, _, part = key.rpartition(".")
            if not key.startswith(prefix) or part not in ("low", "n"):
                continue
            if f"{name}.n" not in results:
                raise MendkitError(f"{name} has no count `{name}.n`; run it again")
            low, high = (results.get(f"{name}.{bound}", math.nan) for bound in ("low", "high"))
            interval = Interval(results[name], low, high, results[f"{name}.n"])
            found[name.removeprefix(prefix)] = interval
        return found

    def __missing__(self, name: str) -> Interval:
        near = difflib.get_close_matches(name, self, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(self))}"
        raise MendkitError(f"no metric {name!r}; {hint}")


@dataclass(frozen=True)
class EditRow:
    """One edit: its values by metric (`before.…`: the unedited model's) and its texts.

    Each of `outputs` has a `role`, a `prompt`, what is written `before` and `after` the edit (None:
    not asked), its `score` (the right answer is written, or the share of argmaxes that stayed), and
    its other scores. After a sequence `end` is what is written after the last edit. `known`:
    whether the unedited model writes the right answer; None where none is given.
    """

    index: int
    id: str | None
    relation: str | None
    prompt: str
    target_new: str
    ground_truth: str | None
    values: Mapping[str, float]
    outputs: tuple[Mapping[str, Any], ...] = ()
    subject: str | None = None
    known: bool | None = None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "EditRow":
        """A row as JSON holds it."""
        return cls(**{**saved, "outputs": tuple(saved["outputs"])})


@dataclass(frozen=True, repr=False)
class EvaluationReport:
    """Rows and their summary; how many edits were scored, already true, or skipped (`counts`).

    `values` are of a model, not of an edit. `earlier`: a sequence's reports after fewer edits.
    """

    editor: str
    mode: str
    rows: tuple[EditRow, ...]
    summary: Mapping[str, Interval]
    counts: Mapping[str, int]
    seconds: float
    values: Mapping[str, float] = field(default_factory=dict)
    earlier: tuple["EvaluationReport", ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationReport":
        """The report of rows that `save_rows` wrote: of a file, or of the folder of one run.

        It has no `values`. Raises MendkitError if there is not one such file.
        """
        given = user_path(path)
        found = [given] if given.is_file() else sorted(given.glob("**/rows.jsonl"))
        if len(found) != 1:
            raise MendkitError(
                f"{path} holds {len(found)} files rows.jsonl, expected one; give the file itself, "
                "or the run folder of notebook 02 or of a report"
            )
        lines = found[0].read_text(encoding="utf-8").splitlines()
        rows = tuple(EditRow.from_dict(json.loads(line)) for line in lines)
        return cls(str(path), "saved", rows, summarise(rows), {"scored": len(rows)}, 0.0)

    def __repr__(self) -> str:
        score = headline_score(self.summary)
        shown = "" if math.isnan(score) else f", headline score {score:.3f}"
        return f"<EvaluationReport of {self.editor}, {self.mode}: {len(self.rows)} edits{shown}>"

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """Flat results: `<prefix><mode>.<name>` with `.n`, `.low`, `.high`; values; counts."""
        out: dict[str, float] = {}
        for report in self.earlier:
            out |= report.to_dict(prefix)
        prefix += f"{self.mode}."
        for name, interval in self.summary.items():
            out |= interval.to_dict(prefix + name)
        numbers = {**self.values, **self.harmonic}
        numbers |= {f"edits.{name}": count for name, count in self.counts.items()}
        return out | {prefix + name: value for name, value in numbers.items()}

    @property
    def harmonic(self) -> dict[str, float]:
        """The harmonic means whose shares are all there, and of one time."""
        found: dict[str, float] = {}
        for prefix in ("", *(f"{group}." for group in GROUPS)):
            for name, shares in HARMONIC.items():
                keys = [prefix + share for share in shares]
                if "retention.all" not in self.summary and set(keys) <= set(self.summary):
                    found[prefix + name] = headline_mean(self.summary[key].mean for key in keys)
        return found

    def by(self, key: str, metric: str) -> dict[str, Interval]:
        """A metric's interval by a column of `frame`, such as "relation"."""
        groups = self.frame().dropna(subset=[metric]).groupby(key, dropna=False)[metric]
        share = _is_share(metric)
        return {str(name): Interval.of(each.tolist(), share=share) for name, each in groups}

    def frame(self) -> pd.DataFrame:
        """A row an edit: which it is, its text `before` and `after`, and a column a metric."""
        records = []
        for row in self.rows:
            first = row.outputs[0] if row.outputs else {}
            written = {name: first.get(name) for name in ("before", "after")}
            about = {name: getattr(row, name) for name in (*ABOUT, "known")}
            records.append({"edit": row.index} | about | written | dict(row.values))
        return pd.DataFrame(records).set_index("edit")

    def texts(self) -> pd.DataFrame:
        """A row a text of an edit: which edit, its role, prompt, before, after, and scores."""
        about = self.frame()[[*ABOUT, "known"]].drop(columns="prompt").reset_index()
        texts = pd.DataFrame(
            [{"edit": row.index} | dict(t) for row in self.rows for t in row.outputs]
        )
        return about.merge(texts, on="edit")

    def save_rows(self, path: str | Path) -> Path:
        """Write the rows as JSON lines."""
        text = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in self.rows)
        return write_text(path, text)


def headline_score(summary: Mapping[str, Interval]) -> float:
    """Harmonic mean of the headline shares that a summary has; NaN if it has none."""
    return headline_mean(summary[name].mean for name in HEADLINE_KEYS if name in summary)


def compare(report_a: EvaluationReport, report_b: EvaluationReport, *metrics: str) -> pd.DataFrame:
    """Paired differences of two reports over the edits that both hold, a row a metric.

    `metrics`: the headline shares if none is named. Columns: the means `a` and `b`, the mean
    `difference` a − b with its 95 % bootstrap interval (`low`, `high`), the number of edits `n`,
    and for how many of them a is `better`, `worse`, `equal`. Raises MendkitError if the reports
    share no edit, or a metric is unknown.
    """
    first, second = _by_edit(report_a), _by_edit(report_b)
    pairs = first.join(second.add_suffix(" of b"), how="inner")
    if pairs.empty:
        raise MendkitError("the two reports share no edit; score both editors on the same examples")
    both = Summary({name: x for name, x in report_a.summary.items() if f"{name} of b" in pairs})
    rows = {}
    for name in metrics or [name for name in HEADLINE_KEYS if name in both]:
        _ = both[name]  # or says which it may be
        columns = pairs[[name, f"{name} of b"]].dropna()
        a, b = columns[name], columns[f"{name} of b"]
        gain, change = Interval.of((a - b).tolist()), a - b
        if name.startswith(LOWER_IS_BETTER) or name.endswith(LOWER_IS_BETTER):
            change = -change
        row = {"a": a.mean(), "b": b.mean(), "difference": gain.mean}
        row |= {"low": gain.low, "high": gain.high, "n": gain.n, "better": (change > 0).sum()}
        rows[name] = row | {"worse": (change < 0).sum(), "equal": (change == 0).sum()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")


def _by_edit(report: EvaluationReport) -> pd.DataFrame:
    """A report's frame by edit; of several equal edits the k-th is another than the first."""
    frame, edit = report.frame(), ["id", "prompt", "target_new"]
    frame["repeat"] = frame.groupby(edit, dropna=False).cumcount()
    return frame.set_index([*edit, "repeat"])


def summarise(rows: Sequence[EditRow]) -> Summary:
    """Every metric's interval over the rows that have it; `APART` also by what was known.

    Raises MendkitError if a value is not finite, or a share not between 0 and 1.
    """
    by_metric: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.values.items():
            share = _is_share(name)
            if not math.isfinite(value) or (share and not 0 <= value <= 1):
                expected = "a share from 0 to 1" if share else "a finite number"
                raise MendkitError(
                    f"{name} of edit {row.index} is {value}, expected {expected}; "
                    "the mean would be meaningless"
                )
            by_metric.setdefault(name, []).append(value)
    found = Summary()
    for name in sorted(by_metric):
        found[name] = Interval.of(by_metric[name], share=_is_share(name))
    for group, known in GROUPS.items():
        of_group = [row.values for row in rows if row.known is known]
        for name in APART:
            if values := [each[name] for each in of_group if name in each]:
                found[f"{group}.{name}"] = Interval.of(values, share=True)
    return found


def _is_share(metric: str) -> bool:
    part = metric.removeprefix("before.").partition(".")[0]
    return part in SHARES and not metric.endswith("kl_nats")
