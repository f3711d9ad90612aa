"""Figures, one small function each: results in, labelled chart out.

A chart's title is a finding computed from the data. Shares lie in [0, 1]; whiskers and bands are
95 % intervals over edits.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..evaluation.results import HEADLINE
from . import findings
from .figures import (
    BLACK,
    COLOURS,
    GREY,
    Chart,
    categories,
    dots,
    drawable,
    finish,
    in_style,
    lines,
    logarithmic,
    mark,
    panels,
    shares,
    whiskers,
)
from .findings import Row, Rows, Summary

TINY = 1e-5  # KL may be 0, which a logarithmic axis cannot show
NATS, KL = "NLL of the new answer (nats per token)", "KL(unedited ‖ edited) (nats)"
ALONE = "each on a fresh model; teacher-forced"

# Validation shares, and what they are called in figures.
SHARES = {
    "edit_success": "edit success",
    "paraphrase": "paraphrase",
    "neighbourhood": "neighbourhood",
    "locality": "locality (unrelated)",
    "score": "score (harmonic mean)",
}
HEADLINE_LABELS = {
    HEADLINE["edit"]: "edit success (writes the new answer)",
    HEADLINE["paraphrases"]: "paraphrase (writes the new answer)",
    HEADLINE["neighbours"]: "neighbourhood (argmax as before)",
    HEADLINE["unrelated"]: "locality, unrelated (argmax as before)",
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
IN_A_ROW = {
    HEADLINE["edit"]: "edit success right after the edit",
    "retention.all": "retention: of all edits so far, now",
    HEADLINE["unrelated"]: "locality (argmax as before), now",
    "norm.relative_max": "relative norm of the change, largest site",
    "drawdown.perplexity": "perplexity of held-out text, above before",
}


def _share_rows(rows: Sequence[Row], *keys: str, prefix: str = "") -> pd.DataFrame:
    """A row for each `share` of each of `rows` that has it: `keys`, `share` and `value`."""
    frame = pd.DataFrame(rows).rename(columns=lambda name: name.removeprefix(prefix))
    names = [name for name in SHARES if name in frame]
    long = frame.melt([*keys], names, var_name="share").dropna(subset=["value"])
    return long.replace({"share": SHARES})


def _interval_rows(summaries: Mapping[str, Summary], metrics: Mapping[str, str]) -> pd.DataFrame:
    """A row for each of `metrics` of each summary (`series`) that has it."""
    rows: list[dict[str, Any]] = []
    for metric in metrics:
        for series, summary in summaries.items():
            if metric in summary:
                rows.append({"series": series, "metric": metric, **vars(summary[metric])})
    return pd.DataFrame(rows, columns=["series", "metric", "mean", "low", "high", "n"])


def part(values: Row, prefix: str) -> dict[str, Any]:
    """The entries whose names start with `prefix`, without it."""
    return {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}


# ---- training


@in_style
def loss_curves(history: Sequence[Row]) -> Chart:
    """Losses by role and step: training rows, their running mean, validation as markers."""
    frame = pd.DataFrame(history)
    axes = panels(2, 2.8)
    roles = {"edit": NATS, "paraphrases": NATS, "neighbours": KL, "unrelated": KL}
    for colour, (role, unit) in zip(COLOURS, roles.items(), strict=False):
        ax = axes[unit == KL]
        ax.set_ylabel(unit)
        logarithmic(ax, "y")
        for key in (role, f"val.loss.{role}"):
            loss = frame.set_index("step").get(key, pd.Series(dtype=float)).dropna()
            loss = loss.clip(lower=TINY)
            if key == role:
                mean = findings.smooth(loss)
                ax.plot(loss, color=colour, marker="", alpha=0.25)
                ax.plot(mean, color=colour, marker="", lw=2, label=role)
            else:
                ax.plot(loss, color=colour, marker="o", ls=":", mfc="white")
    note = "faint: logged batches; lines: their running mean; hollow markers: validation edits"
    title = findings.losses(history)
    return finish("loss_curves", title, axes, frame, note=note, xlabel="training step")


@in_style
def validation_curves(history: Sequence[Row], best: Row, *, n: int) -> Chart:
    """Validation shares over n edits by step and wall time; `best` is the kept archive's row."""
    frame = _share_rows(history, "step", "seconds", prefix="val.")
    axes = panels(2, 2.6)
    units = {"step": "training step", "seconds": "wall time (s), caches included"}
    for ax, (key, unit) in zip(axes, units.items(), strict=True):
        mark(ax, best[key], "the archive that was kept")
        lines(ax, frame, key, "value", "share")
        shares(ax, "y")
        ax.set_xlabel(unit)
    note, title = f"n = {n} validation edits, {ALONE}", findings.validation(history, best)
    return finish("validation", title, axes, frame, note=note, ylabel="share of edits")


@in_style
def step_sizes(edit_lrs: Mapping[str, float], *, start: float) -> Chart:
    """Size of every site's learned step α (an imported one may be negative), and the start."""
    frame = pd.DataFrame({"site": list(edit_lrs), "edit_lr": list(edit_lrs.values())})
    sizes, y = frame["edit_lr"].abs(), frame.index
    (ax,) = axes = panels(1, 0.3 + 0.24 * len(frame))
    mark(ax, start, "start of training")
    ax.hlines(y, start, sizes, alpha=0.6)
    ax.plot(sizes, y, ls="", ms=6)
    logarithmic(ax, "x")
    ax.set_xlim(min(start, sizes.min()) / 1.3, max(start, sizes.max()) * 1.3)
    categories(ax, [findings.short_site(site) for site in edit_lrs])
    labels = {"xlabel": "step size α (log scale)", "ylabel": "edit site (block.layer)"}
    note, title = f"n = {len(frame)} sites", findings.step_sizes(edit_lrs, start=start)
    return finish("step_sizes", title, axes, frame.assign(start=start), note=note, **labels)


@in_style
def control_curve(rows: Sequence[Row], best: Row, *, n: int) -> Chart:
    """The identity control's validation shares by step size, and the trained editor's score."""
    frame = _share_rows(rows, "edit_lr")
    (ax,) = axes = panels(1, 2.8)
    lines(ax, frame, "edit_lr", "value", "share")
    ax.axhline(best["val.score"], color=BLACK, ls="--", label="score of the trained editor")
    logarithmic(ax, "x")
    shares(ax, "y")
    note, title = f"n = {n} validation edits, {ALONE}", findings.control(rows, best)
    labels = {"xlabel": "step size α of the untrained editor (log scale)"}
    return finish("control", title, axes, frame, note=note, ylabel="share of edits", **labels)


# ---- editing


@in_style
def next_token_bars(facts: Sequence[Row]) -> Chart:
    """Next-token probabilities before and after each edit, one panel a fact.

    A fact has `prompt`, its answers `new` and `old` (or None), their first tokens `new_token` and
    `old_token`, and `before` and `after`: probabilities by token.
    """
    axes, tables = panels(len(facts), 2.4), []
    for ax, fact in zip(axes, facts, strict=True):
        table = pd.DataFrame({"before": fact["before"], "after": fact["after"]}).fillna(0)
        table = table.loc[table.max(axis=1).sort_values(ascending=False, kind="stable").index]
        # Both answers and the most probable other tokens, seven in all, most probable first.
        answers = [
            token for token in (fact["new_token"], fact["old_token"]) if token in table.index
        ]
        chosen = list(dict.fromkeys([*answers, *table.index]))[:7]
        table = table[table.index.isin(chosen)]
        for colour, place, state in ((GREY, -0.2, "before"), (COLOURS[0], 0.2, "after")):
            y = [k + place for k in range(len(table))]
            ax.barh(y, table[state], 0.38, color=colour, label=f"{state} the edit")
        categories(ax, [_token_label(str(token), fact) for token in table.index])
        shares(ax, "x")
        width = 38 if len(facts) > 1 else 90
        ax.set_title(textwrap.fill(drawable(f"{fact['prompt']} → {fact['new']}"), width))
        about = {key: fact[key] for key in ("prompt", "new", "old")}
        tables.append(table.rename_axis("token").reset_index().assign(**about))
    note = "␣: a space; ⏎: a new line; (new), (old): first token of the answer"
    labels, title = {"xlabel": "probability", "ylabel": "next token"}, findings.next_tokens(facts)
    return finish("next_tokens", title, axes, pd.concat(tables), note=note, **labels)


def _token_label(token: str, fact: Row) -> str:
    text = drawable(token.replace("\n", "⏎").replace(" ", "␣")) or "(empty)"
    answers = [kind for kind in ("new", "old") if token == fact[f"{kind}_token"]]
    return f"{text} ({' and '.join(answers)})" if answers else text


@in_style
def editors(summaries: Mapping[str, Summary], *, name: str = "editors") -> Chart:
    """The headline shares of several editors, a panel each; the title is about the first editor."""
    frame = _interval_rows(summaries, HEADLINE_LABELS).rename(columns={"series": "editor"})
    frame["row"] = frame["editor"]
    metrics = frame["metric"].unique()
    axes = panels(len(metrics), 0.8 + 0.2 * len(summaries))
    for ax, metric in zip(axes, metrics, strict=True):
        dots(ax, frame[frame["metric"] == metric], {name: name for name in summaries}, "metric")
        ax.set_title(HEADLINE_LABELS[metric])
    title = findings.ranking(summaries)
    note = f"n = {frame['n'].max()} edits, each on a fresh model; score: harmonic mean"
    labels = {"xlabel": "share, with its 95 % interval", "ylabel": "editor"}
    return finish(name, title, axes, frame, note=note, **labels)


@in_style
def decoding(summary: Summary) -> Chart:
    """One editor under every score of its answers: the edit, paraphrases, and before the edit."""
    prefixes = {"edit success": "edit_success.", "paraphrase": "paraphrase."}
    prefixes["unedited"] = "before.edit_success."
    summaries = {series: part(summary, prefix) for series, prefix in prefixes.items()}
    frame = _interval_rows(summaries, SCORES)
    (ax,) = axes = panels(1, 0.55 * len(SCORES))
    dots(ax, frame.assign(row=frame["metric"]), SCORES, "series")
    note = f"n = {frame['n'].max()} edits, each on a fresh model"
    labels = {"xlabel": "share, with its 95 % interval over edits", "ylabel": "score"}
    return finish("decoding", findings.decoding(summary), axes, frame, note=note, **labels)


@in_style
def by_relation(edit: Summary, paraphrase: Summary) -> Chart:
    """Edit success and paraphrase (free decoding, exact) of every relation, best first."""
    order = sorted(edit, key=lambda name: (-edit[name].mean, name))
    names = {name: f"{findings.relation_name(name)} (n = {edit[name].n})" for name in order}
    frame = _interval_rows({"edit success": edit, "paraphrase": paraphrase}, names)
    frame = frame.rename(columns={"metric": "row"})
    (ax,) = axes = panels(1, 0.4 + 0.3 * len(order))
    dots(ax, frame, names, "series")
    note, title = "each edit on a fresh model; free decoding", findings.by_relation(edit)
    labels = {"xlabel": "share written exactly, with its 95 % interval", "ylabel": "relation"}
    frame = frame.rename(columns={"row": "relation"})
    return finish("by_relation", title, axes, frame, note=note, **labels)


@in_style
def many_edits(rows: Rows, *, at_once: bool) -> Chart:
    """Each metric by the number of edits that a model holds, a line an editor (`tables.many`)."""
    frame = pd.DataFrame(rows)
    names = HEADLINE_LABELS if at_once else IN_A_ROW
    frame = frame[frame["metric"].isin(names)]
    metrics = [metric for metric in names if metric in set(frame["metric"])]
    counts = sorted(frame["edits"].unique())
    axes = panels(len(metrics), 2.5)
    for ax, metric in zip(axes, metrics, strict=True):
        values = frame[frame["metric"] == metric]
        lines(ax, values, "edits", "mean", "editor")
        ax.set(title=names[metric], xscale="log", ylabel="share")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        if metric.startswith(("norm.", "drawdown.")):
            ax.set(yscale="symlog", ylabel=metric.replace("norm.relative_max", "‖ΔW‖ / ‖W‖"))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.set_ylim(bottom=1.1 * min(values["mean"].min(), 0))
        else:
            shares(ax, "y")
    name, how = ("at_once", "at once") if at_once else ("in_a_row", "in a row")
    note = f"bands: 95 % intervals over up to n = {frame['n'].max():.0f} edits; free decoding"
    title = findings.many(frame, at_once=at_once)
    return finish(name, title, axes, frame, note=note, xlabel=f"edits made {how}")


@in_style
def probability_shifts(rows: Rows) -> Chart:
    """Each edit's log P of the new and the old answer, before (x) and after (y)."""
    frame = pd.DataFrame(rows).filter(regex=r"log_p\.(new|old)$")
    kinds = [kind for kind in ("new", "old") if f"log_p.{kind}" in frame]
    lowest = frame.min(axis=None)
    axes = panels(len(kinds), 2.8)
    for ax, kind in zip(axes, kinds, strict=True):
        both = frame[[f"before.log_p.{kind}", f"log_p.{kind}"]].dropna()
        ax.plot([lowest, 0], [lowest, 0], color=GREY, ls="--", marker="")
        ax.plot(*both.T.to_numpy(), ls="", alpha=0.45)
        ax.plot(*both.median(), "P", color=BLACK, ms=9, mec="white")
        limits = (lowest * 1.03, -lowest * 0.03)
        ax.set(title=f"{kind} answer (n = {len(both)} edits)", aspect="equal")
        ax.set(xlim=limits, ylim=limits)
    note, title = "dashed: unchanged; cross: median", findings.shifts(frame)
    unit = "(nats per token)"
    labels = {"xlabel": f"log P before {unit}", "ylabel": f"log P after {unit}"}
    return finish("probability_shifts", title, axes, frame, note=note, **labels)


@in_style
def strength_curve(rows: Sequence[Row], *, n: int) -> Chart:
    """Shares over n edits by the strength that multiplies every update (1: as trained)."""
    frame = _share_rows(rows, "strength")
    (ax,) = axes = panels(1, 2.8)
    mark(ax, 1, "as trained")
    lines(ax, frame, "strength", "value", "share")
    shares(ax, "y")
    labels = {"xlabel": "strength (factor on every update)", "ylabel": "share of edits"}
    note = f"n = {n} edits, {ALONE}"
    return finish("strength", findings.strength(rows), axes, frame, note=note, **labels)


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
    for ax, (loss, unit) in zip(
        axes, {"loss.edit": NATS, "loss.neighbours": KL}.items(), strict=True
    ):
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


# ---- costs


def charts_of_costs(results: Mapping[str, Any]) -> list[Chart]:
    """Every figure of `run_bench`'s results."""
    charts = [costs_of_training(results), memory_of_training(results)]
    if "depths" in results:
        charts.append(depth_curve(results["depths"]))
    return charts


def costs_of_training(results: Mapping[str, Any]) -> Chart:
    """Seconds per edit of every way to train, a panel a model (`run_bench`'s results)."""
    title = findings.costs(results)
    return _bars("costs_of_training", title, results, ("train", "seconds_per_edit", "seconds"))


def memory_of_training(results: Mapping[str, Any]) -> Chart:
    """Peak memory above the base model of every way to train (`run_bench`'s results)."""
    title = findings.memory(results)
    return _bars("memory_of_training", title, results, ("memory", "above_gb", "GB"))


@in_style
def _bars(name: str, title: str, results: Mapping[str, Any], what: tuple[str, str, str]) -> Chart:
    """A bar for each way to train; `what`: the part of a model's results, its number, the unit."""
    part, number, unit = what
    rows = [
        pd.DataFrame(found[part]).T.rename_axis("way").reset_index().assign(model=model)
        for model, found in results.items()
        if part in found
    ]
    axes = panels(len(rows), 0.8 + 0.26 * len(rows[0]), columns=1)
    for ax, bars in zip(axes, rows, strict=True):
        drawn = ax.barh(bars.index, bars[number], 0.7)
        ax.bar_label(drawn, fmt=" {:.3g}")
        categories(ax, list(bars["way"]))
        ax.set_title(f"{bars['model'][0]} (n = {len(bars)} ways to train)")
    frame = pd.concat(rows)
    note = "each way is measured with its caches and optimiser"
    labels = {"xlabel": f"{number.replace('_', ' ')} ({unit})", "ylabel": "way to train"}
    return finish(name, title, axes, frame, note=note, **labels)


@in_style
def depth_curve(depths: Mapping[str, Row]) -> Chart:
    """Seconds per edit trained by the number of layers (`depths` of `run_bench`'s results)."""
    rows = [{"layers": int(count), **found} for count, found in depths.items()]
    frame = pd.DataFrame(rows)
    (ax,) = axes = panels(1, 2.2)
    ax.plot(frame["layers"], frame["seconds_per_edit"])
    ax.set_ylim(0, None)
    labels = {"xlabel": "layers of the model (count)", "ylabel": "seconds per edit trained"}
    note = f"n = {len(rows)} random models of equal width; medians over turns"
    return finish("depth", findings.depth(rows), axes, frame, note=note, **labels)


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
                x, y = (pd.DataFrame([summary[name]]) for name in (across, up))
                ax.errorbar(x["mean"], y["mean"], xerr=whiskers(x), yerr=whiskers(y), ms=5.5)
                ax.annotate(f" {number}", (x["mean"][0], y["mean"][0]), va="bottom")
        shares(ax, "x", "y")
        ax.set(xlabel=HEADLINE_LABELS[across], ylabel=HEADLINE_LABELS[up])
    frame, title = _interval_rows(runs, HEADLINE_LABELS), findings.runs(scores)
    note = f"n = {frame['n'].max()} edits, each on a fresh model; numbers are those of the table"
    return finish("success_against_locality", title, axes, frame, note=note)


@in_style
def curves_of_runs(histories: Mapping[str, Sequence[Row]]) -> Chart:
    """Validation shares of several runs by training step, a panel a share, a line a run."""
    validated = {run: [r for r in rows if "val.score" in r] for run, rows in histories.items()}
    validated = {run: rows for run, rows in validated.items() if rows}
    curves = [
        _share_rows(rows, "step", prefix="val.").assign(run=run) for run, rows in validated.items()
    ]
    frame = pd.concat([pd.DataFrame(columns=["share", "run"]), *curves])
    names = frame["share"].unique()
    axes = panels(len(names), 1.8)
    for ax, name in zip(axes, names, strict=False):
        lines(ax, frame[frame["share"] == name], "step", "value", "run")
        shares(ax, "y")
        ax.set_ylabel(name)
    best = {run: max(row["val.score"] for row in rows) for run, rows in validated.items()}
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
