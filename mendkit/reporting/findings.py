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


def shares(summary: Summary) -> dict[str, float]:
    """The headline shares that a summary has."""
    return {name: summary[name].mean for name in HEADLINE.values() if name in summary}


def short_site(name: str) -> str:
    """A site's block and layer: `model.layers.27.mlp.up_proj.weight` → `27.mlp.up_proj`."""
    name = name.removesuffix(".weight")
    found = re.search(r"(?:^|\.)(\d+\..*)", name)
    return found[1] if found else name


def relation_name(relation: str) -> str:
    """A relation's name for people."""
    return "(no relation given)" if relation == "None" else relation.replace("_", " ")


def _ends(values: Mapping[str, float], form: str = ".2f") -> str:
    """The least and the greatest value, with their names."""
    ends = (min(values, key=values.__getitem__), max(values, key=values.__getitem__))
    return " to ".join(f"{values[name]:{form}} ({name})" for name in ends)


def _moved(values: Sequence[float]) -> str:
    verb = "fell" if values[-1] < values[0] else "rose"
    return f"{verb} from {values[0]:.2f} to {values[-1]:.2f}"


# ---- training


def losses(history: Sequence[Row]) -> str:
    """How the edit loss moved, in training (its running mean) and in validation."""
    train = [row for row in history if "loss" in row]
    mean = smooth([row["edit"] for row in train])
    text = f"The edit loss {_moved(mean)} nats in {train[-1]['step']:g} steps"
    validated = [row["val.loss.edit"] for row in history if "val.loss.edit" in row]
    if validated:
        text += f"; on validation edits it {_moved(validated)}"
    return text


def smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over a twelfth of the values, narrower at the ends."""
    width = 2 * (len(values) // 24) + 1
    return pd.Series(values).rolling(width, center=True, min_periods=1).mean().tolist()


def validation(history: Sequence[Row], best: Row) -> str:
    """Whether training raised the validation score, up to the row of the kept archive."""
    before = next(row["val.score"] for row in history if "val.score" in row)
    verb = "raised" if best["val.score"] > before else "did not raise"
    score = f"from {before:.2f} before the first step to {best['val.score']:.2f}"
    return f"Training {verb} the validation score: {score} at the kept step {best['step']:g}"


def step_sizes(edit_lrs: Mapping[str, float], *, start: float) -> str:
    """Between which values the learned step sizes lie."""
    sizes = {short_site(site): abs(alpha) for site, alpha in edit_lrs.items()}
    return f"From a start of {start:.1e}, the step sizes went to {_ends(sizes, '.1e')}"


def control(rows: Sequence[Row], best: Row) -> str:
    """Whether some step size brings the untrained editor to the trained one's validation score."""
    top = max(rows, key=lambda row: row["score"])
    text = "The trained editor does not beat the identity control"
    if best["val.score"] > top["score"]:
        text = "No step size brings the untrained editor to the trained one"
    alpha = f"{top['edit_lr']:.1e}"
    if len(rows) > 1 and top in (rows[0], rows[-1]):
        alpha += " (the end of the range tried)"
    trained = f"trained {best['val.score']:.2f}"
    return f"{text}: score {top['score']:.2f} at its best α = {alpha}, {trained}"


# ---- editing


def verdict(trained: Summary, control: Summary) -> str:
    """Whether the trained editor beats the identity control on the headline score."""
    a, b = headline_score(trained), headline_score(control)
    verb = "beats" if a > b else "does not beat"
    return f"The trained editor {verb} the identity control: score {a:.2f} against {b:.2f}"


def weakest(summary: Summary) -> str:
    """The lowest of the headline shares."""
    name = min(shares(summary), key=shares(summary).__getitem__)
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
    said = []
    for name, words in names.items():
        if f"neighbourhood.{name}" in summary:
            said.append(f"{summary[f'neighbourhood.{name}'].mean:.2f} {words}")
    return f"The share of neighbours that keep: {', '.join(said)}"


def decoding(summary: Summary) -> str:
    """Edit success from teacher forcing to free decoding in another format."""
    ways = {
        "tf_exact": "under teacher forcing",
        "free_gold_length": "in free decoding cut at the answer's length",
        "free_exact": "uncut",
        "free_exact_question": "asked as a question",
    }
    said = []
    for name, words in ways.items():
        if f"edit_success.{name}" in summary:
            said.append(f"{summary[f'edit_success.{name}'].mean:.2f} {words}")
    return f"Edit success is {', '.join(said)}"


def ranking(summaries: Mapping[str, Summary]) -> str:
    """The place of the first editor by the headline score, and which one is best."""
    scores = pd.Series({name: headline_score(summary) for name, summary in summaries.items()})
    first, best = scores.index[0], scores.idxmax()
    place = 1 + sum(scores > scores[first])
    lead = f"{first} is number {place} of {len(scores)} by the headline score, {scores[first]:.2f}"
    return lead if place == 1 else f"{lead}; the best is {best}, {scores[best]:.2f}"


def next_tokens(facts: Sequence[Row]) -> str:
    """For how many facts the most probable next token begins the new answer."""
    begun = {"before": 0, "after": 0}
    for fact in facts:
        for state in begun:
            begun[state] += max(fact[state], key=fact[state].get) == fact["new_token"]
    counts = f"{begun['before']} of {len(facts)} facts before the edit and for {begun['after']}"
    return f"The most probable next token begins the new answer for {counts} after it"


def by_relation(edit: Summary) -> str:
    """Between which relations edit success ranges."""
    means = {relation_name(name): value.mean for name, value in edit.items()}
    return f"Edit success by relation ({len(means)} of them): {_ends(means)}"


def shifts(rows: Rows) -> str:
    """The median change of log P of the new and of the old answer."""
    frame = pd.DataFrame(rows)
    parts = []
    for kind in ("new", "old"):
        if f"log_p.{kind}" in frame:
            change = (frame[f"log_p.{kind}"] - frame[f"before.log_p.{kind}"]).median()
            parts.append(f"{change:+.1f} of the {kind} answer")
    return f"Median change of log P in nats per token: {', '.join(parts)}"


def strength(rows: Sequence[Row]) -> str:
    """Which strength scores best."""
    best = max(rows, key=lambda row: row["score"])
    trained = "".join(f", as trained {r['score']:.2f}" for r in rows if r["strength"] == 1)
    return f"Of the strengths tried {best['strength']:g} scores best: {best['score']:.2f}{trained}"


def many(rows: Rows, *, at_once: bool) -> str:
    """Which editor keeps most of the largest number of edits, against the first one."""
    frame = pd.DataFrame(rows)
    metric = "edit_success.free_exact" if at_once else "retention.all"
    last = frame[(frame["edits"] == frame["edits"].max()) & (frame["metric"] == metric)]
    kept = last.set_index("editor")["mean"]
    how = "at once" if at_once else "in a row"
    lead = f"Of {last['edits'].max()} edits {how} {kept.index[0]} keeps {kept.iloc[0]:.2f}"
    return f"{lead}; the most is {kept.max():.2f} ({kept.idxmax()})"


# ---- inside an edit


def rank_one(rows: Rows) -> str:
    """Whether gradients are sums of their tokens' rank-one terms, and of what rank."""
    frame = pd.DataFrame(rows)
    held = "are" if frame["error"].max() < 1e-3 else "are not"
    above = (frame["rank"] > frame["tokens"]).sum()
    claim = f"{len(frame)} gradients {held} sums of their tokens' rank-one terms"
    error = f"largest relative error {frame['error'].max():.0e}"
    return f"{claim} ({error}); {above} of them have a rank above the number of tokens"


def signs(minus: Sequence[Row], plus: Sequence[Row]) -> str:
    """What the best descending step does to the edit loss, and the same step uphill."""
    before = next(row["loss.edit"] for row in minus if row["size"] == 0)
    best = min((row for row in minus if row["size"]), key=lambda row: row["loss.edit"])
    up = next(row["loss.edit"] for row in plus if abs(row["size"]) == best["size"])
    said = []
    for sign, loss in (("minus", best["loss.edit"]), ("plus", up)):
        said.append(f"{sign} {'lowers' if loss < before else 'raises'} it to {loss:.2f}")
    unedited = f"From an edit loss of {before:.2f} nats per token"
    return f"{unedited}, {', '.join(said)}, at a relative norm of {best['size']:g}"


def normalisers(sweeps: Mapping[str, Sequence[Row]]) -> str:
    """At which size each kind of update writes half of the edits."""
    parts = []
    for name, rows in sweeps.items():
        sizes = [row["size"] for row in rows if row["edit_success"] >= 0.5]
        parts.append(f"{name} at {min(sizes):g}" if sizes else f"{name} at none tried")
    return f"Half of the edits are written at a relative norm of: {'; '.join(parts)}"


def grown(by_site: pd.DataFrame, edit_lrs: Mapping[str, float], *, start: float) -> str:
    """How updates grew from each site's first series to its last, and how the step sizes did."""
    norms = by_site.groupby("site", sort=False)["norm"]
    growth = (norms.last() / norms.first()).rename(short_site)
    steps = pd.Series(edit_lrs).abs() / start
    spread = f"step sizes {steps.min():.2g} to {steps.max():.2g} times"
    return f"Updates are {_ends(dict(growth), '.2g')} times as large as at the start, {spread}"


def cosines(rows: Rows, *, to: str = "true gradient") -> str:
    """How close each series is to a direction, from its median cosine at each site."""
    parts = []
    for series, cosine in pd.DataFrame(rows).groupby("series", sort=False)["cosine"]:
        spread = f"{cosine.min():.2f} to {cosine.max():.2f}"
        parts.append(f"{series} {cosine.median():.2f} ({spread})")
    return f"Cosine with the {to}, median over sites (and range): {', '.join(parts)}"


def spectra(rows: Rows) -> str:
    """How much of each series' energy the first singular direction holds."""
    said = []
    for series, share in pd.DataFrame(rows).groupby("series", sort=False)["share"]:
        said.append(f"{share.iloc[0]:.2f} ({series})")
    return f"The first singular direction holds a share of an update's energy of {', '.join(said)}"


# ---- costs and several runs


def costs(results: Mapping[str, Any]) -> str:
    """How many times the textbook's speed the kit trains with, on each model."""
    said = []
    for name, found in results.items():
        if "train_ratio" in found:
            doubt = "" if found["equal"] else ", but not the same numbers"
            said.append(f"{found['train_ratio']:.1f} ({name}{doubt})")
    return f"Edits trained per second, kit over textbook: {', '.join(said)}"


def memory(results: Mapping[str, Any]) -> str:
    """Memory above the base model, the textbook's and the kit's."""
    said = []
    for name, found in results.items():
        if "memory" in found:
            textbook, kit = (found["memory"][way]["above_gb"] for way in ("textbook", "kit"))
            said.append(f"{textbook:.2f} and {kit:.2f} GB ({name})")
    return f"Peak above the base model, textbook and kit: {', '.join(said)}"


def depth(rows: Sequence[Row]) -> str:
    """Whether a step costs more on a deeper model."""
    low, high = rows[0], rows[-1]
    time, work = (high[key] / low[key] for key in ("seconds_per_edit", "gflop_per_edit"))
    ends = f"From {low['layers']} to {high['layers']} layers"
    return f"{ends} a step takes {time:.2f} times as long, with {work:.2f} times the operations"


def runs(scores: Mapping[str, float]) -> str:
    """Between which runs of a sweep the score ranges; `scores` by what was varied."""
    return f"Score of {len(scores)} runs: {_ends(scores)}" if scores else "No run was scored"


def settings(by_setting: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Which setting's values differ most in their mean score; scores by setting and value."""
    most, sentence = 0.0, "No setting was seen to move the score"
    for key, by_value in by_setting.items():
        means = {value: fmean(scores) for value, scores in by_value.items()}
        difference = max(means.values()) - min(means.values())
        if difference > most:
            most, sentence = difference, f"The score depends most on {key}: mean {_ends(means)}"
    return sentence
