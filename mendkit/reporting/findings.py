"""Findings: sentences computed from a run, right also when the run went badly. Plain data in, text out.

Summaries map metric names to means over edits with a 95 % interval. Shares lie in [0, 1].
"""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean, harmonic_mean, median
from typing import Any, Protocol, runtime_checkable

HEADLINE = (
    "edit_success.free_exact",
    "paraphrase.free_exact",
    "neighbourhood.argmax_agreement",
    "locality.argmax_agreement",
)
"""The four shares by which editors are compared; their harmonic mean is the headline score."""

SHARES = ("edit_success", "paraphrase", "neighbourhood", "locality")
"""Their teacher-forced forms in validation; their harmonic mean is the validation score."""


@runtime_checkable
class Mean(Protocol):
    """A mean over n edits with its 95 % interval."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def n(self) -> int: ...


Row = Mapping[str, Any]
Summary = Mapping[str, Mean]


def headline_score(summary: Summary, /) -> float:
    """Harmonic mean of the headline shares that a summary has; NaN if it has none."""
    means = [summary[name].mean for name in HEADLINE if name in summary]
    return harmonic_mean(means) if means else float("nan")


def verdict(trained: Summary, control: Summary, /) -> str:
    """Whether the trained editor beats the identity control on the headline score."""
    a, b = headline_score(trained), headline_score(control)
    verb = "beats" if a > b else "does not beat"
    return f"The trained editor {verb} the identity control: score {a:.2f} against {b:.2f}"


def decoding(summary: Summary, /) -> str:
    """Edit success under one score after the other, from teacher forcing to free decoding in another format."""
    steps = {
        "tf_exact": "under teacher forcing",
        "free_gold_length": "in free decoding cut at the answer's length",
    }
    steps |= {"free_exact": "uncut", "free_exact_question": "asked as a question"}
    own = {said: summary.get(f"edit_success.{name}") for name, said in steps.items()}
    return "Edit success is " + ", ".join(
        f"{value.mean:.2f} {said}" for said, value in own.items() if value is not None
    )


def ranking(summaries: Mapping[str, Summary], /) -> str:
    """Which editor is best by the headline score, and which by teacher forcing on the edit prompt alone."""
    scores = {name: headline_score(own) for name, own in summaries.items()}
    forced = {name: own["edit_success.tf_exact"].mean for name, own in summaries.items()}
    best, most = max(scores, key=scores.__getitem__), max(forced.values())
    equal = [name for name, mean in forced.items() if mean == most]
    if not scores[best]:
        return f"None of {len(scores)} editors has a headline score above 0"
    teacher = f"{len(equal)} share the lead," if len(equal) > 1 else f"{equal[0]},"
    headline = f"Best of {len(scores)} by the headline score: {best}, {scores[best]:.2f}"
    return f"{headline}; by teacher forcing: {teacher} {most:.2f}"


def smooth(values: Sequence[float], /) -> list[float]:
    """Centred running mean over a twelfth of the values, narrower at the ends."""
    half = len(values) // 24
    return [fmean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


def losses(history: Sequence[Row], /) -> str:
    """How the edit loss moved, in training (smoothed) and in validation."""
    train = [row for row in history if "loss" in row]
    val = [row["val.loss.edit"] for row in history if "val.loss.edit" in row]
    moved = _moved(smooth([row["edit"] for row in train]), " nats")
    text = f"The edit loss {moved} in {train[-1]['step']:g} steps"
    return text + (f"; on validation edits it {_moved(val)}" if val else "")


def validation(history: Sequence[Row], best: Row, /) -> str:
    """Whether training raised the validation score, from before the first step to the kept archive's row."""
    before = next(row["val.score"] for row in history if "val.score" in row)
    verb = "raised" if best["val.score"] > before else "did not raise"
    return (
        f"Training {verb} the validation score: {before:.2f} before the first step, "
        f"{best['val.score']:.2f} at step {best['step']:g}, whose archive was kept"
    )


def step_sizes(edit_lrs: Mapping[str, float], /, *, start: float) -> str:
    """Between which values the learned step sizes lie."""
    by_size = sorted(edit_lrs, key=lambda site: abs(edit_lrs[site]))
    small, large = by_size[0], by_size[-1]
    low, high = (f"{edit_lrs[site]:.1e} ({short_site(site)})" for site in (small, large))
    return f"From a start of {start:.1e}, the step sizes went to between {low} and {high}"


def control(rows: Sequence[Row], best: Row, /) -> str:
    """Whether some step size brings the untrained editor to the trained one's validation score."""
    top = max(rows, key=lambda row: row["score"])
    won = best["val.score"] > top["score"]
    text = (
        "No step size brings the untrained editor to the trained one"
        if won
        else "The trained editor does not beat the identity control"
    )
    alpha = f"{top['edit_lr']:.1e}"
    if (
        len(rows) > 1
        and top["score"] > 0
        and top["edit_lr"] in (rows[0]["edit_lr"], rows[-1]["edit_lr"])
    ):
        alpha += " (the end of the range tried)"
    return (
        f"{text}: score {top['score']:.2f} at its best α = {alpha}, trained {best['val.score']:.2f}"
    )


def next_tokens(facts: Sequence[Row], /) -> str:
    """For how many facts the most probable next token begins the new answer, before and after the edit; of a single
    fact that token's probability."""
    if len(facts) == 1:
        p = [facts[0][state].get(facts[0]["new_token"], 0.0) for state in ("before", "after")]
        return f"The new answer's first token: probability {p[0]:.2f} before the edit, {p[1]:.2f} after it"

    def begun(state: str) -> int:
        return sum(max(f[state], key=f[state].get) == f["new_token"] for f in facts)

    return (
        f"The most probable next token is the new answer's first for {begun('before')} of {len(facts)} facts "
        f"before the edit and for {begun('after')} after it"
    )


def many(rows: Sequence[Row], /, *, at_once: bool) -> str:
    """Which editor keeps most of the largest number of edits, against the first one."""
    metric, most = (
        "edit_success.free_exact" if at_once else "retention.all",
        max(row["edits"] for row in rows),
    )
    kept = {
        row["editor"]: row["mean"]
        for row in rows
        if row["metric"] == metric and row["edits"] == most
    }
    first, best = next(iter(kept)), max(kept, key=kept.__getitem__)
    lead = f"Of {most} edits {'at once' if at_once else 'in a row'} {first} keeps {kept[first]:.2f}"
    return lead if best == first else f"{lead}, {best} {kept[best]:.2f}"


def cost_of_many(rows: Sequence[Row], /) -> list[str]:
    """For each editor what its edits cost elsewhere, at the largest number made at once."""
    most, out = max(row["edits"] for row in rows), []
    names = {
        "paraphrase.free_exact": "paraphrases",
        "locality.argmax_agreement": "unrelated prompts",
    }
    for editor in dict.fromkeys(row["editor"] for row in rows):
        own = {r["metric"]: r["mean"] for r in rows if r["editor"] == editor and r["edits"] == most}
        said = [f"{own[metric]:.2f} of {name}" for metric, name in names.items() if metric in own]
        if said:
            out.append(f"{editor}, {most} at once: {' and '.join(said)} are as they should be")
    return out


def by_relation(edit: Summary, /) -> str:
    """Between which relations edit success ranges."""
    best, worst = max(edit, key=lambda r: edit[r].mean), min(edit, key=lambda r: edit[r].mean)
    if len(edit) == 1:
        return f"Edit success is {edit[best].mean:.2f} on the only relation, {relation(best)}"
    if edit[best].mean == edit[worst].mean:
        return f"Edit success is {edit[best].mean:.2f} on each of the {len(edit)} relations"
    return (
        f"Edit success ranges from {edit[worst].mean:.2f} ({relation(worst)}) to {edit[best].mean:.2f} "
        f"({relation(best)}) over {len(edit)} relations"
    )


def shifts(values: Sequence[Row], /) -> str:
    """The median change of log P of the new and of the old answer."""
    parts = []
    for kind, label in (("log_p.new", "new answer"), ("log_p.old", "old answer")):
        changes = [
            row[kind] - row[f"before.{kind}"]
            for row in values
            if kind in row and f"before.{kind}" in row
        ]
        if changes:
            change = median(changes)
            parts.append(f"the {label} {'gains' if change >= 0 else 'loses'} {abs(change):.1f}")
    return f"In the median, {' and '.join(parts)} nats per token"


def strength(rows: Sequence[Row], /) -> str:
    """Whether another strength would score better than the trained one."""
    best = max(rows, key=lambda row: row["score"])
    trained = next((row["score"] for row in rows if row["strength"] == 1), None)
    if best["score"] == 0:
        return "No strength tried gives a score above 0"
    if trained is None or best["score"] > trained:
        versus = "" if trained is None else f", against {trained:.2f} as trained"
        return f"Strength {best['strength']:g} would score best: {best['score']:.2f}{versus}"
    return f"No other strength tried scores better than the trained one, {trained:.2f}"


# ----------------------------------------------------------------------------------------------- inside an edit


def medians(
    rows: Sequence[Row], /, *, by: Sequence[str], of: Sequence[str]
) -> list[dict[str, Any]]:
    """Medians of some columns over the rows that agree in the columns `by`, in their order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    middle = {
        key: {name: median(row[name] for row in own) for name in of} for key, own in groups.items()
    }
    return [dict(zip(by, key, strict=True)) | values for key, values in middle.items()]


def rank_one(rows: Sequence[Row], /) -> str:
    """Whether gradients are the sums of their tokens' rank-one terms, and how their ranks compare with the tokens."""
    worst, above = (
        max(row["error"] for row in rows),
        sum(row["rank"] > row["tokens"] for row in rows),
    )
    held = "are" if worst < 1e-3 else "are not"
    return (
        f"{len(rows)} gradients {held} the sums of their tokens' rank-one terms (largest relative error {worst:.0e}); "
        f"{above or 'none'} of them {'have' if above > 1 else 'has'} a rank above its number of tokens"
    )


def signs(minus: Sequence[Row], plus: Sequence[Row], /) -> str:
    """What the best descending step does to the edit loss, and what the same step uphill does. Rows hold `size`."""
    before = next(row["loss.edit"] for row in minus if row["size"] == 0)
    best = min((row for row in minus if row["size"]), key=lambda row: row["loss.edit"])
    down, up = (
        best["loss.edit"],
        next(row["loss.edit"] for row in plus if abs(row["size"]) == best["size"]),
    )
    claim = "Minus descends" if down < before else "Minus does not descend"
    claim += (
        ", plus climbs"
        if up >= before
        else ", and so does plus"
        if down < before
        else ", plus does"
    )
    return f"{claim}: from {before:.2f} nats per token to {down:.2f} and {up:.2f}, at a relative norm of {best['size']:g}"


def normalisers(sweeps: Mapping[str, Sequence[Row]], /) -> str:
    """At which size each kind of update writes half of the edits, and what that costs next door."""
    parts = []
    for name, rows in sweeps.items():
        reached = [row for row in rows if row["edit_success"] >= 0.5]
        row = (
            min(reached, key=lambda r: r["size"])
            if reached
            else max(rows, key=lambda r: r["edit_success"])
        )
        cost = f" (neighbours' KL {row['loss.neighbours']:.2g})" if "loss.neighbours" in row else ""
        none = f"at no norm tried (at most {row['edit_success']:.2f})"
        parts.append(
            f"{name} " + (f"at a relative norm of {row['size']:g}{cost}" if reached else none)
        )
    return f"Half of the edits are written by: {'; '.join(parts)}"


def grown(by_site: Sequence[Row], edit_lrs: Mapping[str, float], /, *, start: float) -> str:
    """How updates grew from the first series of each site to its last, and how the step sizes did."""
    steps = [abs(value) / start for value in edit_lrs.values()]
    ratios = {site: [row["norm"] for row in by_site if row["site"] == site] for site in edit_lrs}
    growth = {site: own[-1] / own[0] for site, own in ratios.items()}
    low, high = min(growth, key=growth.__getitem__), max(growth, key=growth.__getitem__)
    if max(abs(ratio - 1) for ratio in (*growth.values(), *steps)) < 0.005:
        return "Updates and step sizes are as large as at the start"
    ends = " to ".join(f"{growth[site]:.2g} ({short_site(site)})" for site in (low, high))
    return f"Updates are {ends} times as large as at the start, step sizes {min(steps):.2g} to {max(steps):.2g} times"


def alignment(rows: Sequence[Row], /) -> str:
    """How close updates are to the gradient, from the median cosine of each series at each site."""
    parts = []
    for series in dict.fromkeys(row["series"] for row in rows):
        own = [row["cosine"] for row in rows if row["series"] == series]
        parts.append(f"{series} {median(own):.2f} ({min(own):.2f} to {max(own):.2f})")
    return f"Cosine with the true gradient, median over sites (and range): {', '.join(parts)}"


def turned(rows: Sequence[Row], /) -> str:
    """How far updates were turned away from where they started, from the cosine at each site."""
    low, high = (pick(rows, key=lambda row: row["cosine"]) for pick in (min, max))
    claim = f"The {rows[0]['series']} update's cosine with its start is"
    if high["cosine"] - low["cosine"] < 0.005:
        return f"{claim} {low['cosine']:.2f} at every site"
    ends = " to ".join(f"{row['cosine']:.2f} ({short_site(row['site'])})" for row in (low, high))
    middle = median(row["cosine"] for row in rows)
    return f"{claim} {middle:.2f}, median over sites; from {ends}"


def spectra(rows: Sequence[Row], /) -> str:
    """How much of each series' energy the first singular direction holds."""
    first = [f"{row['share']:.2f} ({row['series']})" for row in rows if row["directions"] == 1]
    return f"The first singular direction holds a share of an update's energy of {', '.join(first)}"


def costs(results: Mapping[str, Any], /) -> str:
    """How many times the textbook's speed the kit trains with, on each model."""
    own = [(name, r) for name, r in results.items() if "train_ratio" in r]
    said = [
        f"{r['train_ratio']:.1f} ({name}{'' if r['equal'] else ', but not the same numbers'})"
        for name, r in own
    ]
    return f"Edits trained per second, kit over textbook: {', '.join(said)}"


def memory(results: Mapping[str, Any], /) -> str:
    """Memory above the base model, the textbook's and the kit's."""
    own = [(name, r["memory"]) for name, r in results.items() if "memory" in r]
    said = [
        f"{r['textbook']['above_gb']:.2f} and {r['kit']['above_gb']:.2f} GB ({name})"
        for name, r in own
    ]
    return f"Peak above the base model, textbook and kit: {', '.join(said)}"


def depth(rows: Sequence[Row], /) -> str:
    """Whether a step costs more on a deeper model."""
    low, high = rows[0], rows[-1]
    change = high["seconds_per_edit"] / low["seconds_per_edit"]
    same = low["gflop_per_edit"] == high["gflop_per_edit"]
    counted = (
        "the same operations"
        if same
        else f"{high['gflop_per_edit'] / low['gflop_per_edit']:.2f} times the operations"
    )
    return f"From {low['layers']} to {high['layers']} layers a step takes {change:.2f} times as long, with {counted}"


def short_site(name: str, /) -> str:
    """A site's block and layer: `model.layers.27.mlp.up_proj.weight` → `27.mlp.up_proj`."""
    found = re.search(r"(?:^|\.)(\d+\..*)", name.removesuffix(".weight"))
    return found[1] if found else name.removesuffix(".weight")


def relation(name: str, /) -> str:
    """A relation's name for people."""
    return "(no relation given)" if name == "None" else name.replace("_", " ")


def _moved(values: Sequence[float], unit: str = "") -> str:
    first, last = f"{values[0]:.2f}", f"{values[-1]:.2f}"
    if first == last:
        return f"stayed at {last}{unit}"
    return f"{'fell' if values[-1] < values[0] else 'rose'} from {first} to {last}{unit}"


def runs(scores: Mapping[str, float], /) -> str:
    """Which run of a sweep has the highest score; `scores` by what was varied."""
    if not scores:
        return "No run was scored"
    best, low = max(scores, key=lambda label: scores[label]), min(scores.values())
    if scores[best] == low:
        return f"No run is ahead: {len(scores)} scored {low:.2f}"
    return f"{best} has the highest score of {len(scores)} runs, {scores[best]:.2f}; the lowest is {low:.2f}"


def settings(by_setting: Mapping[str, Mapping[str, Sequence[float]]], /) -> str:
    """Which setting's values differ most in their mean score; scores by setting and value."""
    means = {
        key: {value: fmean(scores) for value, scores in own.items()}
        for key, own in by_setting.items()
    }
    spread = {
        key: max(own.values()) - min(own.values()) for key, own in means.items() if len(own) > 1
    }
    key = max(spread, key=lambda name: spread[name], default="")
    if not spread or not spread[key]:
        return "No setting was seen to move the score"
    own = means[key]
    low, high = (pick(own, key=lambda value: own[value]) for pick in (min, max))
    return f"The score depends most on {key}: {own[low]:.2f} on average with {low}, {own[high]:.2f} with {high}"
