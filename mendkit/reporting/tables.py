"""Tables and sentences for notebooks: HTML tables with all text escaped, Markdown computed from a run."""

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from ..baselines.tuning import Tuned
from ..data.examples import EditExample
from ..evaluation.results import HARMONIC, EvaluationReport, Interval, normalise
from ..hparams import MENDHyperParams
from ..mend.editor import MENDEditor
from ..mend.training import TrainingResult
from ..models.base import BaseModel
from . import findings
from .findings import Row

LONGEST = 25  # relations listed one by one
CELL = 'style="text-align:left;vertical-align:top"'

Asked = tuple[str, str, str | None]
"""A prompt to ask before and after an edit: its role, itself, and the answer wanted (None: as before)."""


class Changed(str):
    """Text that a table marks: it is not what it was before."""


def escape(value: Any) -> str:
    """Text as HTML that shows it: no tag of its own, a dollar sign no mathematics."""
    text = html.escape(str(value)).replace("$", "<span>$</span>").replace("\n", "⏎ ")
    return f"<mark>{text}</mark>" if isinstance(value, Changed) else text


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], /) -> str:
    """An HTML table; every cell is escaped."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag} {CELL}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"


# ------------------------------------------------------------------------------------------------------- data


def plan(
    hparams: MENDHyperParams, folder: Path, /, *, examples: Mapping[str, Sequence[EditExample]]
) -> str:
    """What is going to run, as a table."""
    steps = f"{hparams.max_epochs} epochs" if hparams.max_epochs else f"{hparams.max_iters} steps"
    sites = (
        hparams.inner_params
        if isinstance(hparams.inner_params, str)
        else ", ".join(hparams.inner_params)
    )
    archive = hparams.archive or "none: a hypernetwork is initialised and trained"
    rows = [("base model", hparams.model_name), ("edit sites", sites), ("archive", archive)]
    if hparams.archive is None:
        rows.append(("training", f"{steps} of {hparams.batch_size} edits, rank {hparams.rank}"))
    rows += [("seed", hparams.seed), ("run folder", folder)]
    rows += [(f"{name} examples", len(own)) for name, own in examples.items()]
    return table(("what", "value"), rows)


def relations(examples: Mapping[str, Sequence[EditExample]], /) -> str:
    """How many examples each split has of each relation, the most frequent first."""
    counts = {name: Counter(str(e.relation) for e in own) for name, own in examples.items()}
    order = [name for name, _ in sum(counts.values(), Counter()).most_common()]
    rows = [
        (findings.relation(r), *(counts[split][r] for split in counts)) for r in order[:LONGEST]
    ]
    if order[LONGEST:]:
        rest = (sum(own[r] for r in order[LONGEST:]) for own in counts.values())
        rows.append((f"{len(order) - LONGEST} more", *rest))
    return table(("relation", *counts), [*rows, ("all", *(len(own) for own in examples.values()))])


def overlap(train: Sequence[EditExample], held_out: Sequence[EditExample], /) -> str:
    """Whether held-out subjects and prompts occur in training."""
    subjects = {e.subject for e in held_out if e.subject}
    shared = len(subjects & {e.subject for e in train})
    prompts = len({e.prompt for e in held_out} & {e.prompt for e in train})
    known = (
        f"{shared} of the {len(subjects)} held-out subjects"
        if subjects
        else "The subjects are not named;"
    )
    return f"{known} and {prompts} of the {len(held_out)} held-out prompts occur in the training examples, too."


def example(e: EditExample, /) -> str:
    """One example: what should change and what should not."""
    rows = [
        ("edit", e.prompt, e.target_new, f"replaces {e.ground_truth}" if e.ground_truth else "")
    ]
    rows += [("paraphrase", prompt, e.target_new, "should follow") for prompt in e.paraphrases]
    for role, own in (("neighbour", e.neighbours), ("unrelated", e.unrelated)):
        rows += [
            (role, p.prompt, p.answer or "(whatever the model says)", "should stay") for p in own
        ]
    return table(("role", "prompt", "answer", ""), rows)


# --------------------------------------------------------------------------------------------------- training


def training_summary(result: TrainingResult, /) -> str:
    """How training went: steps, time, why it ended, which step was kept."""
    steps = max(row["step"] for row in result.history)
    caches = sum(result.cache.get(f"{part}_seconds", 0.0) for part in ("trunk", "factor"))
    return (
        f"Training ended after {steps:g} steps ({result.stopped}) and took {result.seconds:.0f} s in all, "
        f"{caches:.0f} s of them for the caches. The archive of step {result.best['step']:g} was kept."
    )


def validation_scores(best: Row, control: Row, /) -> str:
    """Validation values of the kept archive beside the identity control's at its best step size."""
    names = [name.removeprefix("val.") for name in best if name.startswith("val.")]
    rows = [(n, f"{control[n]:.3f}", f"{best[f'val.{n}']:.3f}") for n in names if n in control]
    return table(("validation", f"identity, α = {control['edit_lr']:.1e}", "trained"), rows)


def training_results(result: TrainingResult, control: Row, /) -> dict[str, Any]:
    """Flat results of notebook 01: `train.…`, and `identity.…` for the control at its best step size."""
    values = {
        "seconds": result.seconds,
        "steps": max(row["step"] for row in result.history),
        "best_step": result.best["step"],
        "stopped": result.stopped,
        "normaliser_examples": result.normaliser_examples,
        **result.cache,
    }
    values |= {
        k.replace("val.", "validation."): v for k, v in result.best.items() if k.startswith("val.")
    }
    results = {f"train.{name}": value for name, value in values.items()}
    results |= {
        f"identity.validation.{name}": v for name, v in control.items() if name != "edit_lr"
    }
    return results | {"identity.edit_lr": control["edit_lr"]}


def training_conclusion(result: TrainingResult, control: Row, /) -> str:
    """The findings of notebook 01, and the weakest share."""
    shares = {n: result.best[f"val.{n}"] for n in findings.SHARES if f"val.{n}" in result.best}
    weakest = min(shares, key=shares.__getitem__)
    lines = [
        findings.validation(result.history, result.best),
        findings.control([control], result.best),
        f"The weakest of its shares is {weakest.replace('_', ' ')}, {shares[weakest]:.2f}",
    ]
    return "\n".join(f"- {line}." for line in lines)


# ---------------------------------------------------------------------------------------------------- editing


def archive(metadata: Mapping[str, Any], /) -> str:
    """What an archive says of itself (from `inspect_archive`)."""
    base, best = metadata["base_model"], metadata["training"].get("best", {})
    rows = [
        ("trained for", f"{base['name']} ({base['class']})"),
        ("kept at step", best.get("step", "unknown")),
    ]
    rows += [
        (f"edit site {findings.short_site(n)}", f"α = {v:.2e}")
        for n, v in metadata["edit_lr"].items()
    ]
    shares = [name for name in (*findings.SHARES, "score") if f"val.{name}" in best]
    rows += [(f"validation {name}", f"{best[f'val.{name}']:.3f}") for name in shares]
    return table(("archive", "value"), rows)


def spread(examples: Sequence[EditExample], n: int, /) -> list[EditExample]:
    """The first n examples of as many relations as there are, in their order."""
    seen: Counter[str | None] = Counter()
    rank = []
    for i, e in enumerate(examples):
        rank.append((seen[e.relation], i))
        seen[e.relation] += 1
    return [examples[i] for _, i in sorted(rank)[:n]]


def prompts_of(
    e: EditExample, /, *, most: tuple[int | None, int | None, int | None] = (2, 2, 1)
) -> list[Asked]:
    """The prompts by which one edit is shown: itself, and at most so many paraphrases, neighbours and unrelated ones
    (None: all)."""
    paraphrases, neighbours, unrelated = most
    return [
        ("edit", e.prompt, e.target_new),
        *(("paraphrase", prompt, e.target_new) for prompt in e.paraphrases[:paraphrases]),
        *(("neighbour", probe.prompt, None) for probe in e.neighbours[:neighbours]),
        *(("unrelated", probe.prompt, None) for probe in e.unrelated[:unrelated]),
    ]


def answers(base: BaseModel, e: EditExample, /) -> Row:
    """An edit's prompt, its new and old answer, and their first tokens after the prompt (None: unknown)."""

    def first(answer: str | None) -> str | None:
        if not answer or base.labels:
            return answer and base.said(answer)
        return base.tokenizer.decode([base.tokenize(e.prompt, answer).targets[0]])

    own = {"new_token": first(e.target_new), "old_token": first(e.ground_truth)}
    return {"prompt": e.prompt, "new": e.target_new, "old": e.ground_truth, **own}


def before_after(asked: Sequence[Asked], before: Sequence[str], after: Sequence[str], /) -> str:
    """Completions before and after one edit, what changed (marked), and whether each is the one wanted."""
    rows = []
    for (role, prompt, wanted), old, new in zip(asked, before, after, strict=True):
        good = normalise(new) == normalise(old if wanted is None else wanted)
        said = _said(new) if _said(new) == _said(old) else Changed(_said(new))
        rows.append((role, prompt, _said(old), said, wanted or "as before", _tick(good)))
    return table(("role", "prompt", "before", "after", "wanted", ""), rows)


def scores(trained: EvaluationReport, control: EvaluationReport, /) -> str:
    """All scores with their intervals: unedited, identity control, trained editor."""
    return _columns(
        {"identity control": control, "trained editor": trained}, leave=("edit.seconds",)
    )


def editors(reports: Mapping[str, EvaluationReport], /) -> str:
    """All scores of editors on the same edits, with their intervals; the first one names the scores and n."""
    return _columns(reports)


def _columns(reports: Mapping[str, EvaluationReport], /, *, leave: Sequence[str] = ()) -> str:
    first = next(iter(reports.values())).summary
    columns = [("before.", first), *(("", report.summary) for report in reports.values())]
    names = [n for n in first if not n.startswith("before.") and n not in leave]
    rows = [
        (n, *(_mean(own.get(prefix + n)) for prefix, own in columns), first[n].n) for n in names
    ]
    for name in HARMONIC:
        values = (report.harmonic.get(name) for report in reports.values())
        rows.append((name, "", *("" if v is None else f"{v:.3f}" for v in values), ""))
    return table(("score", "unedited", *reports, "n edits"), rows)


def tried(tuned: Sequence[Tuned], /) -> str:
    """Every setting of every kind of editor that was tried on validation edits; ✓ marks the one that was kept."""
    shares = dict.fromkeys(
        name for own in tuned for row in own.rows for name in findings.HEADLINE if name in row
    )
    names = (*shares, "score")
    rows = [
        (
            row["editor"],
            row["settings"],
            *(f"{row[n]:.3f}" for n in names),
            "✓" if row["chosen"] else "",
        )
        for own in tuned
        for row in own.rows
    ]
    return table(("editor", "setting", *names, "kept"), rows)


def baselines_conclusion(reports: Mapping[str, EvaluationReport], /) -> str:
    """The findings of notebook 04; the first report is the trained editor's."""
    (name, first), *others = reports.items()
    own, scores = (
        first.summary,
        {other: findings.headline_score(report.summary) for other, report in others},
    )
    score = findings.headline_score(own)
    better = [f"{other} ({value:.2f})" for other, value in scores.items() if value >= score]
    lines = [
        findings.decoding(own),
        findings.ranking({other: report.summary for other, report in reports.items()}),
        f"{name}, {score:.2f}, beats "
        + (f"all but {', '.join(better)}" if better else f"all {len(others)} others"),
    ]
    if (ns := own.get("neighbourhood.ns")) is not None:
        kept = _mean(own["neighbourhood.argmax_agreement"])
        lines.append(
            f"Neighbours keep their argmax {kept}, and prefer their own answer to the new one {_mean(ns)}"
        )
    return "\n".join(f"- {line}." for line in lines)


def many(reports: Mapping[str, Sequence[EvaluationReport]], /) -> list[Row]:
    """A row for every editor, number of edits (`edits`) and metric: `mean`, with `low`, `high`, `n` where it is one."""
    rows: list[Row] = []
    for editor, own in reports.items():
        for report in (each for last in own for each in (*last.earlier, last)):
            one = {
                "editor": editor,
                "edits": 1 if report.mode == "single" else int(report.mode.rpartition("_")[2]),
            }
            rows += [{**one, "metric": m, **vars(value)} for m, value in report.summary.items()]
            rows += [{**one, "metric": m, "mean": value} for m, value in report.values.items()]
    return rows


def by_count(rows: Sequence[Row], metrics: Sequence[str], /) -> str:
    """Some metrics of `many` rows: a line for every editor and number of edits."""
    found = {(row["editor"], row["edits"], row["metric"]): row for row in rows}
    names = [m for m in metrics if any(row["metric"] == m for row in rows)]
    lines = [
        (editor, edits, *(_cell(found.get((editor, edits, m))) for m in names))
        for editor, edits in dict.fromkeys((row["editor"], row["edits"]) for row in rows)
    ]
    return table(("editor", "edits", *names), lines)


def many_conclusion(at_once: Sequence[Row], in_a_row: Sequence[Row], /) -> str:
    """The findings of notebook 05, from `many` rows."""
    lines = [findings.many(at_once, at_once=True), *findings.cost_of_many(at_once)]
    lines += [findings.many(in_a_row, at_once=False)] if in_a_row else []
    return "\n".join(f"- {line}." for line in lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return (
        f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        if "low" in row
        else f"{row['mean']:.3g}"
    )


def counts(report: EvaluationReport, /) -> str:
    """How many edits were scored, how many not and why, and how long one takes."""
    c, seconds = report.counts, report.summary["edit.seconds"].mean
    return (
        f"{c['scored']} edits were scored; {c['already_true']} were left out because the unedited model "
        f"already writes the new answer, {c['skipped']} because a text of theirs cannot be used. "
        f"Computing one edit took {seconds * 1000:.0f} ms."
    )


def generations(trained: EvaluationReport, control: EvaluationReport, /, *, n: int) -> str:
    """What the three models write for n edits: the trained editor's failures (up to half), then successes."""
    success = "edit_success.free_exact"
    failed = [row for row in trained.rows if row.values[success] < 1]
    passed = [row for row in trained.rows if row.values[success] == 1]
    few = max(n // 2, n - len(passed))
    chosen = [*failed[:few], *passed[: n - len(failed[:few])]]
    other = {row.index: row for row in control.rows}
    rows = []
    for row in chosen:
        for i in (0, 2):  # the edit prompt and the first paraphrase
            if i < len(row.outputs):
                own, theirs = row.outputs[i], other[row.index].outputs[i]
                good = normalise(own["after"]) == normalise(row.target_new)
                texts = (_said(text) for text in (own["before"], theirs["after"], own["after"]))
                rows.append((own["prompt"], row.target_new, *texts, _tick(good)))
    return table(
        ("prompt", "new answer", "unedited", "identity control", "trained editor", ""), rows
    )


def hidden(report: EvaluationReport, /, *, n: int) -> str:
    """What is written for n edits, on the bare prompt and in question form; first those whose scores disagree most."""
    names = ("edit_success.tf_exact", "edit_success.free_exact", "edit_success.free_exact_question")
    scored = [
        (row, [row.values[name] == 1 for name in names if name in row.values])
        for row in report.rows
    ]
    scored.sort(
        key=lambda pair: (-len(set(pair[1])), pair[1][1], -pair[1][0])
    )  # stable: else in their order
    rows = []
    for row, good in scored[:n]:
        said = [_said(output["after"]) for output in row.outputs[: len(good) - 1]]
        marked = (f"{_tick(ok)} {text}" for ok, text in zip(good[1:], said, strict=True))
        rows.append((row.prompt, row.target_new, _tick(good[0]), *marked))
    return table(
        ("prompt", "new answer", "teacher-forced", "written", "written, asked as a question"), rows
    )


def editing_conclusion(
    trained: EvaluationReport, control: EvaluationReport, curve: Sequence[Row], /
) -> str:
    """The findings of notebook 02: verdict, weakest share, failures, strength."""
    shares = {n: trained.summary[n].mean for n in findings.HEADLINE if n in trained.summary}
    weakest = min(shares, key=shares.__getitem__)
    failed = sum(row.values["edit_success.free_exact"] < 1 for row in trained.rows)
    lines = [
        findings.verdict(trained.summary, control.summary),
        f"The weakest of the four shares is `{weakest}`, {_mean(trained.summary[weakest])}",
        f"{failed} of {len(trained.rows)} edits are not written exactly when the model decodes freely",
        findings.strength(curve),
    ]
    reworded = trained.summary.get("neighbourhood.reworded_agreement")
    if reworded is not None:
        lines.append(
            f"Other subjects keep their argmax {_mean(trained.summary['neighbourhood.argmax_agreement'])} in the edit "
            f"prompt's wording and {_mean(reworded)} in a paraphrase's"
        )
    return "\n".join(f"- {line}." for line in lines)


# --------------------------------------------------------------------------------------------- inside an edit


def about(editor: MENDEditor, /) -> list[tuple[str, str]]:
    """The base model and the hypernetwork of `open_editor`, as rows."""
    untrained = "NONE: a MEND at identity initialisation, per-feature statistics, never trained"
    return [
        ("base model", editor.base.name),
        ("hypernetwork", untrained if editor.name == "untrained" else "trained"),
    ]


def inspected(
    editor: MENDEditor, folder: Path, /, *, examples: Mapping[str, Sequence[EditExample]]
) -> str:
    """What is going to be looked at, as a table: a trained MEND or, said aloud, one that is not."""
    h = editor.mend.hparams
    rows = [*about(editor), ("tokens that make the update", h.edit_tokens)]
    rows += [("normaliser", _normaliser(h)), ("run folder", folder)]
    return table(
        ("what", "value"),
        [*rows, *((f"{name} examples", len(own)) for name, own in examples.items())],
    )


def ladder(measured: Sequence[Row], /) -> str:
    """From the gradient to the trained update, one difference a row (rows of `anatomy`)."""
    rows = []
    for own in findings.medians(measured, by=("series",), of=("cosine", "step")):
        norms = quantiles((row["norm"] for row in measured if row["series"] == own["series"]), n=10)
        spread = f"{norms[-1] / norms[0]:.3g}" if norms[0] > 0 else "infinite"
        rows.append((own["series"], f"{own['cosine']:.6f}", f"{own['step']:.4g}", spread))
    return table(
        ("update", "cosine of −ΔW with ∇L, median", "‖ΔW‖ / ‖∇L‖, median", "spread of ‖ΔW‖ / ‖W‖"),
        rows,
    )


def layers(by_site: Sequence[Row], edit_lrs: Mapping[str, float], /, *, start: float) -> str:
    """Step size, relative norm and cosine with the gradient of every site, at the start and trained."""
    rows = []
    for site, alpha in edit_lrs.items():
        before, after = (row for row in by_site if row["site"] == site)
        sizes = (
            f"{alpha:.2e}",
            f"{alpha / start:.2f}",
            f"{before['norm']:.2e}",
            f"{after['norm']:.2e}",
        )
        cosine = (f"{before['cosine']:.3f}", f"{after['cosine']:.3f}")
        rows.append(
            (findings.short_site(site), *sizes, f"{after['norm'] / before['norm']:.2f}", *cosine)
        )
    kinds = dict.fromkeys(row["series"] for row in by_site)
    columns = [f"{name}: {kind}" for name in ("‖ΔW‖ / ‖W‖", "cosine with ∇L") for kind in kinds]
    return table(("site", "step size α", "α / start", *columns[:2], "growth", *columns[2:]), rows)


def inside_results(
    checked: Sequence[Row], measured: Sequence[Row], minus: Sequence[Row], plus: Sequence[Row], /
) -> Row:
    """Flat results of notebook 03: `inside.…`."""
    results = {
        "rank.gradients": len(checked),
        "rank.above_tokens": sum(r["rank"] > r["tokens"] for r in checked),
    }
    for name in ("error", "scored_error"):
        results[f"rank.largest_{name}"] = max(row[name] for row in checked)
    for own in findings.medians(measured, by=("series",), of=("cosine", "step", "norm")):
        series = re.sub(r"\W+", "_", own["series"])
        results |= {f"{series}.{name}": own[name] for name in ("cosine", "step", "norm")}
    for sign, rows in (("minus", minus), ("plus", plus)):
        results |= {f"{sign}.{abs(row['size']):g}.loss.edit": row["loss.edit"] for row in rows}
    return {f"inside.{name}": value for name, value in results.items()}


def _normaliser(h: MENDHyperParams) -> str:
    if not h.norm:
        return "none"
    return (
        "mean and standard deviation of each feature"
        if h.whiten is None
        else "u whitened, delta per feature"
    )


# ---------------------------------------------------------------------------------------------------- helpers


def _said(text: str) -> str:
    return text.strip() or "(nothing)"


def _mean(value: Interval | None) -> str:
    return "" if value is None else f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _tick(good: bool) -> str:
    return "✓" if good else "✗"
