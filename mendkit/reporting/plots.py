"""Figures: data in, labelled figure out; the only importer of matplotlib.

Every function returns a `Chart`: a figure whose title is a finding computed from the data (findings.py), with
the rows it was drawn from. Figures are plain `Figure` objects (no pyplot, no global state). Shares lie in
[0, 1]; whiskers are 95 % intervals over edits; colours are those of Okabe and Ito, and markers differ, too.
"""

import base64
import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogFormatter

from . import findings
from .findings import Mean, Row, Summary

WIDTH, DPI = 7.2, 150  # inches, dots per inch
BLACK, GREY, BLUE, ORANGE = "#222222", "#8A8A8A", "#0072B2", "#E69F00"
GREEN, RED, PURPLE = "#009E73", "#D55E00", "#CC79A7"
COLOURS, MARKERS = (BLACK, BLUE, ORANGE, GREEN, RED, PURPLE), "osD^vPX"
TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)  # of a share
TINY = 1e-5  # KL may be 0, which a logarithmic axis cannot show
NATS, KL = "NLL of the new answer (nats per token)", "KL(unedited ‖ edited) (nats)"
ALONE = "each on a fresh model; teacher-forced"

SHARES = {
    "edit_success": ("edit success", BLUE, "o"),
    "paraphrase": ("paraphrase", ORANGE, "s"),
    "neighbourhood": ("neighbourhood", GREEN, "^"),
    "locality": ("locality (unrelated)", PURPLE, "D"),
    "score": ("score (harmonic mean)", BLACK, "x"),
}
"""Validation shares: label, colour, marker. The first two are teacher-forced, all target tokens right."""

LOSSES = {
    "edit": ("edit", BLUE, NATS),
    "paraphrases": ("paraphrases", ORANGE, NATS),
    "neighbours": ("neighbours", GREEN, KL),
    "unrelated": ("unrelated prompts", PURPLE, KL),
}
"""Losses by role: label, colour, axis."""

HEADLINE_LABELS = {
    "edit_success.free_exact": "edit success\n(writes the new answer)",
    "paraphrase.free_exact": "paraphrase\n(writes the new answer)",
    "neighbourhood.argmax_agreement": "neighbourhood\n(argmax as before)",
    "locality.argmax_agreement": "locality, unrelated\n(argmax as before)",
}


SCORES = {
    "tf_token": "teacher-forced,\nshare of tokens",
    "tf_exact": "teacher-forced,\nall tokens",
    "free_gold_length": "free decoding,\ncut at the answer's length",
    "free_contains": "free decoding,\nanswer somewhere in it",
    "free_exact": "free decoding,\nexactly the answer",
    "free_exact_question": "the same,\nasked as a question",
}
"""Ways to score one and the same answer, roughly from the easiest to the hardest."""


AT_ONCE = {
    "edit_success.free_exact": "edit success",
    "paraphrase.free_exact": "paraphrase",
    "neighbourhood.argmax_agreement": "neighbourhood (argmax as before)",
    "locality.argmax_agreement": "locality (argmax as before)",
}
IN_A_ROW = {
    "edit_success.free_exact": "edit success right after the edit",
    "retention.all": "retention: of all edits so far, now",
    "locality.argmax_agreement": "locality (argmax as before), now",
    "norm.relative_max": "relative norm of the change, largest site",
    "drawdown.perplexity": "perplexity of held-out text, above before",
}
MEASURES = {"norm.relative_max": "‖ΔW‖ / ‖W‖", "drawdown.perplexity": "perplexity"}
"""Panels of notebook 05: many edits at once, and in a row; and the metrics that are no shares."""


@dataclass(frozen=True)
class Chart:
    """A figure, its title (the finding) and the rows it was drawn from. Shows itself in a notebook."""

    name: str
    finding: str
    figure: Figure
    rows: tuple[Row, ...]

    def png(self) -> bytes:
        """The figure as PNG."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Title": self.finding})
        return buffer.getvalue()

    def save(self, folder: str | Path, /) -> "Chart":
        """Write `<name>.png` and `<name>.csv` into the folder (made if need be); returns the chart."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.png").write_bytes(self.png())
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with (folder / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        return self

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[Row, Row]:
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.finding}
        return data, {"image/png": {"width": round(WIDTH * 100)}}


# --------------------------------------------------------------------------------------------------- training


def loss_curves(history: Sequence[Row], /) -> Chart:
    """Losses by role against steps: raw training rows, their running mean, the validation loss as markers."""
    train = [row for row in history if "loss" in row]
    figure, axes = _panels(2, 3.7)
    for role, (label, colour, unit) in LOSSES.items():
        ax = axes[unit == KL]
        ax.set(xlabel="training step", ylabel=unit)
        rows = [row for row in train if role in row]
        if rows:
            x, y = [row["step"] for row in rows], [max(row[role], TINY) for row in rows]
            ax.plot(x, y, color=colour, alpha=0.25, lw=0.8)
            ax.plot(x, findings.smooth(y), color=colour, lw=1.8, label=label)
        key = f"val.loss.{role}"
        rows = [row for row in history if key in row]
        style = {"color": colour, "ls": ":", "lw": 1, "marker": "o", "ms": 4, "mfc": "white"}
        ax.plot([row["step"] for row in rows], [max(row[key], TINY) for row in rows], **style)
    for ax in axes:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    note = f"faint: {len(train)} logged batches; lines: their running mean; hollow markers: validation edits"
    return _chart("loss_curves", findings.losses(history), figure, history, note=note, key=False)


def validation_curves(history: Sequence[Row], best: Row, /, *, n: int) -> Chart:
    """Validation shares over n edits against steps and wall time; `best` is the row of the kept archive."""
    rows = [row for row in history if "val.score" in row]
    figure, axes = _panels(2, 3.8)
    units = {"step": "training step", "seconds": "wall time (s), caches included"}
    for ax, (key, unit) in zip(axes, units.items(), strict=True):
        _mark(ax, best[key], "kept")
        _share_lines(ax, rows, key, prefix="val.")
        ax.set(xlabel=unit, ylabel="share of validation edits" if key == "step" else "")
    table = [{k: v for k, v in row.items() if k in units or k.startswith("val.")} for row in rows]
    finding = findings.validation(history, best)
    return _chart("validation", finding, figure, table, note=f"n = {n} validation edits, {ALONE}")


def step_sizes(edit_lrs: Mapping[str, float], /, *, start: float) -> Chart:
    """Size of the learned step α of every site (an imported one may be negative), and where all started."""
    names, values = (
        [findings.short_site(name) for name in edit_lrs],
        [abs(value) for value in edit_lrs.values()],
    )
    figure, (ax,) = _panels(1, 1.5 + 0.24 * len(names))
    y, low, high = range(len(names)), min([start, *values]), max([start, *values])
    _mark(ax, start, "start")
    ax.hlines(y, start, values, color=BLUE, lw=1.2, alpha=0.6)
    ax.plot(values, y, "o", color=BLUE, ms=6)
    ax.set_xscale("log")
    ax.set_xlim(low / 1.3, high * 1.3)
    ax.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
    ax.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    _categories(ax, names)
    ax.set(xlabel="step size α (log scale)", ylabel="edit site (block.layer)")
    rows = [{"site": site, "edit_lr": value, "start": start} for site, value in edit_lrs.items()]
    finding = findings.step_sizes(edit_lrs, start=start)
    return _chart("step_sizes", finding, figure, rows, note=f"n = {len(names)} sites", key=False)


def control_curve(rows: Sequence[Row], best: Row, /, *, n: int) -> Chart:
    """The identity control's validation shares by step size, and the trained editor's score (`best` row)."""
    figure, (ax,) = _panels(1, 4)
    _share_lines(ax, rows, "edit_lr")
    ax.axhline(best["val.score"], color=BLACK, ls="--", lw=1.2, label="score of the trained editor")
    ax.set_xscale("log")
    ax.set(
        xlabel="step size α of the untrained editor (log scale)", ylabel="share of validation edits"
    )
    note = f"n = {n} validation edits, {ALONE}"
    return _chart("control", findings.control(rows, best), figure, rows, note=note)


# ---------------------------------------------------------------------------------------------------- editing


def next_token_bars(facts: Sequence[Row], /) -> Chart:
    """Next-token probabilities before and after each edit, one panel per fact.

    A fact has `prompt`, its answers `new` and `old` (or None), their first tokens `new_token`, `old_token`,
    and `before`, `after`: probabilities by token.
    """
    figure, axes = _panels(len(facts), 0.9 + 2.4 * -(-len(facts) // 2))
    table: list[Row] = []
    for ax, fact in zip(axes, facts, strict=True):
        before, after = fact["before"], fact["after"]
        most = {
            token: max(before.get(token, 0.0), after.get(token, 0.0))
            for token in {**after, **before}
        }
        named = {fact["old_token"]: " (old)"} if fact["old_token"] in most else {}
        named[fact["new_token"]] = " (new)" if fact["new_token"] not in named else " (new and old)"
        tokens = [*named, *sorted(most.keys() - named, key=most.__getitem__, reverse=True)][:7]
        tokens.sort(key=lambda token: most.get(token, 0.0), reverse=True)
        for offset, state, colour in ((-0.2, "before", GREY), (0.2, "after", BLUE)):
            y = [k + offset for k in range(len(tokens))]
            ax.barh(
                y,
                [fact[state].get(t, 0.0) for t in tokens],
                0.38,
                color=colour,
                label=f"{state} the edit",
            )
        texts = {t: _drawable(t.replace("\n", "⏎").replace(" ", "␣")) or "(empty)" for t in tokens}
        _categories(ax, [texts[t] + named.get(t, "") for t in tokens])
        ax.set(xlim=(0, 1), xlabel="probability", ylabel="next token")
        title = textwrap.fill(
            _drawable(f"{fact['prompt']} → {fact['new']}"), 38 if len(facts) > 1 else 90
        )
        ax.set_title(title, fontsize=8.5, loc="left", parse_math=False)
        own = {key: fact[key] for key in ("prompt", "new", "old")}
        table += [
            {**own, "token": t, "before": before.get(t), "after": after.get(t)} for t in tokens
        ]
    note = "␣: a space; ⏎: a new line; (new), (old): first token of the answer"
    return _chart("next_tokens", findings.next_tokens(facts), figure, table, note=note)


def headline(trained: Summary, control: Summary, /) -> Chart:
    """The four headline shares of the unedited model, the identity control and the trained editor.

    The unedited model's values are `before.<metric>`, or 1 where it would be compared with itself.
    """
    labels = {
        metric: label
        for metric, label in HEADLINE_LABELS.items()
        if metric in {*trained} & {*control}
    }
    figure, (ax,) = _panels(1, 1.6 + 0.8 * len(labels))
    editors = (
        ("unedited", GREY, "D"),
        ("identity control", RED, "s"),
        ("trained editor", BLUE, "o"),
    )
    rows: list[Row] = []
    for i, metric in enumerate(labels):
        found = (trained.get(f"before.{metric}"), control[metric], trained[metric])
        for k, ((name, colour, marker), value) in enumerate(zip(editors, found, strict=True)):
            y, text = i + 0.26 * (k - 1), "1 by definition"
            if value is None:
                ax.plot(1, y, marker, mfc="white", color=colour, ms=5.5)
                rows.append({"editor": name, "metric": metric, "mean": 1.0})
            else:
                text = f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"
                drawn = _whisker(
                    ax, value, y, colour=colour, marker=marker, label=name if i == 0 else ""
                )
                rows.append({"editor": name, "metric": metric, **drawn})
            ax.text(1.05, y, text, color=colour, fontsize=8, va="center")
    _categories(ax, list(labels.values()))
    ax.set(
        xlim=(-0.03, 1.3), xticks=TICKS, xlabel="share, with its 95 % interval", ylabel="measure"
    )
    n = max((trained[metric].n for metric in labels), default=0)
    note = f"score: harmonic mean of the shares shown; n = {n} edits, each on a fresh model"
    return _chart("headline", findings.verdict(trained, control), figure, rows, note=note)


def decoding(summary: Summary, /) -> Chart:
    """One editor under every score of its answers: on the edit prompt, on paraphrases, and before the edit."""
    figure, (ax,) = _panels(1, 1.5 + 0.55 * len(SCORES))
    rows: list[Row] = []
    series = (
        ("unedited", "before.edit_success", GREY, "D"),
        ("edit success", "edit_success", BLUE, "o"),
    )
    for k, (label, prefix, colour, marker) in enumerate(
        (*series, ("paraphrase", "paraphrase", ORANGE, "s"))
    ):
        for i, name in enumerate(SCORES):
            if (value := summary.get(f"{prefix}.{name}")) is not None:
                y, first = i + 0.24 * (k - 1), not any(row["series"] == label for row in rows)
                drawn = _whisker(
                    ax, value, y, colour=colour, marker=marker, label=label if first else ""
                )
                ax.text(1.05, y, f"{value.mean:.2f}", color=colour, fontsize=8, va="center")
                rows.append({"series": label, "score": name, **drawn})
    _categories(ax, list(SCORES.values()))
    ax.set(
        xlim=(-0.03, 1.12),
        xticks=TICKS,
        xlabel="share, with its 95 % interval over edits",
        ylabel="score",
    )
    note = f"n = {max(row['n'] for row in rows)} edits, each on a fresh model"
    return _chart("decoding", findings.decoding(summary), figure, rows, note=note)


def editors(summaries: Mapping[str, Summary], /) -> Chart:
    """The headline shares of several editors, a panel each; the first is drawn apart."""
    labels = {
        m: label
        for m, label in HEADLINE_LABELS.items()
        if any(m in own for own in summaries.values())
    }
    figure, axes = _panels(len(labels), 1.2 + (0.8 + 0.2 * len(summaries)) * -(-len(labels) // 2))
    rows: list[Row] = []
    for ax, (metric, label) in zip(axes, labels.items(), strict=True):
        for y, (name, own) in enumerate(summaries.items()):
            if metric in own:
                colour, marker = (BLACK, "s") if y else (BLUE, "o")
                rows.append(
                    {
                        "editor": name,
                        "metric": metric,
                        **_whisker(ax, own[metric], y, colour=colour, marker=marker, label=""),
                    }
                )
                ax.text(1.05, y, f"{own[metric].mean:.2f}", color=colour, fontsize=8, va="center")
        left = ax.get_subplotspec().is_first_col()
        _categories(ax, list(summaries))
        ax.tick_params(labelleft=left)
        ax.set_title(label.replace("\n", " "), fontsize=9, loc="left")
        ax.set(
            xlim=(-0.03, 1.2),
            xticks=TICKS,
            xlabel="share, with its 95 % interval",
            ylabel="editor" if left else "",
        )
    note = f"n = {max(row['n'] for row in rows)} edits, each on a fresh model; headline score: harmonic mean of the four"
    return _chart("editors", findings.ranking(summaries), figure, rows, note=note, key=False)


def many_edits(rows: Sequence[Row], /, *, at_once: bool) -> Chart:
    """Each metric against the number of edits that a model holds, a line for each editor (`tables.many` rows)."""
    labels = {
        m: label
        for m, label in (AT_ONCE if at_once else IN_A_ROW).items()
        if any(r["metric"] == m for r in rows)
    }
    figure, axes = _panels(len(labels), 1 + 2.5 * -(-len(labels) // 2))
    shown, counts = [], sorted({row["edits"] for row in rows})
    for ax, (metric, label) in zip(axes, labels.items(), strict=True):
        for (colour, marker), editor in zip(
            SERIES, dict.fromkeys(row["editor"] for row in rows), strict=False
        ):
            own = [row for row in rows if row["metric"] == metric and row["editor"] == editor]
            shown += own
            x, y = [row["edits"] for row in own], [row["mean"] for row in own]
            ax.plot(x, y, color=colour, marker=marker, ms=4, lw=1.4, label=editor)
            if all("low" in row for row in own):
                ax.fill_between(
                    x,
                    [r["low"] for r in own],
                    [r["high"] for r in own],
                    color=colour,
                    alpha=0.12,
                    lw=0,
                )
        ax.set_title(label, fontsize=9, loc="left")
        ax.set(xscale="log", xlabel="edits made " + ("at once" if at_once else "in a row"))
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        if metric in MEASURES:
            lowest = min(row["mean"] for row in rows if row["metric"] == metric)
            ax.set(yscale="symlog", ylabel=MEASURES[metric])
            ax.set_ylim(bottom=1.1 * min(lowest, 0))
        else:
            ax.set(ylim=(-0.03, 1.03), ylabel="share")
    n = max((row["n"] for row in shown if "n" in row), default=0)
    name, note = (
        ("at_once", "made at once") if at_once else ("in_a_row", "in one sequence, never reset")
    )
    note = f"bands: 95 % intervals over up to n = {n} edits {note}; free decoding"
    return _chart(name, findings.many(rows, at_once=at_once), figure, shown, note=note)


def by_relation(edit: Summary, paraphrase: Summary, /) -> Chart:
    """Edit success and paraphrase (free decoding, exact) of every relation, best first, with intervals."""
    order = sorted(edit, key=lambda name: (-edit[name].mean, name))
    figure, (ax,) = _panels(1, 1.6 + 0.3 * len(order))
    rows: list[Row] = []
    pairs = (
        ("edit success", edit, BLUE, "o", -0.16),
        ("paraphrase", paraphrase, ORANGE, "s", 0.16),
    )
    for label, values, colour, marker, offset in pairs:
        for name in (name for name in order if name in values):
            first = not any(row["metric"] == label for row in rows)
            y = order.index(name) + offset
            drawn = _whisker(
                ax, values[name], y, colour=colour, marker=marker, label=label if first else ""
            )
            rows.append({"relation": name, "metric": label, **drawn})
    _categories(ax, [f"{findings.relation(name)} (n = {edit[name].n})" for name in order])
    ax.set(xlim=(-0.03, 1.03), xticks=TICKS, ylabel="relation (n edits)")
    ax.set_xlabel("share written exactly, with its 95 % interval over edits")
    return _chart(
        "by_relation",
        findings.by_relation(edit),
        figure,
        rows,
        note="each edit on a fresh model; free decoding",
    )


def probability_shifts(values: Sequence[Row], /) -> Chart:
    """Each edit's log P of the new and the old answer, before (x) and after (y); `values` are its row's."""
    kinds = {"log_p.new": ("new answer", BLUE), "log_p.old": ("old answer", RED)}
    pairs = {
        k: [(r[f"before.{k}"], r[k]) for r in values if k in r and f"before.{k}" in r]
        for k in kinds
    }
    pairs = {kind: found for kind, found in pairs.items() if found}
    lowest = min(min(pair) for found in pairs.values() for pair in found)
    figure, axes = _panels(len(pairs), 4)
    for ax, (kind, found) in zip(axes, pairs.items(), strict=True):
        label, colour = kinds[kind]
        x, y = zip(*found, strict=True)
        ax.plot([lowest, 0], [lowest, 0], color=GREY, lw=1, ls="--")
        ax.scatter(x, y, s=14, color=colour, alpha=0.45, linewidths=0)
        ax.plot(median(x), median(y), "P", color=BLACK, ms=9, mec="white")
        ax.set_title(f"{label} (n = {len(found)} edits)", fontsize=9, loc="left")
        limits = (lowest * 1.03, -lowest * 0.03)
        ax.set(xlim=limits, ylim=limits, aspect="equal")
        ax.set(xlabel="log P before (nats per token)", ylabel="log P after (nats per token)")
        ax.label_outer()
    rows = [
        {key: row.get(key) for kind in pairs for key in (f"before.{kind}", kind)} for row in values
    ]
    note = "dashed: unchanged; cross: median"
    return _chart("probability_shifts", findings.shifts(values), figure, rows, note=note, key=False)


def strength_curve(rows: Sequence[Row], /, *, n: int) -> Chart:
    """Shares over n edits against the strength that multiplies every update (1: as trained)."""
    figure, (ax,) = _panels(1, 4)
    _mark(ax, 1, "as trained")
    _share_lines(ax, rows, "strength")
    ax.set(xlabel="strength (factor on every update)", ylabel="share of edits")
    return _chart("strength", findings.strength(rows), figure, rows, note=f"n = {n} edits, {ALONE}")


# ---------------------------------------------------------------------------------------------- inside an edit


SERIES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (RED, "v"), (BLACK, "x"))
"""Colours and markers of series that are named by the data."""


def ranks(rows: Sequence[Row], /) -> Chart:
    """Numerical rank of each gradient against its number of tokens (`rank`, `tokens`, `error` of each row)."""
    figure, (ax,) = _panels(1, 3.8)
    most = max(row["tokens"] for row in rows)
    ax.plot([0, most], [0, most], color=GREY, lw=1, ls="--", label="rank = tokens")
    ax.scatter(
        [r["tokens"] for r in rows],
        [r["rank"] for r in rows],
        s=22,
        color=BLUE,
        alpha=0.35,
        linewidths=0,
    )
    ax.set(
        xlabel="tokens that contribute (count)",
        ylabel="numerical rank of ∇L (count)",
        xlim=(0, None),
    )
    ax.set_ylim(0, None)
    full = min(row["full_rank"] for row in rows)
    note = f"n = {len(rows)} gradients (texts × sites), dense, by autograd; a full rank would be {full} or more"
    return _chart("ranks", findings.rank_one(rows), figure, rows, note=note)


def signs(minus: Sequence[Row], plus: Sequence[Row], /, *, n: int) -> Chart:
    """Edit loss and neighbours' KL of the untrained update with either sign (`sweep` rows; size 0 is unedited)."""
    series = {"minus: W − α Σ δ uᵀ": minus, "plus: W + α Σ δ uᵀ": plus}
    return _sweeps("signs", findings.signs(minus, plus), series, n=n)


def normalisers(sweeps: Mapping[str, Sequence[Row]], /, *, n: int) -> Chart:
    """Edit loss and neighbours' KL of untrained updates that differ in what normalises the factors (`sweep` rows)."""
    return _sweeps("normalisers", findings.normalisers(sweeps), sweeps, n=n)


def alignment(rows: Sequence[Row], /, *, n: int) -> Chart:
    """Median cosine of −ΔW with the true gradient by site (`site`, `series`, `cosine` of each row)."""
    sites = list(dict.fromkeys(row["site"] for row in rows))
    figure, (ax,) = _panels(1, 2 + 0.24 * len(sites))
    ax.axvline(0, color=GREY, lw=1)
    for (colour, marker), series in zip(
        SERIES, dict.fromkeys(row["series"] for row in rows), strict=False
    ):
        own = [(row["cosine"], sites.index(row["site"])) for row in rows if row["series"] == series]
        ax.plot(*zip(*own, strict=True), marker, color=colour, ms=6, label=series)
    _categories(ax, [findings.short_site(site) for site in sites])
    ax.set(
        xlim=(min(-0.1, *(row["cosine"] * 1.1 for row in rows)), 1.03),
        ylabel="edit site (block.layer)",
    )
    ax.set_xlabel("cosine of −ΔW with the true gradient ∇L (1: the same direction)")
    note = f"medians over n = {n} edits"
    return _chart("alignment", findings.alignment(rows), figure, rows, note=note)


def spectra(rows: Sequence[Row], /, *, n: int) -> Chart:
    """Share of ‖ΔW‖² in the first k singular directions (`series`, `directions`, `share` of each row)."""
    figure, (ax,) = _panels(1, 3.8)
    for (colour, marker), series in zip(
        SERIES, dict.fromkeys(row["series"] for row in rows), strict=False
    ):
        own = [(row["directions"], row["share"]) for row in rows if row["series"] == series]
        ax.plot(*zip(*own, strict=True), color=colour, marker=marker, ms=4, lw=1.4, label=series)
    ax.set(
        ylim=(0, 1.03),
        xlabel="singular directions, the largest first (count)",
        ylabel="share of ‖ΔW‖², cumulative",
    )
    ax.set_xticks(sorted({row["directions"] for row in rows}))
    note = f"means over n = {n} edits and all sites"
    return _chart("spectra", findings.spectra(rows), figure, rows, note=note)


def _sweeps(name: str, finding: str, sweeps: Mapping[str, Sequence[Row]], /, *, n: int) -> Chart:
    """Edit loss (left) and neighbours' KL (right) against the update's relative norm."""
    figure, axes = _panels(2, 4.7)
    for ax, (key, unit) in zip(axes, (("loss.edit", NATS), ("loss.neighbours", KL)), strict=True):
        for (colour, marker), (series, rows) in zip(SERIES, sweeps.items(), strict=False):
            found = [
                (abs(row["size"]), row[key])
                for row in rows
                if row["size"] and row.get(key, 0) >= TINY
            ]
            if found:
                ax.plot(
                    *zip(*found, strict=True),
                    color=colour,
                    marker=marker,
                    ms=4,
                    lw=1.4,
                    label=series,
                )
            before = [row[key] for row in rows if not row["size"] and key in row]
            if before and key == "loss.edit":
                ax.axhline(before[0], color=GREY, lw=1, ls="--")
        ax.set(
            xscale="log", yscale="log", xlabel="relative norm ‖ΔW‖ / ‖W‖ (log scale)", ylabel=unit
        )
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    rows = [{"series": series, **row} for series, own in sweeps.items() for row in own]
    note = f"dashed: unedited; n = {n} edits, {ALONE}; an edit's mean norm, over all sites"
    return _chart(name, finding, figure, rows, note=note)


# ------------------------------------------------------------------------------------------------------- costs


def charts_of_costs(results: Mapping[str, Any], /) -> list[Chart]:
    """Every figure of `run_bench`'s results."""
    charts = [costs_of_training(results), memory_of_training(results)]
    return charts + ([depth_curve(results["depths"])] if "depths" in results else [])


def costs_of_training(results: Mapping[str, Any], /) -> Chart:
    """Seconds per edit of every way to train, a panel for each model (`run_bench`'s results)."""
    models = {name: own for name, own in results.items() if "train" in own}
    rows = [
        {
            "model": model,
            "way": way,
            "seconds_per_edit": found["seconds_per_edit"],
            "ratio": found["ratio"],
        }
        for model, own in models.items()
        for way, found in own["train"].items()
    ]
    n = " and ".join(f"{own['workload']['edits_per_step']}" for own in models.values())
    note = f"medians over turns; n = {n} edits a step, the optimiser's share included"
    unit = "seconds per edit trained"
    return _bars(
        "costs_of_training", findings.costs(results), rows, "seconds_per_edit", unit=unit, note=note
    )


def memory_of_training(results: Mapping[str, Any], /) -> Chart:
    """Peak memory above the base model of every way to train, a panel for each model (`run_bench`'s results)."""
    models = {name: own for name, own in results.items() if "memory" in own}
    rows = [
        {"model": m, "way": way, **found}
        for m, own in models.items()
        for way, found in own["memory"].items()
    ]
    n = len({row["way"] for row in rows})
    note = f"caches included; n = {n} ways, each measured once, in a process of its own"
    unit = "peak above the base model (GB)"
    return _bars(
        "memory_of_training", findings.memory(results), rows, "above_gb", unit=unit, note=note
    )


def depth_curve(depths: Mapping[str, Row], /) -> Chart:
    """Seconds per edit trained against the number of layers (`depths` of `run_bench`'s results)."""
    rows = [{"layers": int(count), **found} for count, found in depths.items()]
    figure, (ax,) = _panels(1, 3.4)
    ax.plot([r["layers"] for r in rows], [r["seconds_per_edit"] for r in rows], "o-", color=BLUE)
    ax.set(xlabel="layers of the model (count)", ylabel="seconds per edit trained")
    ax.set_ylim(0, None)
    note = f"n = {len(rows)} random models of equal width; medians over turns"
    return _chart("depth", findings.depth(rows), figure, rows, note=note)


def _bars(name: str, finding: str, rows: Sequence[Row], key: str, *, unit: str, note: str) -> Chart:
    """A horizontal bar for each `way`, a panel for each `model`; the first, the textbook, is grey, the second blue."""
    models, ways = (list(dict.fromkeys(row[k] for row in rows)) for k in ("model", "way"))
    figure, axes = _panels(len(models), 1.3 + (0.4 + 0.26 * len(ways)) * len(models), columns=1)
    for ax, model in zip(axes, models, strict=True):
        own = [row for row in rows if row["model"] == model]
        colours = [GREY, BLUE, *[ORANGE] * len(own)][: len(own)]
        ax.barh(range(len(own)), [row[key] for row in own], 0.7, color=colours)
        for y, row in enumerate(own):
            ax.text(row[key], y, f" {row[key]:.3g}", va="center", fontsize=8)
        ax.set_xlim(0, max(row[key] for row in own) * 1.15)
        _categories(ax, [row["way"] for row in own])
        ax.set_title(model, fontsize=9, loc="left")
        ax.set(xlabel=unit, ylabel="way to train")
    return _chart(name, finding, figure, rows, note=note, key=False)


# ---------------------------------------------------------------------------------------------------- several runs


def success_against_locality(runs: Mapping[str, Summary], scores: Mapping[str, float], /) -> Chart:
    """Runs of a sweep as points: what an edit does against what it leaves alone, with intervals. Up and right is best.

    `runs` by what was varied, in the order of their numbers from 1; `scores`: harmonic mean of the four shares.
    """
    figure, axes = _panels(2, 4.2)
    pairs = (("edit_success.free_exact", "locality.argmax_agreement"),)
    pairs += (("paraphrase.free_exact", "neighbourhood.argmax_agreement"),)
    rows: list[Row] = []
    for ax, (y, x) in zip(axes, pairs, strict=True):
        for number, (label, own) in enumerate(runs.items(), 1):
            if x in own and y in own:
                style = {"color": COLOURS[number % len(COLOURS)], "lw": 1.2, "alpha": 0.7}
                ax.plot([own[x].low, own[x].high], [own[y].mean] * 2, **style)
                ax.plot([own[x].mean] * 2, [own[y].low, own[y].high], **style)
                ax.plot(
                    own[x].mean,
                    own[y].mean,
                    MARKERS[number % len(MARKERS)],
                    color=style["color"],
                    ms=5.5,
                )
                ax.annotate(f" {number}", (own[x].mean, own[y].mean), fontsize=8, va="bottom")
                parts = ("mean", "low", "high")
                flat = {
                    f"{name}.{part}": getattr(own[name], part) for name in (x, y) for part in parts
                }
                rows.append({"run": number, "settings": label, **flat, "n": own[y].n})
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=TICKS, yticks=TICKS)
        ax.set(
            xlabel=HEADLINE_LABELS[x].replace("\n", " "),
            ylabel=HEADLINE_LABELS[y].replace("\n", " "),
        )
    n = max((row["n"] for row in rows), default=0)
    note = f"shares with 95 % intervals over n = {n} edits, each on a fresh model; numbers are those of the table"
    return _chart(
        "success_against_locality", findings.runs(scores), figure, rows, note=note, key=False
    )


def curves_of_runs(histories: Mapping[str, Sequence[Row]], /) -> Chart:
    """Validation shares of several runs against training steps: a panel for each share, a line for each run.

    `histories` by what was varied; one without a validation is left out.
    """
    curves = {label: [row for row in own if "val.score" in row] for label, own in histories.items()}
    curves = {label: own for label, own in curves.items() if own}
    names = [
        name
        for name in SHARES
        if any(f"val.{name}" in row for own in curves.values() for row in own)
    ]
    figure, axes = _panels(max(len(names), 1), 1 + 2.2 * -(-len(names) // 2))
    rows: list[Row] = []
    for ax, name in zip(axes, names, strict=False):
        for number, (label, own) in enumerate(curves.items(), 1):
            style = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number % len(MARKERS)],
                "ms": 4,
            }
            found = [(row["step"], row[f"val.{name}"]) for row in own if f"val.{name}" in row]
            ax.plot(*zip(*found, strict=True), **style, label=label)
            rows += [
                {"settings": label, "share": name, "step": step, "value": value}
                for step, value in found
            ]
        ax.set(xlabel="training step", ylabel=SHARES[name][0], ylim=(-0.03, 1.03), yticks=TICKS)
    finding = findings.runs(
        {label: max(row["val.score"] for row in own) for label, own in curves.items()}
    )
    note = f"n = {len(curves)} runs; shares of each run's validation edits, {ALONE}"
    return _chart("curves_of_runs", finding, figure, rows, note=note)


def scores_by_setting(by_setting: Mapping[str, Mapping[str, Sequence[float]]], /) -> Chart:
    """The score of every run above the values of each setting, and their mean; scores by setting and value."""
    drawn = by_setting or {"setting": {}}
    figure, axes = _panels(len(drawn), 1 + 2.8 * -(-len(drawn) // 2))
    rows: list[Row] = []
    for ax, (setting, own) in zip(axes, drawn.items(), strict=True):
        for at, (value, scores) in enumerate(own.items()):
            ax.plot(
                [at] * len(scores),
                scores,
                "o",
                color=BLUE,
                ms=5,
                alpha=0.6,
                label="one run" if at == 0 else None,
            )
            rows += [{"setting": setting, "value": value, "score": score} for score in scores]
        means = [sum(scores) / len(scores) for scores in own.values()]
        ax.plot(range(len(own)), means, "_", color=BLACK, ms=22, mew=1.8, label="mean")
        names = [textwrap.shorten(value, 24, placeholder="…") for value in own]
        ax.set_xticks(range(len(own)), names, parse_math=False)
        ax.set(xlabel=setting, ylabel="score (harmonic mean of four shares)", ylim=(-0.03, 1.03))
        ax.set_xlim(-0.6, len(own) - 0.4)
    n = sum(map(len, next(iter(drawn.values())).values()))
    note = f"n = {n} runs; all other settings vary, too"
    return _chart("scores_by_setting", findings.settings(by_setting), figure, rows, note=note)


# ---------------------------------------------------------------------------------------------------- helpers


def _panels(count: int, height: float, /, *, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of `height` inches with `count` panels in rows of at most `columns`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)
    columns = min(columns, count)
    axes = [figure.add_subplot(-(-count // columns), columns, i + 1) for i in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#E6E6E6", lw=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(which="both", labelsize=8, color=GREY)
        ax.xaxis.label.set_size(9)
        ax.yaxis.label.set_size(9)
    return figure, axes


def _chart(
    name: str, finding: str, figure: Figure, rows: Sequence[Row], /, *, note: str, key: bool = True
) -> Chart:
    """Put the finding on top; below, left, the note and (unless not `key`) the first panel's legend."""
    figure.suptitle(
        textwrap.fill(finding.replace(" = ", "\u00a0=\u00a0"), 80),
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
        parse_math=False,
    )
    handles, labels = figure.axes[0].get_legend_handles_labels() if key else ([], [])
    legend = figure.legend(
        handles, labels, loc="outside lower left", ncol=3, frameon=False, fontsize=8, title=note
    )
    legend.set_alignment("left")
    legend.get_title().set(fontsize=8, color="#555555")
    return Chart(name, finding, figure, tuple(dict(row) for row in rows))


def _drawable(text: str) -> str:
    """Text with the characters that the font lacks (control signs, some scripts) as \\u codes."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(c if ord(c) in known else f"\\u{ord(c):04x}" for c in text)


def _share_lines(ax: Axes, rows: Sequence[Row], key: str, /, *, prefix: str = "") -> None:
    for name, (label, colour, marker) in SHARES.items():
        found = [(row[key], row[prefix + name]) for row in rows if prefix + name in row]
        if found:
            width = 2.2 if name == "score" else 1.4
            ax.plot(
                *zip(*found, strict=True), color=colour, marker=marker, ms=4, lw=width, label=label
            )
    ax.set_ylim(-0.03, 1.03)


def _mark(ax: Axes, x: float | int, text: str, /) -> None:
    """A dashed vertical line, named above the axes."""
    ax.axvline(x, color=GREY, lw=1, ls="--")
    ax.text(
        x,
        1,
        text,
        transform=ax.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize=8,
        color=GREY,
    )


def _categories(ax: Axes, names: Sequence[str], /) -> None:
    """Names down the y axis, the first on top."""
    ax.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(False, axis="y")


def _whisker(ax: Axes, value: Mean, y: float, /, *, colour: str, marker: str, label: str) -> Row:
    """Draw a mean with its interval; returns both."""
    ax.plot([value.low, value.high], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
    ax.plot(value.mean, y, marker, color=colour, ms=5.5, label=label or None)
    return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}
