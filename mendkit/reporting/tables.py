"""Tables and sentences for notebooks: results in, styled frames or Markdown out.

A table is a pandas `Styler`. Text is escaped, numbers stand on the right, and the colours suit light
and dark pages. `Styler.to_html()` gives its text, `Styler.data` its frame.
"""

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from ..data.examples import EditExample
from ..evaluation.results import HARMONIC, EvaluationReport, Interval, normalise
from ..hparams import MENDHyperParams
from . import findings
from .findings import Row

MOST_RELATIONS = 25  # listed one by one
CELL = "text-align: left; vertical-align: top; padding: .3em .8em; border-bottom: 1px solid #8884"
NUMBER = "text-align: right; white-space: nowrap"
CHANGED = "background-color: #ffb30055"  # see-through, so that it suits light and dark pages

Asked = tuple[str, str, str | None]
"""A prompt to ask before and after an edit: role, prompt, answer wanted (None: as before)."""


def escape(value: object) -> str:
    """Text as HTML that shows it: no tag, and no mathematics between two dollar signs."""
    return html.escape(str(value)).replace("$", "<span>$</span>").replace("\n", "⏎ ")


def table(data: pd.DataFrame | Sequence[Row], formats: Mapping[str, str] | None = None) -> Styler:
    """A styled frame of `data`: a frame, or rows as mappings.

    `formats` maps a column to a format such as "{:.1e}". By default a float has three significant
    digits, a truth value is ✓ or ✗, an interval "mean [low, high]", and a missing value blank.
    """
    frame = data if isinstance(data, pd.DataFrame) else pd.DataFrame(list(data), dtype=object)
    style = frame.style.format(_cell_text).format_index(escape, axis="columns")
    for column, text in (formats or {}).items():
        style = style.format(text, subset=[column], na_rep="")
    if frame.index.name is None:
        style = style.hide(axis="index")
    rules: Any = [{"selector": "th, td", "props": CELL}]
    numbers: Any = {
        column: [{"selector": "", "props": NUMBER}]
        for column in frame.columns
        if _is_numeric(frame[column])
    }
    return style.set_table_styles(rules).set_table_styles(numbers, overwrite=False)


def listed(values: Mapping[str, Any]) -> Styler:
    """A table of names and values."""
    return table([{"what": name, "value": value} for name, value in values.items()])


def bullets(sentences: Sequence[str]) -> str:
    """Sentences as a Markdown list."""
    return "\n".join(f"- {sentence}." for sentence in sentences)


# ---- data and settings


def plan(
    hparams: MENDHyperParams, folder: Path, *, examples: Mapping[str, Sequence[EditExample]]
) -> Styler:
    """What is going to run."""
    sites = hparams.inner_params
    if not isinstance(sites, str):
        sites = ", ".join(sites)
    rows: dict[str, Any] = {"base model": hparams.model_name, "edit sites": sites}
    if hparams.archive is None:
        steps = f"{hparams.max_iters} steps"
        if hparams.max_epochs:
            steps = f"{hparams.max_epochs} epochs"
        rows["archive"] = "none: a hypernetwork is initialised and trained"
        rows["training"] = f"{steps} of {hparams.batch_size} edits, rank {hparams.rank}"
    else:
        rows["archive"] = hparams.archive
    rows |= {"seed": hparams.seed, "run folder": folder}
    return listed(rows | {f"{name} examples": len(split) for name, split in examples.items()})


def relations(examples: Mapping[str, Sequence[EditExample]]) -> Styler:
    """How many examples each split has of each relation, the most frequent first."""
    counts = {name: Counter(str(e.relation) for e in split) for name, split in examples.items()}
    frame = pd.DataFrame(counts).fillna(0).astype(int)
    frame = frame.loc[frame.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    frame.index = frame.index.map(findings.relation)
    listed_one_by_one, rest = frame.iloc[:MOST_RELATIONS], frame.iloc[MOST_RELATIONS:]
    if len(rest):
        sums = rest.sum().to_frame(f"{len(rest)} more").T
        listed_one_by_one = pd.concat([listed_one_by_one, sums])
    total = frame.sum().to_frame("all").T
    return table(pd.concat([listed_one_by_one, total]).rename_axis("relation").reset_index())


def overlap(train: Sequence[EditExample], held_out: Sequence[EditExample]) -> str:
    """Whether held-out subjects and prompts occur in training."""
    subjects = {e.subject for e in held_out if e.subject}
    shared = len(subjects & {e.subject for e in train})
    prompts = len({e.prompt for e in held_out} & {e.prompt for e in train})
    known = "The subjects are not named;"
    if subjects:
        known = f"{shared} of the {len(subjects)} held-out subjects"
    return (
        f"{known} and {prompts} of the {len(held_out)} held-out prompts "
        "occur in the training examples, too."
    )


def example(e: EditExample) -> Styler:
    """One example: what should change and what should not."""
    replaced = f"replaces {e.ground_truth}" if e.ground_truth else ""
    rows = [("edit", e.prompt, e.target_new, replaced)]
    for prompt in e.paraphrases:
        rows.append(("paraphrase", prompt, e.target_new, "should follow"))
    for role, probes in (("neighbour", e.neighbours), ("unrelated", e.unrelated)):
        for probe in probes:
            answer = probe.answer or "(whatever the model says)"
            rows.append((role, probe.prompt, answer, "should stay"))
    return table(pd.DataFrame(rows, columns=["role", "prompt", "answer", "aim"]))


def spread(examples: Sequence[EditExample], n: int) -> list[EditExample]:
    """The first n examples of as many relations as there are, in their order."""
    seen: Counter[str | None] = Counter()
    rank = []
    for i, e in enumerate(examples):
        rank.append((seen[e.relation], i))
        seen[e.relation] += 1
    return [examples[i] for _, i in sorted(rank)[:n]]


def prompts_of(
    e: EditExample, *, most: tuple[int | None, int | None, int | None] = (2, 2, 1)
) -> list[Asked]:
    """The prompts that show one edit: its own, then paraphrases, neighbours and unrelated prompts.

    `most` limits the last three (None: all).
    """
    asked: list[Asked] = [("edit", e.prompt, e.target_new)]
    asked += [("paraphrase", prompt, e.target_new) for prompt in e.paraphrases[: most[0]]]
    asked += [("neighbour", probe.prompt, None) for probe in e.neighbours[: most[1]]]
    asked += [("unrelated", probe.prompt, None) for probe in e.unrelated[: most[2]]]
    return asked


# ---- training


def training_summary(result: Any) -> str:
    """How training went: steps, time, why it ended, which step was kept."""
    steps = max(row["step"] for row in result.history)
    caches = sum(result.cache.get(f"{part}_seconds", 0.0) for part in ("trunk", "factor"))
    return (
        f"Training ended after {steps:g} steps ({result.stopped}). "
        f"It took {result.seconds:.0f} s, {caches:.0f} s of them for the caches. "
        f"The archive of step {result.best['step']:g} was kept."
    )


def validation_scores(best: Row, control: Row) -> Styler:
    """Validation values of the kept archive beside the identity control's at its best step size."""
    rows = [
        {
            "validation": name,
            f"identity, α = {control['edit_lr']:.1e}": control[name],
            "trained": best[f"val.{name}"],
        }
        for name in control
        if f"val.{name}" in best
    ]
    return table(rows)


def training_results(result: Any, control: Row) -> dict[str, Any]:
    """Flat results of notebook 01: `train.…`, and `identity.…` for the control."""
    values: dict[str, Any] = {
        "seconds": result.seconds,
        "steps": max(row["step"] for row in result.history),
        "best_step": result.best["step"],
        "stopped": result.stopped,
        "normaliser_examples": result.normaliser_examples,
        **result.cache,
    }
    for name, value in result.best.items():
        if name.startswith("val."):
            values[name.replace("val.", "validation.", 1)] = value
    results = {f"train.{name}": value for name, value in values.items()}
    for name, value in control.items():
        results[f"identity.{'' if name == 'edit_lr' else 'validation.'}{name}"] = value
    return results


def training_conclusion(result: Any, control: Row) -> str:
    """The findings of notebook 01, and the weakest share."""
    shares = {
        name: result.best[f"val.{name}"] for name in findings.SHARES if f"val.{name}" in result.best
    }
    weakest = min(shares, key=shares.__getitem__)
    return bullets(
        [
            findings.validation(result.history, result.best),
            findings.control([control], result.best),
            f"The weakest of its shares is {weakest.replace('_', ' ')}, {shares[weakest]:.2f}",
        ]
    )


# ---- editing


def archive(metadata: Mapping[str, Any]) -> Styler:
    """What an archive says of itself (from `inspect_archive`)."""
    base, best = metadata["base_model"], metadata["training"].get("best", {})
    rows: dict[str, Any] = {
        "trained for": f"{base['name']} ({base['class']})",
        "kept at step": best.get("step", "unknown"),
    }
    for name, alpha in metadata["edit_lr"].items():
        rows[f"edit site {findings.short_site(name)}"] = f"α = {alpha:.2e}"
    for name in (*findings.SHARES, "score"):
        if f"val.{name}" in best:
            rows[f"validation {name}"] = best[f"val.{name}"]
    return listed(rows)


def before_after(asked: Sequence[Asked], before: Sequence[str], after: Sequence[str]) -> Styler:
    """Completions before and after one edit; what changed is marked, what is as wanted ticked."""
    rows = []
    for (role, prompt, wanted), old, new in zip(asked, before, after, strict=True):
        expected = old if wanted is None else wanted
        rows.append(
            {
                "role": role,
                "prompt": prompt,
                "before": written(old),
                "after": written(new),
                "wanted": wanted or "as before",
                "": normalise(new) == normalise(expected),
            }
        )
    frame = pd.DataFrame(rows)
    changed = frame["after"] != frame["before"]
    return table(frame).apply(lambda _: changed.map({True: CHANGED, False: ""}), subset=["after"])


def editors(reports: Mapping[str, EvaluationReport]) -> Styler:
    """Every score of editors on the same edits, with intervals; the first names the scores and n."""
    first = next(iter(reports.values())).summary
    rows = []
    for name in first:
        if not name.startswith("before."):
            row = {"score": name, "unedited": first.get(f"before.{name}")}
            row |= {editor: report.summary.get(name) for editor, report in reports.items()}
            rows.append({**row, "n edits": first[name].n})
    for name in HARMONIC:
        means = {editor: report.harmonic.get(name) for editor, report in reports.items()}
        rows.append({"score": name, **means})
    return table(rows)


def counts(report: EvaluationReport) -> str:
    """How many edits were scored, how many not and why, and how long one takes."""
    c, seconds = report.counts, report.summary["edit.seconds"].mean
    return (
        f"{c['scored']} edits were scored. {c['already_true']} were left out because the unedited "
        f"model already writes the new answer, {c['skipped']} because one of their texts cannot be "
        f"used. Computing one edit took {seconds * 1000:.0f} ms."
    )


def editing_conclusion(
    trained: EvaluationReport, control: EvaluationReport, curve: Sequence[Row]
) -> str:
    """The findings of notebook 02: verdict, weakest share, failures, strength."""
    summary = trained.summary
    weakest = min(findings.shares(summary), key=findings.shares(summary).__getitem__)
    failed = sum(row.values["edit_success.free_exact"] < 1 for row in trained.rows)
    sentences = [
        findings.verdict(summary, control.summary),
        f"The weakest of the four shares is `{weakest}`, {_cell_text(summary[weakest])}",
        f"{failed} of {len(trained.rows)} edits are not written exactly by free decoding",
        findings.strength(curve),
    ]
    if "neighbourhood.reworded_agreement" in summary:
        same = _cell_text(summary["neighbourhood.argmax_agreement"])
        reworded = _cell_text(summary["neighbourhood.reworded_agreement"])
        sentences.append(
            f"Other subjects keep their argmax {same} in the edit prompt's wording "
            f"and {reworded} in a paraphrase's"
        )
    return bullets(sentences)


def baselines_conclusion(reports: Mapping[str, EvaluationReport]) -> str:
    """The findings of notebook 04; the first report is the trained editor's."""
    summaries = {name: report.summary for name, report in reports.items()}
    scores = {name: findings.headline_score(summary) for name, summary in summaries.items()}
    name, *others = scores
    better = [f"{other} ({scores[other]:.2f})" for other in others if scores[other] >= scores[name]]
    beaten = f"all {len(others)} others"
    if better:
        beaten = f"all but {', '.join(better)}"
    first = summaries[name]
    sentences = [
        findings.decoding(first),
        findings.ranking(summaries),
        f"{name}, {scores[name]:.2f}, beats {beaten}",
    ]
    if "neighbourhood.ns" in first:
        kept = _cell_text(first["neighbourhood.argmax_agreement"])
        preferred = _cell_text(first["neighbourhood.ns"])
        sentences.append(
            f"Neighbours keep their argmax {kept}. "
            f"They prefer their old answer to the new one {preferred}"
        )
    return bullets(sentences)


def many(reports: Mapping[str, Sequence[EvaluationReport]]) -> list[Row]:
    """A row for every editor, number of edits (`edits`) and `metric`.

    A row holds `mean`, and `low`, `high` and `n` where it is a mean over edits.
    """
    rows: list[Row] = []
    for editor, final_reports in reports.items():
        for final in final_reports:
            for report in (*final.earlier, final):
                edits = int(report.mode.rpartition("_")[2])
                where = {"editor": editor, "edits": edits}
                for metric, interval in report.summary.items():
                    rows.append({**where, "metric": metric, **vars(interval)})
                for metric, value in report.values.items():
                    rows.append({**where, "metric": metric, "mean": value})
    return rows


def by_count(rows: Sequence[Row], metrics: Sequence[str]) -> Styler:
    """Some metrics of `many` rows: a line for every editor and number of edits."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["editor"], row["edits"]), {"editor": row["editor"], "edits": row["edits"]}
        )
        value = row["mean"]
        if "low" in row:
            value = Interval(value, row["low"], row["high"], row["n"])
        line[row["metric"]] = value
    frame = pd.DataFrame(list(lines.values()), dtype=object)
    measured = [metric for metric in metrics if metric in frame]
    return table(frame[["editor", "edits", *measured]])


def many_conclusion(at_once: Sequence[Row], in_a_row: Sequence[Row]) -> str:
    """The findings of notebook 05, from `many` rows."""
    sentences = [findings.many(at_once, at_once=True), *findings.cost_of_many(at_once)]
    if in_a_row:
        sentences.append(findings.many(in_a_row, at_once=False))
    return bullets(sentences)


# ---- inside an edit


def inside_results(
    checked: Sequence[Row], measured: pd.DataFrame, signs: Mapping[str, Sequence[Row]]
) -> dict[str, Any]:
    """Flat results of notebook 03: `inside.…`. `signs` has the rows of both signs by name."""
    results: dict[str, Any] = {
        "rank.gradients": len(checked),
        "rank.above_tokens": sum(row["rank"] > row["tokens"] for row in checked),
    }
    for name in ("error", "scored_error"):
        results[f"rank.largest_{name}"] = max(row[name] for row in checked)
    medians = measured.groupby("series", sort=False)[["cosine", "step", "norm"]].median()
    for series, row in medians.iterrows():
        slug = re.sub(r"\W+", "_", str(series))
        results |= {f"{slug}.{name}": value for name, value in row.items()}
    for sign, rows in signs.items():
        for row in rows:
            results[f"{sign}.{abs(row['size']):g}.loss.edit"] = row["loss.edit"]
    return {f"inside.{name}": value for name, value in results.items()}


# ---- helpers


def written(text: str) -> str:
    """What a model wrote, without the space before it."""
    return text.strip() or "(nothing)"


def _cell_text(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, Interval):
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
    if isinstance(value, bool):
        return "✓" if value else "✗"
    if value is None or value != value:  # NaN is unlike itself
        return ""
    if isinstance(value, Real) and not isinstance(value, int):
        return f"{float(value):.3g}"
    return escape(value)


def _is_numeric(column: "pd.Series[Any]") -> bool:
    """Whether a column holds nothing but numbers and intervals; a truth value is none."""
    kinds = {type(value) for value in column if value is not None and value == value}
    return all(issubclass(kind, Real | Interval) and kind is not bool for kind in kinds)
