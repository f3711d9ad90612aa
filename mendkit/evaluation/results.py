"""Results of an evaluation: a row an edit, means with intervals, flat numbers, frames.

Needs no torch.
"""

import difflib
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
import pandas as pd

from ..data.examples import HEADLINE_ROLES, headline_mean
from ..errors import MendkitError
from ..runs import write_text

RESAMPLES = 2000

HEADLINE_KEYS = (
    "edit_success.free_exact",
    "paraphrase.free_exact",
    "neighbourhood.argmax_agreement",
    "locality.argmax_agreement",
)
HEADLINE = dict(zip(HEADLINE_ROLES, HEADLINE_KEYS, strict=True))
"""The four shares by which editors are compared: an example's role, and the name of its result."""

HARMONIC = {
    "score.harmonic": ("edit_success.es", "paraphrase.ps", "neighbourhood.ns"),
    "score.headline": HEADLINE_KEYS,
}
"""Harmonic means: of CounterFact's efficacy scores (S), and of the headline shares."""

SHARE_PARTS = (
    "edit_success",
    "paraphrase",
    "neighbourhood",
    "locality",
    "retention",
    "portability",
)
LOWER_IS_BETTER = ("kl_nats", "log_p.old", "drawdown.", "norm.", "edit.seconds")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no a/an/the, single spaces: how written answers are compared."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in {"a", "an", "the"})


@dataclass(frozen=True)
class Interval:
    """A mean over n edits with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], *, seed: int = 0) -> "Interval":
        """Bootstrap the mean of `values` (at least one)."""
        x = np.asarray(values, dtype=np.float64)
        draws = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
        low, high = np.quantile(x[draws].mean(1), [0.025, 0.975])
        return cls(float(x.mean()), float(low), float(high), len(x))

    def to_dict(self, name: str) -> dict[str, float]:
        """Flat results: the mean under `name`, and `.n`, `.low`, `.high` beside it."""
        parts = {"": self.mean, ".n": self.n, ".low": self.low, ".high": self.high}
        return {name + part: value for part, value in parts.items()}


class Summary(dict[str, Interval]):
    """Intervals by metric. An unknown name raises MendkitError, which names the nearest."""

    @classmethod
    def from_dict(cls, results: Mapping[str, Any], prefix: str = "") -> "Summary":
        """The intervals whose flat names start with `prefix`, by the rest of their names.

        Raises MendkitError for a mean without a count.
        """
        found = cls()
        for key in results:
            if key.startswith(prefix) and key.endswith(".low"):
                name = key.removesuffix(".low")
                if f"{name}.n" not in results:
                    raise MendkitError(f"{name} has no count `{name}.n`; run it again")
                parts = (results[name + part] for part in ("", ".low", ".high", ".n"))
                found[name.removeprefix(prefix)] = Interval(*parts)
        return found

    def __missing__(self, name: str) -> Interval:
        raise _unknown(name, self)


def _unknown(name: str, known: Mapping[str, Any]) -> MendkitError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
    return MendkitError(f"no metric {name!r}; {hint}")


@dataclass(frozen=True)
class EditRow:
    """One edit: its values by metric (`before.…`: the unedited model's) and its texts.

    Each of `outputs` has a `role`, a `prompt`, what is written `before` and `after` the edit (None:
    not asked), its `score` (the right answer is written, or the share of argmaxes that stayed), and
    its other scores. After a sequence `end` is what is written after the last edit.
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

    @property
    def about(self) -> dict[str, Any]:
        """Which edit it is."""
        names = ("id", "subject", "relation", "prompt", "target_new", "ground_truth")
        return {name: getattr(self, name) for name in names}


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
        for name, value in (*self.values.items(), *self.harmonic.items()):
            out[prefix + name] = value
        for name, count in self.counts.items():
            out[f"{prefix}edits.{name}"] = count
        return out

    @property
    def harmonic(self) -> dict[str, float]:
        """The harmonic means whose shares are all there, and of one time."""
        if "retention.all" in self.summary:
            return {}
        found = {}
        for name, shares in HARMONIC.items():
            if all(share in self.summary for share in shares):
                found[name] = harmonic_mean([self.summary[share].mean for share in shares])
        return found

    def by(self, key: str, metric: str) -> dict[str, Interval]:
        """A metric's interval by a row's attribute, such as "relation"."""
        groups: dict[str, list[float]] = {}
        for row in self.rows:
            if metric in row.values:
                groups.setdefault(str(getattr(row, key)), []).append(row.values[metric])
        return {name: Interval.of(values) for name, values in sorted(groups.items())}

    def frame(self) -> pd.DataFrame:
        """A row an edit: which it is, its text `before` and `after`, and a column a metric."""
        records = []
        for row in self.rows:
            first = row.outputs[0] if row.outputs else {}
            written = {name: first.get(name) for name in ("before", "after")}
            records.append(row.about | written | dict(row.values))
        index = pd.Index([row.index for row in self.rows], name="edit")
        return pd.DataFrame.from_records(records, index=index)

    def texts(self) -> pd.DataFrame:
        """A row a text of an edit: which edit, its role, prompt, before, after, and scores."""
        records = []
        for row in self.rows:
            about = row.about
            del about["prompt"]  # the text has its own
            records += [{"edit": row.index, **about, **output} for output in row.outputs]
        return pd.DataFrame.from_records(records)

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
    pairs = _frame_of_edits(report_a).join(
        _frame_of_edits(report_b).add_suffix(" of b"), how="inner"
    )
    if pairs.empty:
        raise MendkitError("the two reports share no edit; score both editors on the same examples")
    both = {name: None for name in report_a.summary if name in report_b.summary}
    rows = {}
    for name in metrics or [name for name in HEADLINE_KEYS if name in both]:
        if name not in both:
            raise _unknown(name, both)
        columns = pairs[[name, f"{name} of b"]].dropna()
        a, b = columns[name], columns[f"{name} of b"]
        gain, change = Interval.of((a - b).tolist()), a - b
        if name.startswith(LOWER_IS_BETTER) or name.endswith(LOWER_IS_BETTER):
            change = -change
        row = {"a": a.mean(), "b": b.mean(), "difference": gain.mean}
        row |= {"low": gain.low, "high": gain.high, "n": gain.n, "better": (change > 0).sum()}
        rows[name] = row | {"worse": (change < 0).sum(), "equal": (change == 0).sum()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")


def _frame_of_edits(report: EvaluationReport) -> pd.DataFrame:
    """A report's frame by edit; of several equal edits the k-th is another than the first."""
    frame, edit = report.frame(), ["id", "prompt", "target_new"]
    frame["repeat"] = frame.groupby(edit, dropna=False).cumcount()
    return frame.set_index([*edit, "repeat"])


def summarise(rows: Sequence[EditRow]) -> Summary:
    """Every metric's interval over the rows that have it.

    Raises MendkitError if a value is not finite, or a share not between 0 and 1.
    """
    by_metric: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.values.items():
            _check_value(name, value, row.index)
            by_metric.setdefault(name, []).append(value)
    return Summary((name, Interval.of(by_metric[name])) for name in sorted(by_metric))


def _check_value(name: str, value: float, index: int) -> None:
    part = name.removeprefix("before.").partition(".")[0]
    share = part in SHARE_PARTS and not name.endswith("kl_nats")
    if math.isfinite(value) and (not share or 0 <= value <= 1):
        return
    expected = "a share from 0 to 1" if share else "a finite number"
    raise MendkitError(
        f"{name} of edit {index} is {value}, expected {expected}; its mean would mean nothing"
    )
