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


def share_rows(rows: Sequence[Row], *keys: str, prefix: str = "") -> pd.DataFrame:
    """A row for each `share` of each of `rows` that has it: `keys`, `share` and `value`."""
    frame = pd.DataFrame(rows).rename(columns=lambda name: name.removeprefix(prefix))
    names = [name for name in SHARES if name in frame]
    long = frame.melt([*keys], names, var_name="share").dropna(subset=["value"])
    return long.replace({"share": SHARES})


def interval_rows(summaries: Mapping[str, Summary], metrics: Mapping[str, str]) -> pd.DataFrame:
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
    frame = share_rows(history, "step", "seconds", prefix="val.")
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
    frame = share_rows(rows, "edit_lr")
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
        width = 90
        if len(facts) > 1:
            width = 38  # two panels share the figure's width
        ax.set_title(textwrap.fill(drawable(f"{fact['prompt']} → {fact['new']}"), width))
        about = {key: fact[key] for key in ("prompt", "new", "old")}
        tables.append(table.rename_axis("token").reset_index().assign(**about))
    note = "␣: a space; ⏎: a new line; (new), (old): first token of the answer"
    labels, title = {"xlabel": "probability", "ylabel": "next token"}, findings.next_tokens(facts)
    return finish("next_tokens", title, axes, pd.concat(tables), note=note, **labels)


def _token_label(token: str, fact: Row) -> str:
    text = drawable(token.replace("\n", "⏎").replace(" ", "␣")) or "(empty)"
    answers = [kind for kind in ("new", "old") if token == fact[f"{kind}_token"]]
    if answers:
        text += f" ({' and '.join(answers)})"
    return text


@in_style
def editors(summaries: Mapping[str, Summary], *, name: str = "editors") -> Chart:
    """The headline shares of several editors, a panel each; the title is about the first editor."""
    frame = interval_rows(summaries, HEADLINE_LABELS).rename(columns={"series": "editor"})
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
    frame = interval_rows(summaries, SCORES)
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
    frame = interval_rows({"edit success": edit, "paraphrase": paraphrase}, names)
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
    name, how = "in_a_row", "in a row"
    if at_once:
        name, how = "at_once", "at once"
    note = f"bands: 95 % intervals over up to n = {frame['n'].max():.0f} edits; free decoding"
    title = findings.many(frame, at_once=at_once)
    return finish(name, title, axes, frame, note=note, xlabel=f"edits made {how}")


@in_style
def probability_shifts(rows: Rows) -> Chart:
    """Each edit's log P of the new and the old answer, before (x) and after (y)."""
    frame = pd.DataFrame(rows).filter(regex=r"log_p\.(new|old)$")
    kinds = [kind for kind in ("new", "old") if f"log_p.{kind}" in frame]
    lowest = frame.min().min()
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
    frame = share_rows(rows, "strength")
    (ax,) = axes = panels(1, 2.8)
    mark(ax, 1, "as trained")
    lines(ax, frame, "strength", "value", "share")
    shares(ax, "y")
    labels = {"xlabel": "strength (factor on every update)", "ylabel": "share of edits"}
    note = f"n = {n} edits, {ALONE}"
    return finish("strength", findings.strength(rows), axes, frame, note=note, **labels)


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
    rows = []
    for model, found in results.items():
        if part in found:
            bars = pd.DataFrame(found[part]).T.rename_axis("way").reset_index()
            rows.append(bars.assign(model=model))
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
