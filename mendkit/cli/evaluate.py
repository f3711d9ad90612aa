"""The command `evaluate`."""

import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

import mendkit

from ..errors import MendkitError
from . import app as cli
from .app import Data, Json, Limit, MaxNewTokens, Out, Overwrite, SkipInvalid, Words, logger

if TYPE_CHECKING:
    from ..evaluation.evaluate import Editor, EvaluationSet
    from ..evaluation.results import EvaluationReport
    from ..mend.editor import MENDEditor
    from ..models.base import BaseModel

Mode = Annotated[Literal["single", "batch", "sequential"], Option()]
BatchSize = Annotated[int | None, Option(min=1, help="edits at once in mode batch (25)")]
EditorKind = Annotated[str, Option(help="mend, context, or a baseline at the best of its settings")]
TuneData = Annotated[str, Option(metavar="FILE", help="edits that choose these settings")]
TuneLimit = Annotated[int, Option(min=1, metavar="N", help="use the first N of them")]
TextFile = Annotated[str, Option(metavar="FILE", help="held-out text, for drawdown (slow)")]
TextTokens = Annotated[int, Option(min=1, metavar="N", help="how many of its tokens")]
KeyText = Annotated[str, Option(metavar="FILE", help="text for covariances (or facts:train)")]
Fluency = Annotated[bool, Option("--fluency", help="entropy of 100 free tokens, too (slow)")]
Unrelated = Annotated[str, Option(metavar="FILE", help="NQ-open questions, as unrelated prompts")]


@cli.command("evaluate archive=runs/first/archive.safetensors --mode sequential --out runs/scores")
def evaluate(
    words: Words = None,
    *,
    data: Data = "facts:test",
    limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    mode: Mode = "single",
    k: BatchSize = None,
    editor: EditorKind = "mend",
    tune_data: TuneData = "facts:validation",
    tune_limit: TuneLimit = 12,
    key_text: KeyText = "",
    text: TextFile = "",
    text_tokens: TextTokens = 2048,
    fluency: Fluency = False,
    unrelated: Unrelated = "",
    max_new_tokens: MaxNewTokens = 50,
    out: Out = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> int:
    """Score the edits of an archive, or of a baseline, on examples.

    Each edit is made on a fresh model (single), k at once (batch), or all in a row (sequential).
    """
    k = _edits_at_once(editor, mode, k)
    hparams = cli.hyperparameters(words)
    place = cli.RunFolder(out, "results.json", "rows.jsonl", overwrite=overwrite)
    read = partial(mendkit.read_examples, columns=hparams.columns)
    examples = read(data, limit=limit, skip_invalid=skip_invalid)
    held_out = mendkit.read_text(text) if text else None
    if unrelated:
        examples = mendkit.with_unrelated(examples, mendkit.read_questions(unrelated))
    base, mend = _model(editor, hparams)
    hparams = mend.hparams if mend else hparams
    score_on = partial(mendkit.EvaluationSet, base, hparams, max_new_tokens=max_new_tokens)
    chosen: Editor | None = mend
    tuning: dict[str, Any] = {}
    with place.locked():
        if editor not in ("mend", "context"):
            validation = score_on(read(tune_data, limit=tune_limit))
            chosen, tuning = _tuned(editor, validation, key_text=key_text, mend=mend)
        logger.info("scoring %d edits, mode %s", len(examples), mode)
        started = time.perf_counter()
        test = score_on(examples, text=held_out, text_tokens=text_tokens, fluency=fluency)
        if chosen is None:
            report = mendkit.fact_in_context(test)
        else:
            rows = out and out / "rows.jsonl"
            report = mendkit.evaluate(chosen, test, mode=mode, k=k, rows=rows)
        results = report.to_dict() | tuning | _costs(started)
        place.write(results, [vars(row) for row in report.rows])
    cli.show(results, _table(report), as_json=as_json)
    return 0


def _edits_at_once(editor: str, mode: str, k: int | None) -> int | None:
    """Edits at once in mode batch. Raises MendkitError for options that contradict each other."""
    if editor not in ("mend", "context", *mendkit.KINDS):
        kinds = ", ".join(mendkit.KINDS)
        raise MendkitError(f"--editor must be mend, context, {kinds}, got {editor!r}")
    if editor == "context" and mode != "single":
        raise MendkitError("--editor context edits nothing; it goes with --mode single")
    if k and mode != "batch":
        raise MendkitError("--k goes with --mode batch")
    return k or 25 if mode == "batch" else None


def _costs(started: float) -> dict[str, float]:
    """Seconds since `started`, and the most memory that the process had, by name."""
    from ..runs import peak_memory_gb

    return {"seconds": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb()}


def _model(kind: str, hparams: mendkit.MENDHyperParams) -> tuple["BaseModel", "MENDEditor | None"]:
    """The model, and its MEND where the kind of editor has one."""
    if kind not in ("mend", "identity"):
        return mendkit.load_model(hparams), None
    mend = mendkit.MENDEditor.from_hparams(hparams)
    return mend.base, mend


def _tuned(
    kind: str,
    validation: "EvaluationSet",
    *,
    key_text: str,
    mend: "MENDEditor | None",
) -> tuple["Editor", dict[str, Any]]:
    """A baseline at the settings that are best on `validation`, and results about the choice."""
    if key_text:
        text = mendkit.read_text(key_text)
    else:
        text = mendkit.running_text(mendkit.read_examples("facts:train"))
    tuned = mendkit.tune(kind, validation, text=text, mend=mend)
    results = tuned.to_dict() | {"tuning.edits": len(validation.to_edit)}
    logger.info("%s: %s", tuned.editor.name, results["tuning.kept"])
    return tuned.editor, results


def _table(report: "EvaluationReport") -> str:
    """Every mean with its 95 % interval, the unedited model's beside it."""
    import pandas as pd

    rows = {}
    for name, after in report.summary.items():
        if not name.startswith("before."):
            before = report.summary.get(f"before.{name}")
            rows[name] = {"before": before and before.mean, **vars(after)}
    for name, value in (report.harmonic | dict(report.values)).items():
        rows[name] = {"mean": value}
    table = pd.DataFrame.from_dict(rows, orient="index").astype({"n": "Int64"})
    counts = [f"{n} {name.replace('_', ' ')}" for name, n in report.counts.items()]
    parts = [_table(earlier) for earlier in report.earlier]
    text = table.to_string(float_format="%.3f", na_rep="")
    return "\n\n".join([*parts, f"{report.mode}\n{text}\n{', '.join(counts)}"])
