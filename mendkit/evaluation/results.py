"""What an evaluation hands back: rows per edit, means with intervals, flat results. Pure data."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np

from ..errors import MendkitError
from ..runs import write_text

RESAMPLES = 2000


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


@dataclass(frozen=True)
class EditRow:
    """One edit: its values by metric name (`before.…` for the unedited model) and what the models wrote."""

    index: int
    id: str | None
    relation: str | None
    prompt: str
    target_new: str
    ground_truth: str | None
    values: Mapping[str, float]
    outputs: tuple[
        Mapping[str, Any], ...
    ] = ()  # prompt, before, after: the edit, its question form, paraphrases


@dataclass(frozen=True)
class EvaluationReport:
    """Rows and their summary. `counts` tells how many edits were scored, already true, and skipped, and why.

    `values` are what a model has once, not once an edit (its perplexity, say). A sequence's `earlier` are the reports
    after fewer edits.
    """

    editor: str
    mode: str
    rows: tuple[EditRow, ...]
    summary: Mapping[str, Interval]
    counts: Mapping[str, int]
    seconds: float
    values: Mapping[str, float] = field(default_factory=dict)
    earlier: tuple["EvaluationReport", ...] = ()

    def results(self, prefix: str = "") -> dict[str, float]:
        """Flat results: `<prefix><mode>.<name>` with `.n`, `.low`, `.high` beside it, and the counts."""
        out: dict[str, float] = {}
        for report in self.earlier:
            out |= report.results(prefix)
        for name, interval in self.summary.items():
            key = f"{prefix}{self.mode}.{name}"
            out[key] = interval.mean
            out |= {
                f"{key}.n": interval.n,
                f"{key}.low": interval.low,
                f"{key}.high": interval.high,
            }
        out |= {
            f"{prefix}{self.mode}.{name}": value
            for name, value in (*self.values.items(), *self.harmonic.items())
        }
        return out | {f"{prefix}{self.mode}.edits.{name}": n for name, n in self.counts.items()}

    @property
    def harmonic(self) -> dict[str, float]:
        """The harmonic means whose shares are all there; none for a sequence, whose shares are not of one time."""
        shares = {
            name: [self.summary[s].mean for s in HARMONIC[name] if s in self.summary]
            for name in HARMONIC
        }
        one_time = "retention.all" not in self.summary
        return {
            n: harmonic_mean(means)
            for n, means in shares.items()
            if one_time and len(means) == len(HARMONIC[n])
        }

    def by(self, key: str, metric: str) -> dict[str, Interval]:
        """A metric's interval by the values of a row attribute, as in `by("relation", "edit_success.free_exact")`."""
        groups: dict[str, list[float]] = {}
        for row in self.rows:
            if metric in row.values:
                groups.setdefault(str(getattr(row, key)), []).append(row.values[metric])
        return {name: Interval.of(values) for name, values in sorted(groups.items())}

    def save_rows(self, path: str | Path) -> Path:
        """Write the rows as JSON lines."""
        text = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in self.rows)
        return write_text(path, text)


def _check(name: str, values: Sequence[tuple[int, float]]) -> None:
    share = name.removeprefix("before.").startswith(SHARES) and not name.endswith("kl_nats")
    for index, value in values:
        if not math.isfinite(value) or (share and not 0 <= value <= 1):
            expected = "a share from 0 to 1" if share else "a finite number"
            raise MendkitError(
                f"{name} of edit {index} is {value}, expected {expected}; its mean would mean nothing"
            )


SHARES = (
    "edit_success.",
    "paraphrase.",
    "neighbourhood.",
    "locality.",
    "retention.",
    "portability.",
)

HARMONIC = {
    "score.harmonic": ("edit_success.es", "paraphrase.ps", "neighbourhood.ns"),
    "score.headline": (
        "edit_success.free_exact",
        "paraphrase.free_exact",
        "neighbourhood.argmax_agreement",
        "locality.argmax_agreement",
    ),
}
"""Harmonic means: of CounterFact's efficacy scores (S), and of the four shares that the kit's editors are chosen by."""


def summarise(rows: Sequence[EditRow]) -> dict[str, Interval]:
    """Every metric's interval over the rows that have it.

    Raises MendkitError if a value is not finite, or a share not between 0 and 1.
    """
    names = sorted({name for row in rows for name in row.values})
    for name in names:
        _check(name, [(row.index, row.values[name]) for row in rows if name in row.values])
    return {
        name: Interval.of([row.values[name] for row in rows if name in row.values])
        for name in names
    }
