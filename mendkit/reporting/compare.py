"""What the runs of a sweep came to, side by side: for the notebook `08_compare_runs`."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from statistics import harmonic_mean
from typing import Any
from urllib.parse import quote

from ..errors import MendkitError
from ..evaluation.results import HARMONIC, Interval
from ..runs import clock
from . import findings
from .page import Html, cells_table, tag
from .report import TRAIN
from .sweep import SWEEP

HEADLINE = HARMONIC["score.headline"]
PREFIX = "single."  # of the trained editor's scores in a report's results


@dataclass(frozen=True)
class RunResult:
    """A run of a sweep: what was varied, how it ended, and its scores if it did well."""

    number: int  # from 1, as in the sweep's file
    folder: Path
    values: dict[str, Any]  # the grid's settings
    status: str  # done, failed, waiting
    error: str
    results: dict[str, Any]

    @property
    def summary(self) -> dict[str, Interval]:
        """Means of the trained editor with their intervals, by metric; empty for a run that did not end well.

        Raises MendkitError for a mean with an interval and no count: of how many edits, nobody could say.
        """
        parts = ("", ".low", ".high", ".n")
        names = [
            name[: -len(".low")]
            for name in self.results
            if name.startswith(PREFIX) and name.endswith(".low")
        ]
        for name in names:
            if f"{name}.n" not in self.results:
                raise MendkitError(f"{self.folder}: {name} has no count; run it again")
        return {
            name.removeprefix(PREFIX): Interval(*(self.results[name + part] for part in parts))
            for name in names
        }

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows of its training; none if it edited with an archive."""
        path = self.folder / TRAIN / "history.jsonl"
        return (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.is_file()
            else []
        )

    @property
    def score(self) -> float | None:
        """Harmonic mean of the four headline shares."""
        means = [self.summary[name].mean for name in HEADLINE if name in self.summary]
        return harmonic_mean(means) if len(means) == len(HEADLINE) else None

    @property
    def title(self) -> str:
        """Its number and what was varied, in words."""
        return f"Run {self.number} ({', '.join(f'{key} {_short(value)}' for key, value in self.values.items())})"


def read_runs(folder: str | Path, /) -> list[RunResult]:
    """The runs of the sweep in a folder. Raises MendkitError if it holds none."""
    path = Path(folder) / SWEEP
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError) as error:
        raise MendkitError(
            f"{path}: no sweep ({error}); run `python -m mendkit report CONFIG --sweep FILE`"
        ) from None
    found = []
    for number, run in enumerate(runs, 1):
        own, results = path.parent / run["name"], {}
        if run["status"] == "done":
            results = json.loads((own / "results.json").read_text(encoding="utf-8"))
        found.append(RunResult(number, own, run["values"], run["status"], run["error"], results))
    return found


def runs_table(runs: Sequence[RunResult], /, *, out: Path) -> Html:
    """Every run: settings, scores with intervals, time, and a link to its page; of a failed one, why.

    Links hold for a page in the folder `out`.
    """
    settings = list(dict.fromkeys(key for run in runs for key in run.values))
    heads = [
        "run",
        *settings,
        *(name.split(".")[0].replace("_", " ") for name in HEADLINE),
        "score",
        "time",
        "",
    ]
    return cells_table(heads, [(str(run.number), _cells(run, settings, out)) for run in runs])


def _cells(run: RunResult, settings: Sequence[str], out: Path) -> list[Html]:
    cells = [tag("td", _short(run.values[key]) if key in run.values else "–") for key in settings]
    if run.status != "done":
        why = f"{run.status}: {run.error}".removesuffix(": ")
        return [*cells, tag("td", why, colspan=str(len(HEADLINE) + 2)), _to(run, out)]
    for name in HEADLINE:
        value = run.summary.get(name)
        spread = (
            tag("small", f"[{value.low:.2f}, {value.high:.2f}], n = {value.n}") if value else ""
        )
        cells.append(tag("td", f"{value.mean:.2f}" if value else "–", " ", spread))
    score = "–" if run.score is None else f"{run.score:.3f}"
    return [
        *cells,
        tag("td", score),
        tag("td", clock(run.results.get("report.seconds", 0.0))),
        _to(run, out),
    ]


def _to(run: RunResult, out: Path) -> Html:
    """A cell with a link to the run's page, or to what it said if it left none."""
    page, log = run.folder / "index.html", run.folder.with_name(f"{run.folder.name}.log")
    there = [(path, words) for path, words in ((page, "page"), (log, "log")) if path.is_file()]
    links = [tag("a", words, href=quote(relpath(path, out))) for path, words in there]
    return tag("td", [Html(f"{link} ") for link in links])


def _short(value: Any) -> str:
    """A setting's value, cut in the middle where it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:18]} … {text[-18:]}"


def cost_table(runs: Sequence[RunResult], /) -> Html:
    """Wall time and peak memory of scored runs, best score first."""
    rows = []
    for run in sorted(runs, key=lambda run: -(run.score or 0)):
        seconds = [run.results.get(name) for name in ("report.seconds", "train.seconds")]
        texts = [f"{run.score:.3f}", *("–" if value is None else clock(value) for value in seconds)]
        peak = run.results.get("report.peak_memory_gb")
        texts.append("–" if peak is None else f"{peak:.1f} GB")
        rows.append((run.title, [tag("td", text) for text in texts]))
    return cells_table(["run", "score", "whole report", "training", "peak memory"], rows)


def labelled(runs: Sequence[RunResult], /) -> dict[str, float]:
    """The scores of the scored runs, by number and what was varied."""
    return {run.title: run.score for run in runs if run.score is not None}


def conclusion(runs: Sequence[RunResult], /) -> Html:
    """What the sweep came to, as a list of sentences computed from it."""
    sentences = [
        counts(runs),
        findings.runs(labelled(runs)),
        findings.settings(scores_by_setting(runs)),
    ]
    sentences += [f"{run.title} failed: {run.error}" for run in runs if run.status == "failed"]
    return tag("ul", [tag("li", sentence) for sentence in sentences])


def counts(runs: Sequence[RunResult], /) -> str:
    """How many runs ended how."""
    of = ", ".join(f"{n} {status}" for status, n in Counter(run.status for run in runs).items())
    return f"{len(runs)} runs: {of}"


def scores_by_setting(runs: Sequence[RunResult], /) -> dict[str, dict[str, list[float]]]:
    """The scores of all runs by each setting that has several values, and by its value."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in (run for run in runs if run.score is not None):
        for key, value in run.values.items():
            found.setdefault(key, {}).setdefault(_short(value), []).append(run.score or 0.0)
    return {key: own for key, own in found.items() if len(own) > 1}


def sweep_results(runs: Sequence[RunResult], /) -> dict[str, Any]:
    """Flat numbers of the comparison, for results.json."""
    scored = [run for run in runs if run.score is not None]
    statuses = [run.status for run in runs]
    results: dict[str, Any] = {
        f"sweep.{status}": statuses.count(status) for status in ("done", "failed", "waiting")
    }
    for run in runs:
        results |= {
            f"sweep.run_{run.number}.settings": run.values,
            f"sweep.run_{run.number}.status": run.status,
        }
        results |= {
            f"sweep.run_{run.number}.{name}": value.mean for name, value in run.summary.items()
        }
        results |= {f"sweep.run_{run.number}.score": run.score} if run.score is not None else {}
        results |= {f"sweep.run_{run.number}.error": run.error} if run.error else {}
    return results | (
        {"sweep.best": max(scored, key=lambda run: run.score or 0).number} if scored else {}
    )
