"""Findings: sentences computed from a run, right also when the run went badly.

A summary maps metric names to means over edits with a 95 % interval. Shares lie in [0, 1].
"""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from ..evaluation.results import HEADLINE, EvaluationReport, Interval, headline_score

Row = Mapping[str, Any]
Rows = Sequence[Row] | pd.DataFrame
Summary = Mapping[str, Interval]


def short_site(name: str) -> str:
    """A site's block and layer: `model.layers.27.mlp.up_proj.weight` → `27.mlp.up_proj`."""
    return re.sub(r"^(\D+\.)?(?=\d+\.)", "", name).removesuffix(".weight")


def relation_name(relation: str) -> str:
    """A relation's name for people."""
    if relation == "None":
        return "(no relation given)"
    return relation.replace("_", " ")


def _ends(values: Mapping[str, float], form: str = ".2f") -> str:
    """The least and the greatest value, with their names."""
    least = min(values, key=values.__getitem__)
    most = max(values, key=values.__getitem__)
    return f"{values[least]:{form}} ({least}) to {values[most]:{form}} ({most})"


# ---- training


def losses(history: Sequence[Row]) -> str:
    """How the edit loss moved, in training (its running mean) and in validation."""
    frame = pd.DataFrame(history).reindex(columns=["edit", "val.loss.edit"])
    moved = []
    for loss in (smooth(frame["edit"].dropna()), frame["val.loss.edit"].dropna()):
        if len(loss):
            moved.append(f"from {loss.iloc[0]:.2f} to {loss.iloc[-1]:.2f}")
    return f"The edit loss went {', on validation edits '.join(moved)} nats"


def smooth(values: "pd.Series[float]") -> "pd.Series[float]":
    """Centred running mean over a twelfth of the values, narrower at the ends."""
    return values.rolling(2 * (len(values) // 24) + 1, center=True, min_periods=1).mean()


def validation(history: Sequence[Row], best: Row) -> str:
    """Whether training raised the validation score, up to the row of the kept archive."""
    before, kept = next(r["val.score"] for r in history if "val.score" in r), best["val.score"]
    verb = "raised"
    if kept <= before:
        verb = "did not raise"
    scores = f"{before:.2f} before the first step, {kept:.2f} at step {best['step']:g}"
    return f"Training {verb} the validation score: {scores}, whose archive was kept"


def step_sizes(edit_lrs: Mapping[str, float], *, start: float) -> str:
    """Between which values the learned step sizes lie."""
    sizes = {short_site(site): abs(alpha) for site, alpha in edit_lrs.items()}
    return f"From a start of {start:.1e}, the step sizes went to {_ends(sizes, '.1e')}"


def control(rows: Sequence[Row], best: Row) -> str:
    """Whether some step size brings the untrained editor to the trained one's validation score."""
    top, trained = max(rows, key=lambda row: row["score"]), best["val.score"]
    verb, at_end = "beats", ""
    if trained <= top["score"]:
        verb = "does not beat"
    # A best value at the end of a range may not be the best there is.
    if top in (rows[0], rows[-1]):
        at_end = " (the end of the range tried)"
    scores = f"{trained:.2f} against {top['score']:.2f} at α = {top['edit_lr']:.1e}{at_end}"
    return f"The trained editor {verb} the identity control at its best step size: {scores}"


# ---- editing


def ranking(summaries: Mapping[str, Summary]) -> str:
    """The place of the first editor by the headline score, and the best of the others."""
    first, *others = (headline_score(summary) for summary in summaries.values())
    name, *names = summaries
    place = 1 + sum(score >= first for score in others)
    rest = f"the best other is {names[others.index(max(others))]}, {max(others):.2f}"
    return f"{name} is number {place} of {len(summaries)} by headline score, {first:.2f}; {rest}"


def weakest(summary: Summary) -> str:
    """The lowest of the headline shares."""
    name = min((n for n in HEADLINE.values() if n in summary), key=lambda n: summary[n].mean)
    return f"The weakest of the four shares is {name}, {summary[name].mean:.2f}"


def failures(report: EvaluationReport) -> str:
    """How many edits the model does not write exactly."""
    failed = sum(row.values["edit_success.free_exact"] < 1 for row in report.rows)
    return f"{failed} of {len(report.rows)} edits are not written exactly by free decoding"


def neighbours(summary: Summary) -> str:
    """What neighbours keep, as the edit prompt words it and as its paraphrases do."""
    names = {
        "argmax_agreement": "their argmax in the edit prompt's wording",
        "reworded_agreement": "their argmax in a paraphrase's wording",
        "ns": "a preference for their old answer",
    }
    return f"Neighbours keep {_said(summary, 'neighbourhood.', names)}"


def decoding(summary: Summary) -> str:
    """Edit success from teacher forcing to free decoding in another format."""
    ways = {
        "tf_exact": "under teacher forcing",
        "free_gold_length": "in free decoding cut at the answer's length",
        "free_exact": "uncut",
        "free_exact_question": "asked as a question",
    }
    return f"Edit success: {_said(summary, 'edit_success.', ways)}"


def _said(summary: Summary, prefix: str, names: Mapping[str, str]) -> str:
    """Each of `names` that is known, in words, with its mean."""
    said = []
    for name, words in names.items():
        if prefix + name in summary:
            said.append(f"{words} {summary[prefix + name].mean:.2f}")
    return ", ".join(said)


def next_tokens(facts: Sequence[Row]) -> str:
    """For how many facts the most probable next token begins the new answer."""
    before, after = 0, 0
    for fact in facts:
        before += max(fact["before"], key=fact["before"].get) == fact["new_token"]
        after += max(fact["after"], key=fact["after"].get) == fact["new_token"]
    counts = f"{before} of {len(facts)} facts before the edit, of {after} after it"
    return f"The most probable next token begins the new answer of {counts}"


def by_relation(edit: Summary) -> str:
    """Between which relations edit success ranges."""
    means = {relation_name(name): value.mean for name, value in edit.items()}
    return f"Edit success by relation, {len(means)} in all: {_ends(means)}"


def shifts(frame: pd.DataFrame) -> str:
    """The median change of log P of the new and of the old answer."""
    said = []
    for kind in ("new", "old"):
        if f"log_p.{kind}" in frame:
            change = (frame[f"log_p.{kind}"] - frame[f"before.log_p.{kind}"]).median()
            said.append(f"{change:+.1f} of the {kind} answer")
    return f"Median change of log P in nats per token: {', '.join(said)}"


def strength(rows: Sequence[Row]) -> str:
    """Which strength scores best."""
    score = {f"{row['strength']:g}": row["score"] for row in rows}
    return f"Score by the strength of the edits: {_ends(score)}; as trained: {score['1']:.2f}"


def many(rows: Rows, *, at_once: bool) -> str:
    """Which editors keep least and most of the largest number of edits."""
    frame = pd.DataFrame(rows)
    last = frame[frame["edits"] == frame["edits"].max()].set_index("editor")
    metric, how = "retention.all", "in a row"
    if at_once:
        metric, how = "edit_success.free_exact", "at once"
    kept = last.loc[last["metric"] == metric, "mean"]
    return f"Of {last['edits'].max()} edits {how} is kept: {_ends(dict(kept))}"


# ---- inside an edit


def rank_one(frame: pd.DataFrame) -> str:
    """Whether gradients are sums of their tokens' rank-one terms, and of what rank."""
    worst, above = frame["error"].max(), (frame["rank"] > frame["tokens"]).sum()
    verb = "are"
    if not worst < 1e-3:  # a missing error proves nothing, either
        verb = "are not"
    claim = f"{len(frame)} gradients {verb} sums of their tokens' rank-one terms"
    return f"{claim} (error at most {worst:.0e}); {above} exceed that rank"


def signs(minus: Sequence[Row], plus: Sequence[Row]) -> str:
    """What the best descending step does to the edit loss, and the same step uphill."""
    losses = {row["size"]: row["loss.edit"] for row in (*minus, *plus)}
    best = min((row["size"] for row in minus if row["size"]), key=losses.__getitem__)
    sizes = f"to {losses[best]:.2f} by minus, to {losses[-best]:.2f} by plus"
    return f"The edit loss goes from {losses[0]:.2f} nats {sizes}, at a relative norm of {best:g}"


def normalisers(sweeps: Mapping[str, Sequence[Row]]) -> str:
    """At which size each kind of update writes half of the edits."""
    said = []
    for name, rows in sweeps.items():
        sizes = [row["size"] for row in rows if row["edit_success"] >= 0.5]
        least = "none tried"
        if sizes:
            least = f"{min(sizes):g}"
        said.append(f"{name} {least}")
    return f"Half of the edits are written at a relative norm of: {', '.join(said)}"


def grown(by_site: pd.DataFrame, edit_lrs: Mapping[str, float], *, start: float) -> str:
    """How updates grew from each site's first series to its last, and how the step sizes did."""
    norms = by_site.groupby("site", sort=False)["norm"]
    growth = (norms.last() / norms.first()).rename(short_site)
    steps = {short_site(site): abs(alpha) / start for site, alpha in edit_lrs.items()}
    return (
        f"Updates grew {_ends(dict(growth), '.2g')} times, step sizes {_ends(steps, '.2g')} times"
    )


def cosines(frame: pd.DataFrame, *, to: str = "true gradient") -> str:
    """How close each series is to a direction, from its median cosine at each site."""
    said = []
    for series, cosine in frame.groupby("series", sort=False)["cosine"]:
        said.append(f"{series} {cosine.median():.2f} ({cosine.min():.2f} to {cosine.max():.2f})")
    return f"Cosine with the {to}, median over sites (and range): {', '.join(said)}"


def spectra(frame: pd.DataFrame) -> str:
    """How much of each series' energy the first singular direction holds."""
    first = frame.groupby("series", sort=False)["share"].first()
    return f"The first singular direction holds of an update's energy {_ends(dict(first))}"


# ---- costs and several runs


def costs(results: Mapping[str, Any]) -> str:
    """How many times the textbook's speed the kit trains with, on each model."""
    said = []
    for name, found in results.items():
        if "train_ratio" in found:
            doubt = ""
            if not found["equal"]:
                doubt = ", but not the same numbers"
            said.append(f"{found['train_ratio']:.1f} ({name}{doubt})")
    return f"Edits trained per second, kit over textbook: {', '.join(said)}"


def memory(results: Mapping[str, Any]) -> str:
    """How many times the kit's memory above the base model the textbook takes."""
    ratios = {name: r["memory_ratio"] for name, r in results.items() if "memory_ratio" in r}
    return f"Memory above the base model, textbook over kit: {_ends(ratios)}"


def depth(rows: Sequence[Row]) -> str:
    """Whether a step costs more on a deeper model."""
    first, last = rows[0], rows[-1]
    time = last["seconds_per_edit"] / first["seconds_per_edit"]
    work = last["gflop_per_edit"] / first["gflop_per_edit"]
    ends = f"From {first['layers']} to {last['layers']} layers"
    return f"{ends} a step takes {time:.2f} times as long, with {work:.2f} times the operations"


def runs(scores: Mapping[str, float]) -> str:
    """Between which runs of a sweep the score ranges; `scores` by what was varied."""
    if not scores:
        return "No run was scored"
    return f"Score of {len(scores)} runs: {_ends(scores)}"


def settings(by_setting: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Which setting's values differ most in their mean score; scores by setting and value."""
    most, sentence = 0.0, "No setting was seen to move the score"
    for key, by_value in by_setting.items():
        means = {value: fmean(scores) for value, scores in by_value.items()}
        difference = max(means.values()) - min(means.values())
        if difference > most:
            most, sentence = difference, f"The score depends most on {key}: mean {_ends(means)}"
    return sentence
