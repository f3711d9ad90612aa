"""Figures that compare: updates of several kinds (notebook 03), and the runs of a sweep (08)."""

import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd

from ..evaluation.results import HEADLINE
from . import findings
from .figures import (
    BLACK,
    COLOURS,
    GREY,
    Chart,
    categories,
    finish,
    in_style,
    lines,
    logarithmic,
    panels,
    shares,
    whiskers,
)
from .findings import Row, Rows, Summary
from .plots import ALONE, HEADLINE_LABELS, KL, NATS, TINY, interval_rows, share_rows

# ---- inside an edit


@in_style
def ranks(rows: Rows) -> Chart:
    """Numerical rank of each gradient by its number of tokens (`rank`, `tokens`, `error`)."""
    frame = pd.DataFrame(rows)
    (ax,) = axes = panels(1, 2.6)
    most, full = frame["tokens"].max(), frame["full_rank"].min()
    ax.plot([0, most], [0, most], color=GREY, ls="--", marker="", label="rank = tokens")
    ax.plot(frame["tokens"], frame["rank"], ls="", alpha=0.35, ms=5)
    ax.set(xlim=(0, None), ylim=(0, None))
    ax.locator_params(integer=True)
    note = f"n = {len(frame)} gradients (texts × sites), by autograd; full rank: {full} or more"
    labels = {"xlabel": "tokens that contribute (count)", "ylabel": "numerical rank of ∇L (count)"}
    return finish("ranks", findings.rank_one(frame), axes, frame, note=note, **labels)


def signs(minus: Sequence[Row], plus: Sequence[Row], *, n: int) -> Chart:
    """Losses of the untrained update with either sign (rows of `inspection.sweep`)."""
    series = {"minus: W − α Σ δ uᵀ": minus, "plus: W + α Σ δ uᵀ": plus}
    return _sweeps("signs", findings.signs(minus, plus), series, n=n)


def normalisers(sweeps: Mapping[str, Sequence[Row]], *, n: int) -> Chart:
    """Losses of updates that differ in what normalises the factors (`inspection.sweep`)."""
    return _sweeps("normalisers", findings.normalisers(sweeps), sweeps, n=n)


@in_style
def _sweeps(name: str, title: str, sweeps: Mapping[str, Sequence[Row]], *, n: int) -> Chart:
    """Edit loss (left) and neighbours' KL (right) by the update's relative norm; 0: unedited."""
    parts = [pd.DataFrame(rows).assign(series=series) for series, rows in sweeps.items()]
    frame = pd.concat(parts, ignore_index=True)
    axes = panels(2, 3.5)
    edited = frame[frame["size"] != 0].assign(size=frame["size"].abs())
    units = {"loss.edit": NATS, "loss.neighbours": KL}
    for ax, (loss, unit) in zip(axes, units.items(), strict=True):
        # A logarithmic axis cannot show a loss of zero.
        lines(ax, edited[edited[loss] >= TINY], "size", loss, "series")
        logarithmic(ax, "x", "y")
        ax.set_ylabel(unit)
    axes[0].axhline(frame.loc[frame["size"] == 0, "loss.edit"].max(), color=GREY, ls="--")
    note = f"dashed: unedited; n = {n} edits, {ALONE}; an edit's mean norm, over all sites"
    return finish(name, title, axes, frame, note=note, xlabel="relative norm ‖ΔW‖ / ‖W‖")


@in_style
def alignment(rows: Rows, *, n: int) -> Chart:
    """Median cosine of −ΔW with the true gradient by site (`site`, `series`, `cosine`)."""
    frame = pd.DataFrame(rows)
    sites = list(frame["site"].unique())
    (ax,) = axes = panels(1, 0.8 + 0.24 * len(sites))
    ax.axvline(0, color=GREY)
    for series, values in frame.groupby("series", sort=False):
        ax.plot(values["cosine"], values["site"].map(sites.index), ls="", ms=6, label=series)
    categories(ax, [findings.short_site(site) for site in sites])
    ax.set_xlim(min(-0.1, 1.1 * frame["cosine"].min()), 1.03)
    labels = {"xlabel": "cosine of −ΔW with ∇L (1: the same direction)", "ylabel": "edit site"}
    note, title = f"medians over n = {n} edits", findings.cosines(frame)
    return finish("alignment", title, axes, frame, note=note, **labels)


@in_style
def spectra(rows: Rows, *, n: int) -> Chart:
    """Share of ‖ΔW‖² in the first k singular directions (`series`, `directions`, `share`)."""
    frame = pd.DataFrame(rows)
    (ax,) = axes = panels(1, 2.6)
    lines(ax, frame, "directions", "share", "series")
    ax.set(ylim=(0, 1.03), xticks=sorted(frame["directions"].unique()))
    labels = {"xlabel": "singular directions, largest first (count)", "ylabel": "share of ‖ΔW‖²"}
    note = f"means over n = {n} edits and all sites"
    return finish("spectra", findings.spectra(frame), axes, frame, note=note, **labels)


# ---- several runs


@in_style
def success_against_locality(runs: Mapping[str, Summary], scores: Mapping[str, float]) -> Chart:
    """Runs of a sweep as points with intervals: what an edit does by what it leaves alone.

    `runs` and their headline `scores` by what was varied; runs are numbered from 1.
    """
    axes = panels(2, 3)
    pairs = (("edit", "unrelated"), ("paraphrases", "neighbours"))
    for ax, roles in zip(axes, pairs, strict=True):
        up, across = (HEADLINE[role] for role in roles)
        for number, summary in enumerate(runs.values(), 1):
            if up in summary and across in summary:
                x, y = pd.DataFrame([summary[across]]), pd.DataFrame([summary[up]])
                ax.errorbar(x["mean"], y["mean"], xerr=whiskers(x), yerr=whiskers(y), ms=5.5)
                ax.annotate(f" {number}", (x["mean"][0], y["mean"][0]), va="bottom")
        shares(ax, "x", "y")
        ax.set(xlabel=HEADLINE_LABELS[across], ylabel=HEADLINE_LABELS[up])
    frame, title = interval_rows(runs, HEADLINE_LABELS), findings.runs(scores)
    note = f"n = {frame['n'].max()} edits, each on a fresh model; numbers are those of the table"
    return finish("success_against_locality", title, axes, frame, note=note)


@in_style
def curves_of_runs(histories: Mapping[str, Sequence[Row]]) -> Chart:
    """Validation shares of several runs by training step, a panel a share, a line a run."""
    best: dict[str, float] = {}
    curves = [pd.DataFrame(columns=["share", "run"])]  # where no run has validated
    for run, history in histories.items():
        rows = [row for row in history if "val.score" in row]
        if rows:
            best[run] = max(row["val.score"] for row in rows)
            curves.append(share_rows(rows, "step", prefix="val.").assign(run=run))
    frame = pd.concat(curves)
    names = frame["share"].unique()
    axes = panels(len(names), 1.8)
    for ax, name in zip(axes, names, strict=False):
        lines(ax, frame[frame["share"] == name], "step", "value", "run")
        shares(ax, "y")
        ax.set_ylabel(name)
    note = f"n = {len(best)} runs; shares of each run's validation edits, {ALONE}"
    title = findings.runs(best)
    return finish("curves_of_runs", title, axes, frame, note=note, xlabel="training step")


@in_style
def scores_by_setting(by_setting: Mapping[str, Mapping[str, Sequence[float]]]) -> Chart:
    """The score of every run above the values of each setting, and their mean."""
    axes, rows = panels(len(by_setting), 2.8), []
    for ax, (setting, by_value) in zip(axes, by_setting.items(), strict=False):
        for place, (value, scores) in enumerate(by_value.items()):
            rows += [{"setting": setting, "value": value, "score": score} for score in scores]
            ax.plot([place] * len(scores), scores, "o", color=COLOURS[0], ms=5, alpha=0.6)
            ax.plot(place, sum(scores) / len(scores), "_", color=BLACK, ms=22, mew=1.8)
        names = [textwrap.shorten(value, 24, placeholder="…") for value in by_value]
        ax.set_xticks(range(len(names)), names)
        shares(ax, "y")
        ax.set(xlabel=setting, xlim=(-0.6, len(names) - 0.4))
    note = f"n = {len(rows)} dots, one a run and setting; bars: means; all other settings vary, too"
    title = findings.settings(by_setting)
    labels = {"ylabel": "score (harmonic mean of four shares)"}
    return finish("scores_by_setting", title, axes, rows, note=note, **labels)
