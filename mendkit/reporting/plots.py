"""Figures, one small function each: results in, labelled chart out.

A title is computed from the data, so it is right when a run goes badly, too. Shares lie in [0, 1];
whiskers and bands are 95 % intervals over edits.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..evaluation.results import HEADLINE, Interval, headline_score
from .figures import (
    BLACK,
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
    span,
    whiskers,
)
from .tables import Row

Rows = Sequence[Row] | pd.DataFrame
Means = Mapping[str, Interval]

TINY = 1e-5  # KL may be 0, which a logarithmic axis cannot show
EDITOR_AXES = {"xlabel": "share, with its 95 % interval", "ylabel": "editor"}
NATS, KL = "NLL of the new answer (nats per token)", "KL(unedited ‖ edited) (nats)"
ALONE = "each on a fresh model; teacher-forced"

# Validation shares, and what they are called in figures.
SHARE_LABELS = {
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
    HEADLINE["unrelated"]: "locality (argmax as before)",
}
FOLLOW_LABELS = {
    "consequence.free_exact_in_domain": "consequence, in domain (written)",
    "consequence.free_exact_out_of_domain": "consequence, out of domain (written)",
    "negation.leak": "negated form (still the new answer: lower is better)",
    "truth.accuracy": "true/false question (the right answer is likelier)",
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
MANY_LABELS = HEADLINE_LABELS | {  # where edits add up
    "retention.all": "retention (of all edits so far)",
    "norm.relative_max": "largest change of a weight (‖ΔW‖ / ‖W‖)",
    "drawdown.perplexity": "perplexity gained on other text",
}

# What is measured of a way to train: the chart's name, the column, the title and its unit.
TIME = ("costs_of_training", "seconds_per_edit", "Time per edit trained", "seconds per edit")
MEMORY = ("memory_of_training", "above_gb", "Memory above the base model", "GB above the model")

GOAL = 0.8  # a validation score, and the time to it, to compare runs by


def part(values: Row, prefix: str) -> dict[str, Any]:
    """The entries whose names start with `prefix`, without it."""
    found = {}
    for name, value in values.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = value
    return found


def share_rows(rows: Rows, *keys: str, prefix: str = "") -> pd.DataFrame:
    """A row for each `share` of each of `rows` that has it: `keys`, `share` and `value`."""
    frame = pd.DataFrame(rows).rename(columns=lambda name: name.removeprefix(prefix))
    names = [name for name in SHARE_LABELS if name in frame]
    long = frame.melt([*keys], names, var_name="share").dropna(subset=["value"])
    return long.replace({"share": SHARE_LABELS})


def interval_rows(summaries: Mapping[str, Means], metrics: Mapping[str, str]) -> pd.DataFrame:
    """A row for each of `metrics` of each summary (`series`) that has it."""
    rows: list[dict[str, Any]] = []
    for metric in metrics:
        for series, summary in summaries.items():
            if metric in summary:
                rows.append({"series": series, "row": metric, **vars(summary[metric])})
    return pd.DataFrame(rows, columns=["series", "row", "mean", "low", "high", "n"])


# ---- training


@in_style
def loss_curves(history: Sequence[Row]) -> Chart:
    """Losses by role and step: training rows, their running mean, validation as markers."""
    frame, axes = pd.DataFrame(history).set_index("step"), panels(2, 2.8)
    moved, ended = [], []
    roles = {"edit": NATS, "paraphrases": NATS, "neighbours": KL, "unrelated": KL}
    for number, (role, unit) in enumerate(roles.items()):
        ax, colour = axes[unit == KL], f"C{number}"
        ax.set_ylabel(unit)
        logarithmic(ax, "y")
        for key in (role, f"val.loss.{role}"):
            loss = frame.get(key, pd.Series(dtype=float)).dropna().clip(lower=TINY)
            if key == role:
                ax.plot(loss, color=colour, marker="", alpha=0.25)
                # Their mean over a twelfth of the rows, narrower at the ends.
                width = 2 * (len(loss) // 24) + 1
                loss = loss.rolling(width, center=True, min_periods=1).mean()
                ax.plot(loss, color=colour, marker="", lw=2, label=role)
            else:
                ax.plot(loss, color=colour, marker="o", ls=":", mfc="white")
            if role == "edit" and len(loss):
                moved.append(f"from {loss.iloc[0]:.2f} to {loss.iloc[-1]:.2f}")
            elif role == "paraphrases" and len(loss):
                ended.append(f"{loss.iloc[-1]:.2f}")
    note = "faint: logged batches; lines: their running mean; hollow markers: validation edits"
    title = f"The edit loss went {', on validation edits '.join(moved)} nats"
    if ended:
        title += f"; paraphrases ended at {', on validation edits at '.join(ended)}"
    rows = frame.reset_index()
    return finish("loss_curves", title, axes, rows, note=note, xlabel="training step")


@in_style
def validation_curves(history: Sequence[Row], best: Row, *, n: int) -> Chart:
    """Validation shares over n edits by time; `best` is the kept archive's row."""
    rows = [{**row, "minutes": row["seconds"] / 60} for row in history if "val.score" in row]
    before, kept = rows[0]["val.score"], best["val.score"]
    verb = "raised" if kept > before else "did not raise"
    scores = f"{before:.2f} before the first step, {kept:.2f} at step {best['step']:g}"
    title = f"Training {verb} the validation score: {scores}, whose archive was kept"
    reached = [row["minutes"] for row in rows if row["val.score"] >= GOAL]
    title += f"; {GOAL:.2f} after {reached[0]:.1f} minutes" if reached else f"; below {GOAL:.2f}"
    (ax,) = axes = panels(1, 2.8)
    mark(ax, best["seconds"] / 60, "the archive that was kept")
    frame = share_rows(rows, "minutes", "step", prefix="val.")
    xlabel = "minutes from the start, caches included"
    return _share_lines("validation", title, axes, frame, xlabel=xlabel, n=n)


@in_style
def control_curve(rows: Sequence[Row], best: Row, *, n: int) -> Chart:
    """The identity control's validation shares by step size, and the trained editor's score."""
    top, trained = max(rows, key=lambda row: row["score"]), best["val.score"]
    verb = "beats" if trained > top["score"] else "does not beat"
    # A best value at the end of a range may not be the best there is.
    scores = f"{trained:.2f} against {top['score']:.2f} at α = {top['edit_lr']:.1e}"
    if top in (rows[0], rows[-1]):
        scores += " (the end of the range tried)"
    title = f"The trained editor {verb} the identity control at its best step size: {scores}"
    (ax,) = axes = panels(1, 2.8)
    ax.axhline(trained, color=BLACK, ls="--", label="score of the trained editor")
    logarithmic(ax, "x")
    xlabel = "step size α of the untrained editor (log scale)"
    frame = share_rows(rows, "edit_lr")
    return _share_lines("control", title, axes, frame, xlabel=xlabel, n=n)


@in_style
def strengths(rows: Sequence[Row], *, n: int) -> Chart:
    """Shares over n edits by the strength that multiplies every update (1: as trained)."""
    scores = {f"{row['strength']:g}": row["score"] for row in rows}
    best, error = max(scores.values()), 0.5 / n**0.5  # of a share, at most
    alike = ", ".join(strength for strength, score in scores.items() if score >= best - error)
    title = f"Score at most {best:.2f}; within one standard error ({error:.2f}) of it: strength "
    title += f"{alike}; as trained: {scores['1']:.2f}"
    (ax,) = axes = panels(1, 2.8)
    mark(ax, 1, "as trained")
    frame, xlabel = share_rows(rows, "strength"), "strength (factor on every update)"
    return _share_lines("strength", title, axes, frame, xlabel=xlabel, n=n)


def _share_lines(
    name: str, title: str, axes: list[Any], frame: pd.DataFrame, *, xlabel: str, n: int
) -> Chart:
    """A line for each share over n edits, by the first column of `frame`."""
    lines(axes[0], frame, frame.columns[0], "value", "share")
    shares(axes[0], "y")
    note = f"n = {n} edits, {ALONE}"
    return finish(name, title, axes, frame, note=note, xlabel=xlabel, ylabel="share of edits")


# ---- editing


@in_style
def next_token_bars(facts: Sequence[Row]) -> Chart:
    """Next-token probabilities before and after each edit, one panel a fact.

    A fact has `prompt`, its answers `new` and `old` (or None), their first tokens `new_token` and
    `old_token`, and `before` and `after`: probabilities by token.
    """
    axes, tables, told = panels(len(facts), 2.4), [], {"before": 0, "after": 0}
    for ax, fact in zip(axes, facts, strict=True):
        table = pd.DataFrame({state: fact[state] for state in told}).fillna(0)
        # Both answers and the most probable other tokens, seven in all, most probable first.
        order = table.max(axis=1).sort_values(ascending=False, kind="stable").index
        answers = order.isin([fact["new_token"], fact["old_token"]])
        chosen = [*order[answers], *order[~answers]][:7]
        table = table.loc[order[order.isin(chosen)]]
        for colour, place, state in ((GREY, -0.2, "before"), ("C0", 0.2, "after")):
            y = [k + place for k in range(len(table))]
            ax.barh(y, table[state], 0.38, color=colour, label=f"{state} the edit")
            told[state] += table[state].idxmax() == fact["new_token"]
        categories(ax, [_token_label(str(token), fact) for token in table.index])
        shares(ax, "x")
        width = 90 if len(facts) == 1 else 36  # two panels share the figure's width
        ax.set_title(textwrap.fill(drawable(f"{fact['prompt']} → {fact['new']}"), width))
        about = {key: fact[key] for key in ("prompt", "new", "old")}
        tables.append(table.rename_axis("token").reset_index().assign(**about))
    counts = f"{told['before']} of {len(facts)} facts before the edit, of {told['after']} after it"
    title = f"The most probable next token begins the new answer of {counts}"
    note = "␣: a space; ⏎: a new line; (new), (old): first token of the answer"
    labels = {"xlabel": "probability", "ylabel": "next token"}
    return finish("next_tokens", title, axes, pd.concat(tables), note=note, **labels)


def _token_label(token: str, fact: Row) -> str:
    text = drawable(token.replace("\n", "⏎").replace(" ", "␣")) or "(empty)"
    for kind in ("new", "old"):
        if token == fact[f"{kind}_token"]:
            text += f" ({kind})"
    return text


@in_style
def editors(
    summaries: Mapping[str, Means], *, name: str = "editors", how: str = "each on a fresh model"
) -> Chart:
    """The headline shares of several editors, a panel each; `how` says how edits were made."""
    frame, axes = _by_editor(summaries, HEADLINE_LABELS)
    scores = {editor: headline_score(found) for editor, found in summaries.items()}
    said = ", ".join(f"{editor} {score:.2f}" for editor, score in scores.items())
    title = f"Headline score: {said if len(scores) <= 8 else span(scores)}"
    note = f"n = {frame['n'].max()} edits, {how}; score: harmonic mean"
    return finish(name, title, axes, frame, note=note, **EDITOR_AXES)


@in_style
def what_follows(summaries: Mapping[str, Means]) -> Chart:
    """What follows from the edits of several editors, and what must not, a panel each."""
    frame, axes = _by_editor(summaries, FOLLOW_LABELS)
    first = frame[frame["metric"] == frame["metric"].iloc[0]].set_index("editor")["mean"]
    title = f"{FOLLOW_LABELS[frame['metric'].iloc[0]]}: {span(first)}"
    note = f"n = {frame['n'].max()} edits or fewer, each on a fresh model"
    return finish("what_follows", title, axes, frame, note=note, **EDITOR_AXES)


def _by_editor(
    summaries: Mapping[str, Means], labels: Mapping[str, str]
) -> tuple[pd.DataFrame, list[Any]]:
    """The scores of `labels` that there are, drawn a panel each, with a dot an editor."""
    frame = interval_rows(summaries, labels)
    frame = frame.rename(columns={"series": "editor", "row": "metric"})
    metrics = frame["metric"].unique()
    axes = panels(len(metrics), 0.95 + 0.2 * len(summaries))
    for ax, metric in zip(axes, metrics, strict=True):
        values = frame[frame["metric"] == metric].assign(row=frame["editor"])
        dots(ax, values, {name: name for name in summaries}, "metric")
        ax.set_title(labels[metric].replace(" (", "\n("))  # long names leave little room
    return frame, axes


@in_style
def decoding(summary: Means) -> Chart:
    """One editor under every score of its answers: the edit, paraphrases, and before the edit."""
    prefixes = {"edit success": "edit_success.", "paraphrase": "paraphrase."}
    prefixes["unedited"] = "before.edit_success."
    summaries = {series: part(summary, prefix) for series, prefix in prefixes.items()}
    frame = interval_rows(summaries, SCORES)
    (ax,) = axes = panels(1, 0.55 * len(SCORES))
    dots(ax, frame, SCORES, "series")
    scores = frame[frame["series"] == "edit success"].set_index("row")["mean"]
    title = f"Edit success by the way to score it: {span(scores)}"
    note = f"n = {frame['n'].max()} edits, each on a fresh model"
    labels = {"xlabel": "share, with its 95 % interval over edits", "ylabel": "score"}
    return finish("decoding", title, axes, frame, note=note, **labels)


@in_style
def many_edits(rows: Rows, *, name: str) -> Chart:
    """Each metric by the number of edits that a model holds, a line an editor (`tables.many`).

    `name` says how they were made: at_once or in_a_row.
    """
    frame = pd.DataFrame(rows)
    frame = frame[frame["metric"].isin(list(MANY_LABELS))]
    metrics, counts = list(frame["metric"].unique()), sorted(frame["edits"].unique())
    axes = panels(len(metrics), 2.5)
    for ax, metric in zip(axes, metrics, strict=True):
        values = frame[frame["metric"] == metric]
        lines(ax, values, "edits", "mean", "editor")
        ax.set(title=MANY_LABELS[metric], xscale="log", ylabel="share")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        if metric.startswith(("norm.", "drawdown.")):
            unit = "ratio" if metric.startswith("norm.") else "perplexity"
            ax.set(yscale="symlog", ylabel=unit)
            ax.set_ylim(bottom=1.1 * min(values["mean"].min(), 0))
            ax.yaxis.set_major_formatter("{x:g}")
        else:
            shares(ax, "y")
    kept = "retention.all" if "retention.all" in metrics else HEADLINE["edit"]
    last = frame[(frame["edits"] == counts[-1]) & (frame["metric"] == kept)]
    how = name.replace("_", " ")
    title = f"Of {counts[-1]} edits {how} is kept: {span(last.set_index('editor')['mean'])}"
    note = f"bands: 95 % intervals over up to n = {frame['n'].max():.0f} edits; free decoding"
    return finish(name, title, axes, frame, note=note, xlabel=f"edits made {how}")


# ---- inside an edit, and several runs


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
    worst, above = frame["error"].max(), (frame["rank"] > frame["tokens"]).sum()
    verb = "are" if worst < 1e-3 else "are not"  # a missing error proves nothing, either
    title = f"{len(frame)} gradients {verb} sums of their tokens' rank-one terms (error at most "
    title += f"{worst:.0e}); {above} exceed that rank"
    note = f"n = {len(frame)} gradients (texts × sites), by autograd; full rank: {full} or more"
    labels = {"xlabel": "tokens that contribute (count)", "ylabel": "numerical rank of ∇L (count)"}
    return finish("ranks", title, axes, frame, note=note, **labels)


@in_style
def size_curves(name: str, sweeps: Mapping[str, Sequence[Row]], *, n: int) -> Chart:
    """Edit loss (left) and neighbours' KL (right) by the update's relative norm.

    `sweeps` are rows of `inspection.sweep` by what was varied; a size of 0 is the unedited model.
    """
    parts = [pd.DataFrame(rows).assign(series=series) for series, rows in sweeps.items()]
    frame = pd.concat(parts, ignore_index=True)
    edited = frame[frame["size"] != 0].assign(size=frame["size"].abs())
    unedited = frame.loc[frame["size"] == 0, "loss.edit"].max()
    axes = panels(2, 3.5)
    units = {"loss.edit": NATS, "loss.neighbours": KL}
    for ax, (loss, unit) in zip(axes, units.items(), strict=True):
        # A logarithmic axis cannot show a loss of zero.
        lines(ax, edited[edited[loss] >= TINY], "size", loss, "series")
        logarithmic(ax, "x", "y")
        ax.set_ylabel(unit)
    axes[0].axhline(unedited, color=GREY, ls="--")
    lowest = edited.groupby("series", sort=False)["loss.edit"].min()
    said = ", ".join(f"{loss:.2f} by {series}" for series, loss in lowest.items())
    title = f"Unedited, the edit loss is {unedited:.2f} nats; at its lowest {said}"
    note = f"dashed: unedited; n = {n} edits, {ALONE}; an edit's mean norm, over all sites"
    return finish(name, title, axes, frame, note=note, xlabel="relative norm ‖ΔW‖ / ‖W‖")


@in_style
def spectra(rows: Rows, *, n: int) -> Chart:
    """Share of ‖ΔW‖² in the first k singular directions (`series`, `directions`, `share`)."""
    frame = pd.DataFrame(rows)
    (ax,) = axes = panels(1, 2.6)
    lines(ax, frame, "directions", "share", "series")
    ax.set(ylim=(0, 1.03), xticks=sorted(frame["directions"].unique()))
    first = frame.groupby("series", sort=False)["share"].first()
    title = f"The first singular direction holds of an update's energy {span(first)}"
    labels = {"xlabel": "singular directions, largest first (count)", "ylabel": "share of ‖ΔW‖²"}
    note = f"means over n = {n} edits and all sites"
    return finish("spectra", title, axes, frame, note=note, **labels)


@in_style
def success_against_locality(runs: Mapping[str, Means], scores: Mapping[str, float]) -> Chart:
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
    frame = interval_rows(runs, HEADLINE_LABELS)
    title = f"Score of {len(scores)} runs: {span(scores)}" if scores else "No run was scored"
    note = f"n = {frame['n'].max()} edits, each on a fresh model; numbers are those of the table"
    return finish("success_against_locality", title, axes, frame, note=note)


@in_style
def scatter(frame: pd.DataFrame, x: str, y: str, *, name: str = "own") -> Chart:
    """Two columns of a frame, a point a row; the title tells how their ranks go together."""
    points = frame[[x, y]].dropna().astype(float)
    (ax,) = axes = panels(1, 3)
    ax.scatter(points[x], points[y], alpha=0.6)
    title = f"Rank correlation of {y} with {x}: {points.rank().corr().iloc[0, 1]:.2f}"
    return finish(name, title, axes, points, note=f"n = {len(points)}", xlabel=x, ylabel=y)


# ---- costs


def charts_of_costs(results: Mapping[str, Any]) -> list[Chart]:
    """Time and memory of every way to train, of `run_bench`'s results."""
    models = {name: found for name, found in results.items() if "train" in found}
    measured = {name: found for name, found in models.items() if "memory" in found}
    return [_bars("train", models, *TIME), _bars("memory", measured, *MEMORY)]


@in_style
def _bars(
    what: str, models: Mapping[str, Any], name: str, column: str, title: str, unit: str
) -> Chart:
    """A bar for each way to train, a panel a model; the title compares textbook and kit."""
    ratios, tables = [], []
    axes = panels(len(models), 1.6, columns=1)
    for ax, (model, found) in zip(axes, models.items(), strict=True):
        table = pd.DataFrame(found[what]).T
        ax.bar_label(ax.barh(range(len(table)), table[column], 0.7), fmt=" {:.3g}")
        categories(ax, list(table.index))
        ax.set_title(f"{model} (n = {len(table)} ways to train)")
        doubt = "" if found["equal"] else ", not the same numbers"
        ratios.append(f"{found[f'{what}_ratio']:.1f} ({model}{doubt})")
        tables.append(table.rename_axis("way").reset_index().assign(model=model))
    title += f", textbook over kit: {', '.join(ratios)}"
    note = "each way is measured with its caches and optimiser"
    labels = {"xlabel": unit, "ylabel": "way to train"}
    return finish(name, title, axes, pd.concat(tables), note=note, **labels)
