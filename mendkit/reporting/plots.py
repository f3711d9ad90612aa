"""Figures, one small function each: results in, labelled chart out.

A chart's title is a finding computed from the data (findings.py). Shares lie in [0, 1]; whiskers and
bands are 95 % intervals over edits.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.results import HEADLINE, Interval
from . import findings
from .figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SHARE_TICKS,
    Chart,
    categories,
    dots,
    drawable,
    finish,
    in_style,
    logarithmic,
    mark,
    panels,
    whiskers,
)
from .findings import Row, Rows, Summary

TINY = 1e-5  # KL may be 0, which a logarithmic axis cannot show
NATS, KL = "NLL of the new answer (nats per token)", "KL(unedited ‖ edited) (nats)"
ALONE = "each on a fresh model; teacher-forced"
LIMITS = (-0.03, 1.03)  # of a share

# Validation shares: label, colour, marker.
SHARES = {
    "edit_success": ("edit success", BLUE, "o"),
    "paraphrase": ("paraphrase", ORANGE, "s"),
    "neighbourhood": ("neighbourhood", GREEN, "^"),
    "locality": ("locality (unrelated)", PURPLE, "D"),
    "score": ("score (harmonic mean)", BLACK, "X"),
}
# Losses by role: label, colour, axis.
LOSSES = {
    "edit": ("edit", BLUE, NATS),
    "paraphrases": ("paraphrases", ORANGE, NATS),
    "neighbours": ("neighbours", GREEN, KL),
    "unrelated": ("unrelated prompts", PURPLE, KL),
}
HEADLINE_LABELS = {
    HEADLINE["edit"]: "edit success\n(writes the new answer)",
    HEADLINE["paraphrases"]: "paraphrase\n(writes the new answer)",
    HEADLINE["neighbours"]: "neighbourhood\n(argmax as before)",
    HEADLINE["unrelated"]: "locality, unrelated\n(argmax as before)",
}
# Ways to score one and the same answer, roughly from the easiest to the hardest.
SCORES = {
    "tf_token": "teacher-forced,\nshare of tokens",
    "tf_exact": "teacher-forced,\nall tokens",
    "free_gold_length": "free decoding,\ncut at the answer's length",
    "free_contains": "free decoding,\nanswer somewhere in it",
    "free_exact": "free decoding,\nexactly the answer",
    "free_exact_question": "the same,\nasked as a question",
}
# Panels of notebook 05: many edits at once, and in a row.
AT_ONCE = HEADLINE_LABELS
IN_A_ROW = {
    HEADLINE["edit"]: "edit success right after the edit",
    "retention.all": "retention: of all edits so far, now",
    HEADLINE["unrelated"]: "locality (argmax as before), now",
    "norm.relative_max": "relative norm of the change, largest site",
    "drawdown.perplexity": "perplexity of held-out text, above before",
}
MEASURES = {"norm.relative_max": "‖ΔW‖ / ‖W‖", "drawdown.perplexity": "perplexity"}  # no shares


def _share_lines(ax: Axes, frame: pd.DataFrame, x: str, *, prefix: str = "") -> None:
    for name, (label, colour, marker) in SHARES.items():
        if prefix + name in frame:
            ax.plot(frame[x], frame[prefix + name], color=colour, marker=marker, label=label)
    ax.set_ylim(LIMITS)


# ---- training


@in_style
def loss_curves(history: Sequence[Row]) -> Chart:
    """Losses by role against steps: training rows, their running mean, and validation as markers."""
    frame = pd.DataFrame(history)
    figure, axes = panels(2, 3.7)
    for role, (label, colour, unit) in LOSSES.items():
        ax = axes[unit == KL]
        ax.set(xlabel="training step", ylabel=unit)
        logarithmic(ax, "y")
        if role in frame:
            loss = frame.set_index("step")[role].dropna().clip(lower=TINY)
            ax.plot(loss, color=colour, marker="", alpha=0.25, lw=0.8)
            mean = findings.smooth(loss.tolist())
            ax.plot(loss.index, mean, color=colour, marker="", lw=1.8, label=label)
        if f"val.loss.{role}" in frame:
            loss = frame.set_index("step")[f"val.loss.{role}"].dropna().clip(lower=TINY)
            ax.plot(loss, color=colour, ls=":", lw=1, marker="o", mfc="white")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    note = "faint: logged batches; lines: their running mean; hollow markers: validation edits"
    finding = findings.losses(history)
    return finish("loss_curves", finding, figure, frame, note=note, legend=False)


@in_style
def validation_curves(history: Sequence[Row], best: Row, *, n: int) -> Chart:
    """Validation shares over n edits by step and wall time; `best` is the kept archive's row."""
    frame = pd.DataFrame([row for row in history if "val.score" in row])
    figure, axes = panels(2, 3.8)
    units = {"step": "training step", "seconds": "wall time (s), caches included"}
    for ax, (key, unit) in zip(axes, units.items(), strict=True):
        mark(ax, best[key], "kept")
        _share_lines(ax, frame, key, prefix="val.")
        ax.set(xlabel=unit, ylabel="share of validation edits")
    note = f"n = {n} validation edits, {ALONE}"
    return finish("validation", findings.validation(history, best), figure, frame, note=note)


@in_style
def step_sizes(edit_lrs: Mapping[str, float], *, start: float) -> Chart:
    """Size of every site's learned step α (an imported one may be negative), and the start."""
    frame = pd.DataFrame({"site": edit_lrs.keys(), "edit_lr": edit_lrs.values(), "start": start})
    sizes, y = frame["edit_lr"].abs(), range(len(frame))
    figure, (ax,) = panels(1, 1.5 + 0.24 * len(frame))
    mark(ax, start, "start")
    ax.hlines(y, start, sizes, color=BLUE, lw=1.2, alpha=0.6)
    ax.plot(sizes, y, "o", ms=6)
    logarithmic(ax, "x")
    ax.set_xlim(min(start, sizes.min()) / 1.3, max(start, sizes.max()) * 1.3)
    categories(ax, [findings.short_site(site) for site in edit_lrs])
    ax.set(xlabel="step size α (log scale)", ylabel="edit site (block.layer)")
    finding, note = findings.step_sizes(edit_lrs, start=start), f"n = {len(frame)} sites"
    return finish("step_sizes", finding, figure, frame, note=note, legend=False)


@in_style
def control_curve(rows: Sequence[Row], best: Row, *, n: int) -> Chart:
    """The identity control's validation shares by step size, and the trained editor's score."""
    frame = pd.DataFrame(rows)
    figure, (ax,) = panels(1, 4)
    _share_lines(ax, frame, "edit_lr")
    ax.axhline(best["val.score"], color=BLACK, ls="--", label="score of the trained editor")
    logarithmic(ax, "x")
    ax.set_xlabel("step size α of the untrained editor (log scale)")
    ax.set_ylabel("share of validation edits")
    note = f"n = {n} validation edits, {ALONE}"
    return finish("control", findings.control(rows, best), figure, frame, note=note)


# ---- editing


@in_style
def next_token_bars(facts: Sequence[Row]) -> Chart:
    """Next-token probabilities before and after each edit, one panel a fact.

    A fact has `prompt`, its answers `new` and `old` (or None), their first tokens `new_token` and
    `old_token`, and `before` and `after`: probabilities by token.
    """
    figure, axes = panels(len(facts), 0.9 + 2.4 * -(-len(facts) // 2))
    tables = []
    for ax, fact in zip(axes, facts, strict=True):
        table = pd.DataFrame({state: fact[state] for state in ("before", "after")})
        # Both answers and the most probable other tokens, seven in all.
        answers = [
            token for token in (fact["new_token"], fact["old_token"]) if token in table.index
        ]
        most = table.max(axis=1).sort_values(ascending=False, kind="stable")
        chosen = [*dict.fromkeys([*answers, *most.index])][:7]
        table = table.loc[[token for token in most.index if token in chosen]]
        for offset, state, colour in ((-0.2, "before", GREY), (0.2, "after", BLUE)):
            y = [k + offset for k in range(len(table))]
            ax.barh(y, table[state].fillna(0), 0.38, color=colour, label=f"{state} the edit")
        categories(ax, [_token_label(token, fact) for token in table.index])
        ax.set(xlim=(0, 1), xlabel="probability", ylabel="next token")
        width = 38 if len(facts) > 1 else 90
        ax.set_title(textwrap.fill(drawable(f"{fact['prompt']} → {fact['new']}"), width))
        about = {key: fact[key] for key in ("prompt", "new", "old")}
        tables.append(table.rename_axis("token").reset_index().assign(**about))
    note = "␣: a space; ⏎: a new line; (new), (old): first token of the answer"
    data = pd.concat(tables)
    return finish("next_tokens", findings.next_tokens(facts), figure, data, note=note)


def _token_label(token: str, fact: Row) -> str:
    text = drawable(token.replace("\n", "⏎").replace(" ", "␣")) or "(empty)"
    answers = [kind for kind in ("new", "old") if token == fact[f"{kind}_token"]]
    return f"{text} ({' and '.join(answers)})" if answers else text


def _interval_rows(summaries: Mapping[str, Summary], metrics: Mapping[str, str]) -> pd.DataFrame:
    """A row for every metric (`category`: its label) and summary (`series`) that has it."""
    rows: list[dict[str, Any]] = []
    for metric, label in metrics.items():
        for series, summary in summaries.items():
            if metric in summary:
                where = {"series": series, "metric": metric, "category": label}
                rows.append({**where, **vars(summary[metric])})
    return pd.DataFrame(rows)


@in_style
def headline(trained: Summary, control: Summary) -> Chart:
    """The four headline shares of the unedited model, the identity control and the trained editor.

    The unedited model's values are `before.<metric>`, or 1 where it is compared with itself.
    """
    styles = {"unedited": (GREY, "D"), "identity control": (RED, "s")}
    styles["trained editor"] = (BLUE, "o")
    by_itself = Interval(1.0, 1.0, 1.0, 0)
    unedited = {metric: trained.get(f"before.{metric}", by_itself) for metric in trained}
    summaries = {"unedited": unedited, "identity control": control, "trained editor": trained}
    frame = _interval_rows(summaries, HEADLINE_LABELS)
    names = frame["category"].unique().tolist()
    figure, (ax,) = panels(1, 1.6 + 0.8 * len(names))
    dots(ax, frame, names, styles)
    ax.set(xlabel="share, with its 95 % interval", ylabel="measure")
    note = f"n = {frame['n'].max()} edits, each on a fresh model; unedited, argmax: 1 by definition"
    return finish("headline", findings.verdict(trained, control), figure, frame, note=note)


@in_style
def decoding(summary: Summary) -> Chart:
    """One editor under every score of its answers: the edit, paraphrases, and before the edit."""
    styles = {"unedited": (GREY, "D"), "edit success": (BLUE, "o"), "paraphrase": (ORANGE, "s")}
    prefixes = ("before.edit_success.", "edit_success.", "paraphrase.")
    summaries = {}
    for series, prefix in zip(styles, prefixes, strict=True):
        parts = {name.removeprefix(prefix): name for name in summary if name.startswith(prefix)}
        summaries[series] = {score: summary[name] for score, name in parts.items()}
    frame = _interval_rows(summaries, SCORES)
    figure, (ax,) = panels(1, 1.5 + 0.55 * len(SCORES))
    dots(ax, frame, frame["category"].unique().tolist(), styles)
    ax.set(xlabel="share, with its 95 % interval over edits", ylabel="score")
    note = f"n = {frame['n'].max()} edits, each on a fresh model"
    return finish("decoding", findings.decoding(summary), figure, frame, note=note)


@in_style
def editors(summaries: Mapping[str, Summary]) -> Chart:
    """The headline shares of several editors, a panel each; the first editor is drawn apart."""
    names = list(summaries)
    frame = _interval_rows(summaries, HEADLINE_LABELS)
    frame = frame.rename(columns={"series": "editor", "category": "label"})
    frame["series"] = frame["editor"].where(frame["editor"] == names[0], "others")
    styles = {names[0]: (BLUE, "o"), "others": (BLACK, "s")}
    labels = frame["label"].unique()
    figure, axes = panels(len(labels), 1.2 + (0.8 + 0.2 * len(names)) * -(-len(labels) // 2))
    for ax, label in zip(axes, labels, strict=True):
        part = frame[frame["label"] == label]
        dots(ax, part.rename(columns={"editor": "category"}), names, styles, apart=0)
        ax.set_title(label.replace("\n", " "))
        ax.set(xlabel="share, with its 95 % interval", ylabel="editor")
        ax.label_outer(remove_inner_ticks=False)
    note = f"n = {frame['n'].max()} edits, each on a fresh model; score: harmonic mean of the four"
    finding = findings.ranking(summaries)
    return finish("editors", finding, figure, frame, note=note, legend=False)


@in_style
def many_edits(rows: Rows, *, at_once: bool) -> Chart:
    """Each metric by the number of edits that a model holds, a line an editor (`tables.many`)."""
    frame = pd.DataFrame(rows)
    labels = AT_ONCE if at_once else IN_A_ROW
    labels = {metric: label for metric, label in labels.items() if metric in set(frame["metric"])}
    how = "at once" if at_once else "in a row"
    counts = sorted(frame["edits"].unique())
    figure, axes = panels(len(labels), 1 + 2.5 * -(-len(labels) // 2))
    for ax, (metric, label) in zip(axes, labels.items(), strict=True):
        values = frame[frame["metric"] == metric]
        for editor, part in values.groupby("editor", sort=False):
            (line,) = ax.plot(part["edits"], part["mean"], label=editor)
            band = (part["edits"], part["low"], part["high"])
            ax.fill_between(*band, color=line.get_color(), alpha=0.12, lw=0)
        ax.set_title(label.replace("\n", " "))
        ax.set(xscale="log", xlabel=f"edits made {how}", ylabel=MEASURES.get(metric, "share"))
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        if metric in MEASURES:
            ax.set_yscale("symlog")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.set_ylim(bottom=1.1 * min(values["mean"].min(), 0))
        else:
            ax.set_ylim(LIMITS)
    drawn = frame[frame["metric"].isin(labels)]
    note = f"bands: 95 % intervals over up to n = {drawn['n'].max():.0f} edits {how}; free decoding"
    name = "at_once" if at_once else "in_a_row"
    return finish(name, findings.many(rows, at_once=at_once), figure, drawn, note=note)


@in_style
def by_relation(edit: Summary, paraphrase: Summary) -> Chart:
    """Edit success and paraphrase (free decoding, exact) of every relation, best first."""
    order = sorted(edit, key=lambda name: (-edit[name].mean, name))
    labels = {name: f"{findings.relation_name(name)} (n = {edit[name].n})" for name in order}
    frame = _interval_rows({"edit success": edit, "paraphrase": paraphrase}, labels)
    frame = frame.rename(columns={"metric": "relation"})
    figure, (ax,) = panels(1, 1.6 + 0.3 * len(order))
    styles = {"edit success": (BLUE, "o"), "paraphrase": (ORANGE, "s")}
    dots(ax, frame, list(labels.values()), styles, apart=0.32)
    ax.set_xlabel("share written exactly, with its 95 % interval over edits")
    ax.set_ylabel("relation (n edits)")
    note = "each edit on a fresh model; free decoding"
    return finish("by_relation", findings.by_relation(edit), figure, frame, note=note)


@in_style
def probability_shifts(rows: Rows) -> Chart:
    """Each edit's log P of the new and the old answer, before (x) and after (y)."""
    frame = pd.DataFrame(rows)
    kinds = [kind for kind in ("new", "old") if f"before.log_p.{kind}" in frame]
    columns = [f"{state}log_p.{kind}" for kind in kinds for state in ("before.", "")]
    frame = frame[columns]
    lowest = frame.min(axis=None)
    figure, axes = panels(len(kinds), 4)
    for ax, kind in zip(axes, kinds, strict=True):
        both = frame[[f"before.log_p.{kind}", f"log_p.{kind}"]].dropna()
        ax.plot([lowest, 0], [lowest, 0], color=GREY, lw=1, ls="--", marker="")
        ax.plot(*both.T.to_numpy(), "o", color=BLUE, alpha=0.45, mew=0)
        ax.plot(*both.median(), "P", color=BLACK, ms=9, mec="white")
        ax.set_title(f"{kind} answer (n = {len(both)} edits)")
        limits = (lowest * 1.03, -lowest * 0.03)
        ax.set(xlim=limits, ylim=limits, aspect="equal")
        ax.set(xlabel="log P before (nats per token)", ylabel="log P after (nats per token)")
        ax.label_outer()
    note = "dashed: unchanged; cross: median"
    finding = findings.shifts(frame)
    return finish("probability_shifts", finding, figure, frame, note=note, legend=False)


@in_style
def strength_curve(rows: Sequence[Row], *, n: int) -> Chart:
    """Shares over n edits by the strength that multiplies every update (1: as trained)."""
    figure, (ax,) = panels(1, 4)
    mark(ax, 1, "as trained")
    _share_lines(ax, pd.DataFrame(rows), "strength")
    ax.set(xlabel="strength (factor on every update)", ylabel="share of edits")
    return finish("strength", findings.strength(rows), figure, rows, note=f"n = {n} edits, {ALONE}")


# ---- inside an edit


@in_style
def ranks(rows: Rows) -> Chart:
    """Numerical rank of each gradient by its number of tokens (`rank`, `tokens`, `error`)."""
    frame = pd.DataFrame(rows)
    figure, (ax,) = panels(1, 3.8)
    most = frame["tokens"].max()
    ax.plot([0, most], [0, most], color=GREY, lw=1, ls="--", marker="", label="rank = tokens")
    ax.plot(frame["tokens"], frame["rank"], "o", color=BLUE, alpha=0.35, mew=0, ms=5)
    ax.set(xlabel="tokens that contribute (count)", ylabel="numerical rank of ∇L (count)")
    ax.set(xlim=(0, None), ylim=(0, None))
    full = frame["full_rank"].min()
    note = (
        f"n = {len(frame)} gradients (texts × sites), dense, by autograd; full rank: {full} or more"
    )
    return finish("ranks", findings.rank_one(frame), figure, frame, note=note)


def signs(minus: Sequence[Row], plus: Sequence[Row], *, n: int) -> Chart:
    """Losses of the untrained update with either sign (rows of `inspection.sweep`)."""
    series = {"minus: W − α Σ δ uᵀ": minus, "plus: W + α Σ δ uᵀ": plus}
    return _sweeps("signs", findings.signs(minus, plus), series, n=n)


def normalisers(sweeps: Mapping[str, Sequence[Row]], *, n: int) -> Chart:
    """Losses of updates that differ in what normalises the factors (rows of `inspection.sweep`)."""
    return _sweeps("normalisers", findings.normalisers(sweeps), sweeps, n=n)


@in_style
def _sweeps(name: str, finding: str, sweeps: Mapping[str, Sequence[Row]], *, n: int) -> Chart:
    """Edit loss (left) and neighbours' KL (right) by the update's relative norm; 0 is unedited."""
    frame = _joined(sweeps)
    figure, axes = panels(2, 4.7)
    for ax, (loss, unit) in zip(axes, (("loss.edit", NATS), ("loss.neighbours", KL)), strict=True):
        logarithmic(ax, "x", "y")
        for series, part in frame.groupby("series", sort=False):
            part = part[(part["size"] != 0) & (part[loss] >= TINY)]
            ax.plot(part["size"].abs(), part[loss], label=series)
        ax.set(xlabel="relative norm ‖ΔW‖ / ‖W‖ (log scale)", ylabel=unit)
    for unedited in frame.loc[frame["size"] == 0, "loss.edit"].unique():
        axes[0].axhline(unedited, color=GREY, lw=1, ls="--")
    note = f"dashed: unedited; n = {n} edits, {ALONE}; an edit's mean norm, over all sites"
    return finish(name, finding, figure, frame, note=note)


def _joined(parts: Mapping[str, Sequence[Row]]) -> pd.DataFrame:
    """The rows of all parts; `series` is the part's name."""
    frames = [pd.DataFrame(rows).assign(series=name) for name, rows in parts.items()]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


@in_style
def alignment(rows: Rows, *, n: int) -> Chart:
    """Median cosine of −ΔW with the true gradient by site (`site`, `series`, `cosine`)."""
    frame = pd.DataFrame(rows)
    sites = list(frame["site"].unique())
    figure, (ax,) = panels(1, 2 + 0.24 * len(sites))
    ax.axvline(0, color=GREY, lw=1)
    for series, part in frame.groupby("series", sort=False):
        ax.plot(part["cosine"], part["site"].map(sites.index), ls="", ms=6, label=series)
    categories(ax, [findings.short_site(site) for site in sites])
    ax.set_xlim(min(-0.1, 1.1 * frame["cosine"].min()), 1.03)
    ax.set_xlabel("cosine of −ΔW with the true gradient ∇L (1: the same direction)")
    ax.set_ylabel("edit site (block.layer)")
    note = f"medians over n = {n} edits"
    return finish("alignment", findings.cosines(frame), figure, frame, note=note)


@in_style
def spectra(rows: Rows, *, n: int) -> Chart:
    """Share of ‖ΔW‖² in the first k singular directions (`series`, `directions`, `share`)."""
    frame = pd.DataFrame(rows)
    figure, (ax,) = panels(1, 3.8)
    for series, part in frame.groupby("series", sort=False):
        ax.plot(part["directions"], part["share"], label=series)
    ax.set(ylim=(0, 1.03), xticks=sorted(frame["directions"].unique()))
    ax.set_xlabel("singular directions, the largest first (count)")
    ax.set_ylabel("share of ‖ΔW‖², cumulative")
    note = f"means over n = {n} edits and all sites"
    return finish("spectra", findings.spectra(frame), figure, frame, note=note)


# ---- costs


def charts_of_costs(results: Mapping[str, Any]) -> list[Chart]:
    """Every figure of `run_bench`'s results."""
    charts = [costs_of_training(results), memory_of_training(results)]
    if "depths" in results:
        charts.append(depth_curve(results["depths"]))
    return charts


@in_style
def costs_of_training(results: Mapping[str, Any]) -> Chart:
    """Seconds per edit of every way to train, a panel a model (`run_bench`'s results)."""
    figure, frame = _bars(results, "train", "seconds_per_edit", unit="seconds per edit trained")
    steps = [str(r["workload"]["edits_per_step"]) for r in results.values() if "workload" in r]
    note = f"medians over turns; n = {' and '.join(steps)} edits a step, the optimiser included"
    finding = findings.costs(results)
    return finish("costs_of_training", finding, figure, frame, note=note, legend=False)


@in_style
def memory_of_training(results: Mapping[str, Any]) -> Chart:
    """Peak memory above the base model of every way to train (`run_bench`'s results)."""
    unit = "peak above the base model (GB)"
    figure, frame = _bars(results, "memory", "above_gb", unit=unit)
    note = f"n = {frame['way'].nunique()} ways, each measured once, in its own process, with caches"
    finding = findings.memory(results)
    return finish("memory_of_training", finding, figure, frame, note=note, legend=False)


def _bars(
    results: Mapping[str, Any], part: str, column: str, *, unit: str
) -> tuple[Figure, pd.DataFrame]:
    """A bar for each way, a panel for each model; the textbook is grey, the kit blue."""
    rows = []
    for model, found in results.items():
        for way, values in found.get(part, {}).items():
            rows.append({"model": model, "way": way, **values})
    frame = pd.DataFrame(rows)
    count, ways = frame["model"].nunique(), frame["way"].nunique()
    figure, axes = panels(count, 1.3 + (0.4 + 0.26 * ways) * count, columns=1)
    for ax, (model, bars) in zip(axes, frame.groupby("model", sort=False), strict=True):
        colours = [GREY, BLUE, *[ORANGE] * len(bars)][: len(bars)]
        drawn = ax.barh(range(len(bars)), bars[column], 0.7, color=colours)
        ax.bar_label(drawn, fmt=" {:.3g}")
        ax.set_xlim(0, bars[column].max() * 1.15)
        categories(ax, list(bars["way"]))
        ax.set(title=model, xlabel=unit, ylabel="way to train")
    return figure, frame


@in_style
def depth_curve(depths: Mapping[str, Row]) -> Chart:
    """Seconds per edit trained by the number of layers (`depths` of `run_bench`'s results)."""
    rows = [{"layers": int(count), **found} for count, found in depths.items()]
    frame = pd.DataFrame(rows)
    figure, (ax,) = panels(1, 3.4)
    ax.plot(frame["layers"], frame["seconds_per_edit"])
    ax.set(xlabel="layers of the model (count)", ylabel="seconds per edit trained", ylim=(0, None))
    note = f"n = {len(rows)} random models of equal width; medians over turns"
    return finish("depth", findings.depth(rows), figure, frame, note=note)


# ---- several runs


@in_style
def success_against_locality(runs: Mapping[str, Summary], scores: Mapping[str, float]) -> Chart:
    """Runs of a sweep as points with intervals: what an edit does by what it leaves alone.

    `runs` and their headline `scores` by what was varied; runs are numbered from 1.
    """
    frame = _interval_rows(runs, HEADLINE_LABELS)
    figure, axes = panels(2, 4.2)
    for ax, (up, across) in zip(
        axes, (("edit", "unrelated"), ("paraphrases", "neighbours")), strict=True
    ):
        for number, summary in enumerate(runs.values(), 1):
            x, y = summary.get(HEADLINE[across]), summary.get(HEADLINE[up])
            if x and y:
                lengths = {"xerr": whiskers(pd.DataFrame([x])), "yerr": whiskers(pd.DataFrame([y]))}
                ax.errorbar(x.mean, y.mean, **lengths, ms=5.5, lw=1.2)
                ax.annotate(f" {number}", (x.mean, y.mean), va="bottom")
        ax.set(xlim=LIMITS, ylim=LIMITS, xticks=SHARE_TICKS, yticks=SHARE_TICKS)
        ax.set_xlabel(HEADLINE_LABELS[HEADLINE[across]].replace("\n", " "))
        ax.set_ylabel(HEADLINE_LABELS[HEADLINE[up]].replace("\n", " "))
    n = max(frame.get("n", [0]))
    note = f"n = {n} edits, each on a fresh model; numbers are those of the table"
    finding = findings.runs(scores)
    return finish("success_against_locality", finding, figure, frame, note=note, legend=False)


@in_style
def curves_of_runs(histories: Mapping[str, Sequence[Row]]) -> Chart:
    """Validation shares of several runs by training step, a panel a share, a line a run.

    `histories` by what was varied; a run without a validation is left out.
    """
    frame = _joined(histories)
    if "val.score" in frame:
        frame = frame.dropna(subset=["val.score"])
    names = [name for name in SHARES if f"val.{name}" in frame]
    figure, axes = panels(max(len(names), 1), 1 + 2.2 * -(-len(names) // 2))
    scores = {}
    for ax, name in zip(axes, names, strict=False):
        for run, part in frame.groupby("series", sort=False):
            ax.plot(part["step"], part[f"val.{name}"], label=run)
            scores[run] = part["val.score"].max()
        ax.set(xlabel="training step", ylabel=SHARES[name][0], ylim=LIMITS)
    note = f"n = {len(scores)} runs; shares of each run's validation edits, {ALONE}"
    return finish("curves_of_runs", findings.runs(scores), figure, frame, note=note)


@in_style
def scores_by_setting(by_setting: Mapping[str, Mapping[str, Sequence[float]]]) -> Chart:
    """The score of every run above the values of each setting, and their mean."""
    rows = []
    figure, axes = panels(max(len(by_setting), 1), 1 + 2.8 * -(-max(len(by_setting), 1) // 2))
    for ax, (setting, by_value) in zip(axes, by_setting.items(), strict=False):
        for place, (value, scores) in enumerate(by_value.items()):
            rows += [{"setting": setting, "value": value, "score": score} for score in scores]
            ax.plot([place] * len(scores), scores, "o", color=BLUE, ms=5, alpha=0.6)
            ax.plot(place, sum(scores) / len(scores), "_", color=BLACK, ms=22, mew=1.8)
        names = [textwrap.shorten(value, 24, placeholder="…") for value in by_value]
        ax.set_xticks(range(len(names)), names)
        ax.set(xlim=(-0.6, len(names) - 0.4), ylim=LIMITS)
        ax.set(xlabel=setting, ylabel="score (harmonic mean of four shares)")
    n = max((len(sum(map(list, values.values()), [])) for values in by_setting.values()), default=0)
    note = f"n = {n} runs, a dot each; bar: their mean; all other settings vary, too"
    finding = findings.settings(by_setting)
    return finish("scores_by_setting", finding, figure, rows, note=note, legend=False)
