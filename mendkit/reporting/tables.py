"""Tables for notebooks: results in, styled frames of pandas out.

Text is escaped, numbers stand on the right, and the colours suit light and dark pages. A table's
`to_html()` gives its text, `data` its frame.
"""

import html
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from ..data.examples import HEADLINE_ROLES, EditExample
from ..evaluation.results import EvaluationReport, Interval, normalise
from ..hparams import MENDHyperParams
from .findings import Row, relation_name, short_site

MOST_RELATIONS = 25  # listed one by one
CELL = "text-align: left; vertical-align: top; padding: .3em .8em; border-bottom: 1px solid #8884"
NUMBER = "text-align: right; white-space: nowrap"
CHANGED = "background-color: #ffb30055"  # see-through: it suits light and dark pages

Asked = tuple[str, str, str | None]
"""A prompt to ask before and after an edit: role, prompt, answer wanted (None: as before)."""


def escape(value: object) -> str:
    """Text as HTML that shows it: no tag, and no mathematics between two dollar signs."""
    return html.escape(str(value)).replace("$", "<span>$</span>").replace("\n", "⏎ ")


def table(data: pd.DataFrame | Sequence[Row], formats: Mapping[str, str] | None = None) -> Styler:
    """A styled frame of `data`: a frame, or rows as mappings.

    A named index is shown. A float has three significant digits, unless `formats` gives its column
    a format such as "{:.1e}". A truth value is ✓ or ✗, an interval "mean [low, high]", a missing
    value blank.
    """
    frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame(list(data), dtype=object)
    style = frame.style.format(cell_text).format_index(escape, axis="columns")
    style = style.format_index(escape) if frame.index.name else style.hide(axis="index")
    for column, text in (formats or {}).items():
        style = style.format(text, subset=[column], na_rep="")
    numbers = [name for name in frame if frame[name].map(_is_number).all()]
    rules: Any = {name: [{"selector": "", "props": NUMBER}] for name in numbers}
    style = style.set_table_styles([{"selector": "th, td", "props": CELL}])
    return style.set_table_styles(rules, overwrite=False)


def listed(values: Mapping[str, Any]) -> Styler:
    """A table of names and values."""
    columns = {"what": list(values), "value": list(values.values())}
    return table(pd.DataFrame(columns, dtype=object))


def bullets(sentences: Sequence[str]) -> str:
    """Sentences as a Markdown list."""
    return "\n".join(f"- {sentence}." for sentence in sentences)


def cell_text(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, Interval):
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
    if isinstance(value, bool):
        return {True: "✓", False: "✗"}[value]
    if value is None or value != value:  # NaN is unlike itself
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return escape(value)


def _is_number(value: object) -> bool:
    """Whether a value may stand in a column of numbers, as a missing one may."""
    number = isinstance(value, Real | Interval) and not isinstance(value, bool)
    return number or value is None


# ---- data and settings


def plan(
    hparams: MENDHyperParams, folder: Path, *, examples: Mapping[str, Sequence[EditExample]]
) -> Styler:
    """What is going to run."""
    rows: dict[str, Any] = {"base model": hparams.model_name, "edit sites": hparams.inner_params}
    rows |= {"archive": hparams.archive, "seed": hparams.seed, "run folder": folder}
    if hparams.archive is None:
        rows["archive"] = "none: a hypernetwork is initialised and trained"
        length = f"{hparams.max_iters} steps"
        if hparams.max_epochs:
            length = f"{hparams.max_epochs} epochs"
        rows["training"] = f"{length} of {hparams.batch_size} edits, rank {hparams.rank}"
    for name, split in examples.items():
        rows[f"{name} examples"] = len(split)
    return listed(rows)


def relations(examples: Mapping[str, Sequence[EditExample]]) -> Styler:
    """How many examples each split has of each relation, the most frequent first."""
    counts = {}
    for name, split in examples.items():
        counts[name] = pd.Series([str(e.relation) for e in split]).value_counts()
    frame = pd.DataFrame(counts)
    frame = frame.fillna(0).astype(int).rename(relation_name)
    frame = frame.loc[frame.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    total, rest = frame.sum(), frame[MOST_RELATIONS:]
    if len(rest):
        frame = frame[:MOST_RELATIONS]
        frame.loc[f"{len(rest)} more"] = rest.sum()
    frame.loc["all"] = total
    return table(frame.rename_axis("relation").reset_index())


def overlap(train: Sequence[EditExample], held_out: Sequence[EditExample]) -> str:
    """How many held-out subjects and prompts occur in training, too."""
    subjects = {e.subject for e in held_out if e.subject}
    shared = len(subjects & {e.subject for e in train})
    prompts = len({e.prompt for e in held_out} & {e.prompt for e in train})
    return (
        f"{shared} of the {len(subjects)} held-out subjects that are named and {prompts} of the "
        f"{len(held_out)} held-out prompts occur in the training examples, too."
    )


def example(e: EditExample) -> Styler:
    """One example: its prompts by role, with the answers that they should have after the edit."""
    rows = [{"role": "before the edit", "prompt": e.prompt, "answer": e.ground_truth}]
    for role, probes in e.roles().items():
        for probe in probes:
            rows.append({"role": role, "prompt": probe.prompt, "answer": probe.answer})
    return table(rows)


def spread(examples: Sequence[EditExample], n: int) -> list[EditExample]:
    """The first n examples of as many relations as there are, in their order."""
    relation = pd.Series([str(e.relation) for e in examples])
    order = relation.groupby(relation).cumcount().sort_values(kind="stable").index
    return [examples[i] for i in order[:n]]


def prompts_of(e: EditExample, *, most: int | None = 2) -> list[Asked]:
    """The prompts that show one edit, at most so many of each role (None: all)."""
    asked: list[Asked] = []
    for role in HEADLINE_ROLES:
        wanted = None
        if role in ("edit", "paraphrases"):
            wanted = e.target_new
        for probe in e.roles()[role][:most]:
            asked.append((role, probe.prompt, wanted))
    return asked


# ---- editing


def archive(metadata: Mapping[str, Any]) -> Styler:
    """What an archive says of itself (from `inspect_archive`)."""
    base, best = metadata["base_model"], metadata["training"].get("best", {})
    rows = {"trained for": f"{base['name']} ({base['class']})"}
    rows["kept at step"] = best.get("step", "unknown")
    for name, alpha in metadata["edit_lr"].items():
        rows[f"edit site {short_site(name)}"] = f"α = {alpha:.2e}"
    for name, value in best.items():
        if "val." in name:
            rows[name] = value
    return listed(rows)


def before_after(asked: Sequence[Asked], before: Sequence[str], after: Sequence[str]) -> Styler:
    """Completions before and after one edit; what changed is marked, what is as wanted ticked."""
    rows = []
    for (role, prompt, wanted), old, new in zip(asked, before, after, strict=True):
        row: dict[str, Any] = {"role": role, "prompt": prompt}
        row |= {"before": old.strip(), "after": new.strip(), "wanted": "as before"}
        expected = old
        if wanted is not None:
            row["wanted"] = expected = wanted
        row["good"] = normalise(new) == normalise(expected)
        rows.append(row)
    frame = pd.DataFrame(rows, dtype=object)
    style, changed = table(frame), frame["after"] != frame["before"]
    return style.apply(lambda _: changed.map({True: CHANGED, False: ""}), subset=["after"])


def editors(reports: Mapping[str, EvaluationReport]) -> Styler:
    """Every score of editors on the same edits, with its interval, and what it is unedited."""
    first = next(iter(reports.values()))
    names = [name for name in first.summary if not name.startswith("before.")]
    columns: dict[str, Mapping[str, Any]] = {
        "unedited": {name: first.summary.get(f"before.{name}") for name in names}
    }
    for editor, report in reports.items():
        columns[editor] = {**report.summary, **report.harmonic}
    columns["n edits"] = {name: first.summary[name].n for name in names}
    frame = pd.DataFrame(columns, index=[*names, *first.harmonic], dtype=object)
    return table(frame.rename_axis("score").reset_index())


def counts(report: EvaluationReport) -> str:
    """How many edits were scored, how many not and why, and how long one takes."""
    c, seconds = report.counts, report.summary["edit.seconds"].mean
    return (
        f"{c['scored']} edits were scored. {c['already_true']} were left out because the unedited "
        f"model already writes the new answer, {c['skipped']} because one of their texts cannot be "
        f"used. Computing one edit took {seconds * 1000:.0f} ms."
    )


def many(reports: Mapping[str, Sequence[EvaluationReport]]) -> pd.DataFrame:
    """A row for every editor, number of edits (`edits`) and `metric`.

    A row holds `mean`, and `low`, `high` and `n` where it is one over edits; `value` is an interval
    or the mean alone.
    """
    rows = []
    for editor, last in reports.items():
        measured: list[EvaluationReport] = []
        for final in last:
            measured += [*final.earlier, final]
        for report in measured:
            # The mode ends with the number of edits, as in `batch_25`.
            where = {"editor": editor, "edits": int(report.mode.rpartition("_")[2])}
            for metric, value in report.summary.items():
                rows.append({**where, "metric": metric, **vars(value), "value": value})
            for metric, mean in report.values.items():
                rows.append({**where, "metric": metric, "mean": mean, "value": mean})
    return pd.DataFrame(rows)
