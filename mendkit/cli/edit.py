"""The commands `edit` and `evaluate`."""

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

import mendkit

from ..data.examples import Probe
from ..errors import MendkitError
from ..runs import user_path
from . import app as cli
from .app import Data, Json, Limit, MaxNewTokens, Out, Overwrite, SkipInvalid, Words, logger

if TYPE_CHECKING:
    from ..data.examples import EditExample
    from ..evaluation.evaluate import Editor, EvaluationSet
    from ..evaluation.results import EvaluationReport
    from ..hparams import MENDHyperParams
    from ..mend.edit import Edit
    from ..mend.editor import MENDEditor
    from ..models.base import BaseModel

Prompts = Annotated[list[str] | None, Option(metavar="P", help="the prompt to edit; repeatable")]
Targets = Annotated[list[str] | None, Option(metavar="T", help="how that prompt should go on")]
Sentences = Annotated[
    list[str] | None,
    Option("--text", metavar="S", help="a sentence to edit with instead (`edit_on: text`)"),
]
Together = Annotated[bool, Option("--together", help="make one edit of all examples")]
Adapter = Annotated[
    Path | None, Option(metavar="DIR", parser=user_path, help="write a PEFT LoRA adapter")
]
MergedModel = Annotated[
    Path | None, Option(metavar="DIR", parser=user_path, help="write the edited model")
]
Saved = Annotated[
    Path | None, Option(metavar="FILE", parser=user_path, help="write the edit for `Edit.load`")
]

Mode = Annotated[Literal["single", "batch", "sequential"], Option()]
ProtocolName = Annotated[
    Literal["locft"] | None,
    Option(help="locft: thousands of edits, never reset (--k N: N at once)"),
]
BatchSize = Annotated[int | None, Option(min=1, help="edits at once in mode batch (25)")]
EditorKind = Annotated[str, Option(help="mend, context, or a baseline at the best of its settings")]
TuneData = Annotated[
    str | None,
    Option(
        metavar="FILE",
        help="first 12: edits that tune a baseline; others: more wordings [facts:validation]",
    ),
]
TextFile = Annotated[str, Option(metavar="FILE", help="held-out text, for drawdown (slow)")]
Survival = Annotated[
    int,
    Option(metavar="N", min=0, help="test N edits after rounding and fine-tuning on --text (slow)"),
]
Fluency = Annotated[bool, Option("--fluency", help="also the entropy of 100 written tokens (slow)")]

TUNED_ON = 12
PROMPT_WIDTH = 52  # of a prompt in a table


@cli.command("edit archive=runs/first/archive.safetensors --prompt 'Peru is in' --target Europe")
def edit(
    words: Words = None,
    *,
    prompt: Prompts = None,
    target: Targets = None,
    sentences: Sentences = None,
    data: Annotated[str, Option(metavar="FILE", help="examples, or facts:SPLIT; no --prompt")] = "",
    limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    together: Together = False,
    max_new_tokens: MaxNewTokens = 50,
    save_adapter: Adapter = None,
    save_merged: MergedModel = None,
    save_edit: Saved = None,
    out: Out = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> int:
    """Edit with an archive, and print what the model writes before and after.

    Each example is edited alone; --together makes one edit of all. One edit can be saved: as an
    adapter, as an edited model for transformers, or as a file. With --prompt the command also
    prints paraphrases, and neighbours that the model answers correctly before the edit.
    """
    from ..mend.batches import usable

    # 1. What can be wrong is looked at before the model is loaded.
    by_hand = prompt or [], target or [], sentences or []
    typed = _typed(*by_hand, data=data, of_data=limit or skip_invalid)
    hparams = cli.hyperparameters(words)
    place = cli.RunFolder(out, "results.json", "rows.jsonl", overwrite=overwrite)
    kept = {"--save-merged": save_merged, "--save-adapter": save_adapter, "--save-edit": save_edit}
    _check_places(kept, overwrite=overwrite)
    read = partial(mendkit.read_examples, limit=limit, skip_invalid=skip_invalid)
    examples: Sequence[EditExample] = typed or read(data, columns=hparams.columns)
    if len(examples) > 1 and any(kept.values()) and not together:
        raise MendkitError("only one edit can be saved; give --together, or --limit 1")

    # 2. What only the archive and its tokenizer tell.
    editor = mendkit.MENDEditor.from_hparams(hparams)
    if sentences and editor.hparams.edit_on == "answer":
        raise MendkitError("--text needs an archive that was trained with `edit_on: text`")
    if skip_invalid:
        examples = usable(editor.base, editor.hparams, examples)
    for example in examples:
        editor.tokens(example)  # raises DataError for one that is too long

    # 3. Each edit on the model as it was.
    groups = [examples] if together else [[example] for example in examples]
    rows = []
    with place.locked():
        for group in groups:
            change = editor.edit(group)
            for example in group:
                rows.append(_row(change, example, max_new_tokens, typed=bool(typed)))
                if not as_json:
                    cli.say(_description(rows[-1]))
        if as_json:
            cli.show(rows, "", as_json=True)
        right = sum(row["success"] for row in rows)
        results = {"edit.free_exact": right / len(rows), "edit.free_exact.n": len(rows)}
        results |= _save(change, kept)
        if skip_invalid:
            results["edit.skipped"] = len(getattr(examples, "skipped", ()))
        place.write(results, rows)
    return 0


def _typed(
    prompts: list[str], targets: list[str], texts: list[str], *, data: str, of_data: int | None
) -> list["EditExample"]:
    """The edits given by hand. Raises MendkitError unless they or `data`, with its options, are."""
    if bool(data) == bool(prompts) or len(prompts) != len(targets):
        raise MendkitError("give as many --target as --prompt, or --data")
    if prompts and of_data:
        raise MendkitError("--limit and --skip-invalid go with --data")
    if texts and len(texts) != len(prompts):
        raise MendkitError("give as many --text as --prompt and --target, which say what to check")
    typed = list(map(mendkit.EditExample, prompts, targets))
    pairs = zip(typed, texts, strict=False)
    return [replace(example, passages=(text,)) for example, text in pairs] or typed


def _check_places(kept: dict[str, Path | None], *, overwrite: bool) -> None:
    """Raises MendkitError if something is in the way, or two outputs share a place."""
    given = [path.resolve() for path in kept.values() if path]
    if len(set(given)) < len(given):
        raise MendkitError(f"{', '.join(kept)}: give each its own path")
    for option, path in kept.items():
        if path is not None and path.exists():
            fits = path.is_file() == (option == "--save-edit")
            if not fits or (not overwrite and (path.is_file() or any(path.iterdir()))):
                raise MendkitError(f"{path} is there; give another {option}, or --overwrite")


def _row(
    change: "Edit", example: "EditExample", max_new_tokens: int, *, typed: bool
) -> dict[str, Any]:
    """What the model writes before and after an edit, for a typed one also `beside` it."""
    from ..data.sampling import typed_example
    from ..evaluation.results import is_said

    said = change.base.said(example.target_new)
    probe, old = Probe(example.prompt, said), example.ground_truth
    (row,) = _answers_to(change, [probe], max_new_tokens=max_new_tokens, old=old)
    row["target_new"] = example.target_new
    if not typed:
        return row
    edited = {each.prompt for each in change.examples}
    roles = typed_example(example.prompt, said).roles()
    neighbours = [probe for probe in roles["neighbours"] if probe.prompt not in edited]
    ask = partial(_answers_to, change, max_new_tokens=min(max_new_tokens, len(said) + 16))
    row["beside"] = ask([*roles["paraphrases"], *roles["unrelated"]])
    # Of the neighbours those that are answered rightly before the edit.
    for each in ask(neighbours):
        if is_said(each["before"], (each["answer"],)):
            row["beside"].append(each)
    return row


def _answers_to(
    change: "Edit", probes: Sequence[Probe], *, max_new_tokens: int, old: str | None = None
) -> list[dict[str, Any]]:
    """What the model writes before and after an edit, and if it is the answer, or as before."""
    from ..evaluation.results import is_said

    write = partial(
        change.base.generate_batch,
        [probe.prompt for probe in probes],
        answers=[(probe.answer or "",) for probe in probes],
        max_new_tokens=max_new_tokens,
    )
    before, rows = write(), []
    with change.applied():
        after = write()
    for probe, first, then in zip(probes, before, after, strict=True):
        good = then.strip() == first.strip()
        if probe.answer is not None:
            good = is_said(then, (probe.answer,), old)
        row = {"prompt": probe.prompt, "answer": probe.answer, "before": first, "after": then}
        rows.append({**row, "success": good})
    return rows


def _description(row: dict[str, Any]) -> str:
    """A row for people, with a table of the prompts beside the edit."""
    lines = [row["prompt"], f"  before: {row['before'].strip()}"]
    lines.append(f"  after:  {row['after'].strip()}  {_mark(row, 'matches the target')}")
    beside, cells = row.get("beside", ()), []
    for each in beside:
        prompt = each["prompt"]
        if len(prompt) > PROMPT_WIDTH:
            prompt = f"…{prompt[1 - PROMPT_WIDTH :]}"
        cells.append((prompt, _short(each["before"]), "→", _short(each["after"]), _mark(each)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for cell in cells:
        lines.append(f"  {'  '.join(map(str.ljust, cell, widths))}".rstrip())
    if beside:
        right = sum(each["success"] for each in beside)
        lines.append(f"  {right} of {len(beside)} other prompts go on as they should")
    return "\n".join(lines)


def _mark(row: dict[str, Any], right: str = "") -> str:
    wanted = row["answer"] or _short(row["before"])
    return f"✓ {right}" if row["success"] else f"✗ expected: {wanted}"


def _short(text: str) -> str:
    return textwrap.shorten(text, 24, placeholder=" …")


def _save(change: "Edit", kept: dict[str, Path | None]) -> dict[str, Any]:
    """Write the edit; returns paths and losses by their names in results.json."""
    merged, adapter, file = kept.values()
    results: dict[str, Any] = {}
    if merged:
        sites = change.save_merged(merged)
        results["edit.merged"] = str(merged)
        results["edit.merged.kept"] = min(site.kept for site in sites)
        results["edit.merged.relative_error"] = max(site.relative_error for site in sites)
    if adapter:
        adapted = change.save_adapter(adapter)
        results["edit.adapter"] = str(adapter)
        results["edit.adapter.rank"] = max(site.rank for site in adapted)
        results["edit.adapter.relative_error"] = max(site.relative_error for site in adapted)
    if file:
        results["edit.saved"] = str(change.save(file))
    for name, value in results.items():
        logger.info("%s: %s", name, value)
    return results


@cli.command("evaluate archive=runs/first/archive.safetensors --mode sequential --out runs/scores")
def evaluate(
    words: Words = None,
    *,
    data: Data = "facts:test",
    limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    mode: Mode = "single",
    protocol: ProtocolName = None,
    k: BatchSize = None,
    editor: EditorKind = "mend",
    tune_data: TuneData = None,
    text: TextFile = "",
    fluency: Fluency = False,
    survival: Survival = 0,
    max_new_tokens: MaxNewTokens = 50,
    out: Out = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> int:
    """Score the edits of an archive, or of a baseline, on examples.

    Each edit is made on a fresh model (single), k at once (batch), or all in a row (sequential).
    """
    # 1. What can be wrong is looked at before the model is loaded.
    how = protocol or mode
    _check_editor(editor, how, k, tune_data)
    if protocol and mode != "single":
        raise MendkitError("--protocol says how edits are made; leave out --mode")
    if survival and (how != "single" or editor == "context" or not text):
        raise MendkitError("--survival goes with --text, an editor and --mode single")
    hparams = cli.hyperparameters(words)
    place = cli.RunFolder(out, "results.json", "rows.jsonl", overwrite=overwrite)
    read = partial(mendkit.read_examples, columns=hparams.columns)
    examples = read(data, limit=limit, skip_invalid=skip_invalid)
    extras: dict[str, Any] = {"fluency": fluency, "survival": survival, "brief": bool(protocol)}
    if text:
        extras["text"] = mendkit.read_text(text)

    # 2. The model and its editor.
    base, mend = _opened(editor, hparams)
    if mend is not None:
        hparams = mend.hparams
    prepare = partial(mendkit.EvaluationSet, base, hparams, max_new_tokens=max_new_tokens)
    chosen: Editor | None = mend
    tuning: dict[str, Any] = {}
    with place.locked():
        # 3. A baseline at its best settings.
        if editor in mendkit.KINDS:
            tuned_on = read(tune_data or "facts:validation")
            chosen, tuning = _tuned(editor, prepare, tuned_on, mend, apart_from=examples)

        # 4. The scores. Rows are kept as they are made.
        logger.info("scoring %d edits, mode %s", len(examples), how)
        test = partial(prepare, examples, **extras)
        report, costs = _scored(chosen, test, how, k, out and out / "rows.jsonl")
        results = report.to_dict() | tuning | costs
        place.write(results, [vars(row) for row in report.rows])
    cli.show(results, _table(report), as_json=as_json)
    return 0


def _check_editor(editor: str, mode: str, k: int | None, tune_data: str | None) -> None:
    """Raises MendkitError for an unknown editor, or options that do not go together."""
    if editor not in ("mend", "context", *mendkit.KINDS):
        kinds = ", ".join(mendkit.KINDS)
        raise MendkitError(f"--editor must be mend, context, {kinds}, got {editor!r}")
    if editor == "context" and mode != "single":
        raise MendkitError("--editor context edits nothing; it goes with --mode single")
    if k and mode not in ("batch", "locft"):
        raise MendkitError("--k goes with --mode batch")
    if tune_data and editor in ("mend", "context"):
        raise MendkitError("--tune-data goes with --editor BASELINE, whose settings it chooses")


def _opened(kind: str, hparams: "MENDHyperParams") -> tuple["BaseModel", "MENDEditor | None"]:
    """The base model, and the archive's editor if the editor to score needs it."""
    if kind in ("mend", "identity"):
        mend = mendkit.MENDEditor.from_hparams(hparams)
        return mend.base, mend
    if hparams.archive is not None:
        logger.warning("archive: --editor %s does not use it", kind)
    return mendkit.load_model(hparams), None


def _tuned(
    kind: str,
    prepare: Callable[[Sequence["EditExample"]], "EvaluationSet"],
    examples: Sequence["EditExample"],
    mend: "MENDEditor | None",
    *,
    apart_from: Sequence["EditExample"],
) -> tuple["Editor", dict[str, Any]]:
    """A baseline at its best settings on the first `examples`, and results about the choice.

    Gauss-Newton learns from the others how facts are put in other words.
    """
    edited = {example.subject for example in apart_from}
    others = [example for example in examples[TUNED_ON:] if example.subject not in edited]
    validation = prepare(examples[:TUNED_ON])
    running = mendkit.running_text(mendkit.read_examples("facts:train"))
    tuned = mendkit.tune(kind, validation, text=running, mend=mend, keep=others)
    results = tuned.to_dict() | {"tuning.edits": len(validation.to_edit)}
    logger.info("%s: %s", tuned.editor.name, results["tuning.kept"])
    return tuned.editor, results


def _scored(
    editor: "Editor | None",
    prepare: Callable[[], "EvaluationSet"],
    how: str,
    k: int | None,
    rows: Path | None,
) -> tuple["EvaluationReport", dict[str, Any]]:
    """The scores of an editor, or of the fact in the context; costs and protocol by name."""
    from ..evaluation.evaluate import MODES
    from ..evaluation.survival import SURVIVAL
    from ..runs import peak_memory_gb

    started = time.perf_counter()
    test = prepare()
    if how == "batch":
        k = k or 25
    if editor is None:
        report = mendkit.fact_in_context(test)
    else:
        report = mendkit.evaluate(editor, test, mode=how, k=k, rows=rows)
    protocol = [test.protocol, MODES[how].format(k=k or 1)]
    if test.survival:
        protocol.append(SURVIVAL)
    costs = {"seconds": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb()}
    return report, {**costs, "protocol": "; ".join(protocol)}


def _table(report: "EvaluationReport") -> str:
    """Every mean with its 95 % interval and number of edits."""
    import pandas as pd

    rows = {name: vars(interval) for name, interval in report.summary.items()}
    for name, value in {**report.harmonic, **report.values}.items():
        rows[name] = {"mean": value}
    table = pd.DataFrame.from_dict(rows, orient="index").astype({"n": "Int64"})
    counts = [f"{n} {name.replace('_', ' ')}" for name, n in report.counts.items()]
    text = table.to_string(float_format="%.3f", na_rep="")
    parts = [*map(_table, report.earlier), f"{report.mode}\n{text}\n{', '.join(counts)}"]
    return "\n\n".join(parts)
