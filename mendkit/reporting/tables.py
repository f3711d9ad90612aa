"""Tables for notebooks: results in, styled frames of pandas out.

Text is escaped, and the colours suit light and dark pages. A table's `to_html()` gives its text,
`data` its frame.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from ..data.examples import HEADLINE_ROLES, EditExample
from ..evaluation.results import APART, GROUPS, HEADLINE, EvaluationReport, Interval, normalise
from ..hparams import MENDHyperParams

CELL = "text-align: left; vertical-align: top; padding: .3em .8em; border-bottom: 1px solid #8884"
# See-through, so they suit light and dark pages: what changed as wanted, and what should not have.
WANTED, UNWANTED = "background-color: #0072b240", "background-color: #ffb30055"

PAIRED = {
    "edit": "new answers written",
    "paraphrases": "paraphrases followed",
    "neighbours": "neighbours kept",
    "unrelated": "unrelated prompts kept",
}

Row = Mapping[str, Any]
Asked = tuple[str, str, str | None]
"""A prompt to ask before and after an edit: role, prompt, answer wanted (None: as before)."""


def short_site(name: str) -> str:
    """A site's block and layer: `model.layers.27.mlp.up_proj.weight` → `27.mlp.up_proj`."""
    return re.sub(r"^(\D+\.)?(?=\d+\.)", "", name).removesuffix(".weight")


def escape(value: object) -> str:
    """Text as HTML that shows it: no tag, and no mathematics between two dollar signs."""
    return html.escape(str(value)).replace("$", "<span>$</span>").replace("\n", "⏎ ")


def table(data: pd.DataFrame | Sequence[Row], formats: Mapping[str, str] | None = None) -> Styler:
    """A styled frame of `data`: a frame, or rows as mappings. A named index is shown.

    A float has three significant digits, unless `formats` gives its column a format such as
    "{:.1e}". A truth value is ✓ or ✗, an interval "mean [low, high], n", a missing value blank.
    """
    frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame(list(data), dtype=object)
    style = frame.style.format(cell_text).format_index(escape, axis="columns")
    style = style.format_index(escape) if frame.index.name else style.hide(axis="index")
    for column, text in (formats or {}).items():
        style = style.format(text, subset=[column], na_rep="")
    return style.set_table_styles([{"selector": "th, td", "props": CELL}])


def listed(values: Row) -> Styler:
    """A table of names and values."""
    return table([{"what": name, "value": value} for name, value in values.items()])


def bullets(sentences: Sequence[str]) -> str:
    """Sentences as a Markdown list."""
    return "\n".join(f"- {sentence}." for sentence in sentences)


def cell_text(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, Interval):
        return str(value)
    if isinstance(value, bool):
        return "✓" if value else "✗"
    if value is None or value != value:  # NaN is unlike itself
        return ""
    return f"{value:.3g}" if isinstance(value, float) else escape(value)


# ---- data and settings


def settings(
    hparams: MENDHyperParams, folder: Path, *, examples: Mapping[str, Sequence[EditExample]]
) -> Styler:
    """What is going to run."""
    names = ["model_name", "inner_params", "archive", "seed"]
    if hparams.archive is None:
        names += ["max_iters", "max_epochs", "batch_size", "rank"]
    rows = {name: getattr(hparams, name) for name in names} | {"run folder": folder}
    return listed(rows | {f"{name} examples": len(split) for name, split in examples.items()})


def example(e: EditExample) -> Styler:
    """One example: its prompts by role, with the answers that they should have after the edit."""
    rows = [{"role": "before the edit", "prompt": e.prompt, "answer": e.ground_truth}]
    for role, probes in e.roles().items():
        for probe in probes:
            rows.append({"role": role, "prompt": probe.prompt, "answer": probe.answer})
    return table(rows)


def spread(examples: Sequence[EditExample], n: int) -> list[EditExample]:
    """The first n examples (0: all) of as many relations as there are, in their order."""
    relation = pd.Series([str(e.relation) for e in examples])
    order = relation.groupby(relation).cumcount().sort_values(kind="stable").index
    return [examples[i] for i in order[: n or None]]


def prompts_of(e: EditExample, *, most: int | None = 2) -> list[Asked]:
    """The prompts that show one edit, at most so many of each role (None: all)."""
    asked: list[Asked] = []
    for role in HEADLINE_ROLES:
        wanted = e.target_new if role in ("edit", "paraphrases") else None
        for probe in e.roles()[role][:most]:
            asked.append((role, probe.prompt, wanted))
    return asked


# ---- editing


def before_after(asked: Sequence[Asked], before: Sequence[str], after: Sequence[str]) -> Styler:
    """Completions before and after one edit; what changed is marked, in blue if that is as wanted.

    A new answer may differ in case, punctuation and articles, what should stay may not.
    """
    frame = pd.DataFrame(asked, columns=["role", "prompt", "wanted"], dtype=object)
    frame["before"] = [text.strip() for text in before]
    frame["after"] = [text.strip() for text in after]
    changed = frame["after"] != frame["before"]
    new = frame["wanted"].fillna("").map(normalise) == frame["after"].map(normalise)
    frame["good"] = new.where(frame["wanted"].notna(), ~changed).astype(object)  # a tick
    frame["wanted"] = frame["wanted"].fillna("as before")
    order = ["role", "prompt", "before", "after", "wanted", "good"]
    marks = frame["good"].map({True: WANTED, False: UNWANTED}).where(changed, "")
    return table(frame[order]).apply(lambda _: marks, subset=["after"])


def scores(reports: Mapping[str, EvaluationReport]) -> Styler:
    """Every score of editors on the same edits; those of the unedited model begin with before."""
    by_name = {name: {**report.summary, **report.harmonic} for name, report in reports.items()}
    return table(pd.DataFrame(by_name, dtype=object).rename_axis("score"))


def apart(report: EvaluationReport) -> Styler:
    """The headline scores of all edits, and of those of known and of unknown facts."""
    found = {**report.summary, **report.harmonic}
    rows = []
    for name in (*APART, "score.headline"):
        if name in found:
            groups = {group: found.get(f"{group}.{name}") for group in GROUPS}
            rows.append({"score": name, "all": found[name], **groups})
    return table(rows)


def won(results: Mapping[str, Any], model: str) -> str:
    """What an editor won against the identity control, of the flat results of both.

    Their headline scores, and the share whose edits differ most: better or worse in how many.
    """
    trained, control = (results.get(f"{who}single.score.headline") for who in ("", "identity."))
    if trained is None:
        return f"Editing {model} with MEND"
    n = results[f"single.{HEADLINE['edit']}.n"]
    text = f"MEND scores {trained:.2f} on {n} edits of {model}"
    pairs = paired(results)
    if control is None or not pairs:
        return text
    label, (better, worse) = max(pairs.items(), key=lambda pair: abs(pair[1][0] - pair[1][1]))
    pairs_won = f"{label}: better in {better:.0f} edits, worse in {worse:.0f}"
    return f"{text}, the untrained control {control:.2f}; {pairs_won}"


def paired(results: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """For how many edits each headline share was better and worse than the control's."""
    found = {}
    for role, label in PAIRED.items():
        start = f"paired.{HEADLINE[role]}"
        if f"{start}.better" in results:
            found[label] = (results[f"{start}.better"], results[f"{start}.worse"])
    return found


def many(reports: Mapping[str, Sequence[EvaluationReport]]) -> pd.DataFrame:
    """A row for every editor, number of edits (`edits`) and `metric`.

    A row holds `mean`, and `low`, `high` and `n` where it is one over edits; `value` is an interval
    or the mean alone.
    """
    rows = []
    for editor, finals in reports.items():
        measured: list[EvaluationReport] = []
        for final in finals:
            measured += [*final.earlier, final]
        for report in measured:
            # The mode ends with the number of edits, as in `batch_25`.
            where = {"editor": editor, "edits": int(report.mode.rpartition("_")[2])}
            for metric, value in report.summary.items():
                rows.append({**where, "metric": metric, **vars(value), "value": value})
            for metric, mean in report.values.items():
                rows.append({**where, "metric": metric, "mean": mean, "value": mean})
    return pd.DataFrame(rows)
