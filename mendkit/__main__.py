"""Command line: `python -m mendkit {train,edit,evaluate,inspect,import,export,conformance,sites,plan,bench,report}`.

Results go to stdout, progress and messages to stderr. What can be wrong is looked at before
anything is written, and nothing is overwritten unasked.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .adapter import ADAPTER_FILES
from .archive import inspect_archive, load_archive
from .baselines import fact_in_context
from .bench import bench_table, run_bench
from .checkpoints import choose_device, silence_transformers
from .compare import read_runs, sweep_results
from .conformance import conformance, conformance_table, reference_folders
from .data import EditExample
from .distributed import Team, locked, process_count
from .dryrun import Machine
from .edit_command import before_and_after, in_full, read_stream, shown, write_files, write_report
from .editor import MENDEditor
from .errors import MendkitError
from .evaluate import MODES, EvaluationReport, EvaluationSet, evaluate
from .files import damage_named
from .foreign import export_archive, import_archive, read_foreign
from .heldout import TEXT_TOKENS
from .hparams import MENDHyperParams, parse_overrides
from .listing import list_layers, table
from .loggers import check_logger
from .many import Editor
from .models import BaseModel, load_for_training, load_model
from .notebook import Failure
from .plan import PLANNED, check_memory, fitting, plan
from .plan import table as plan_table
from .readers import read_examples, read_questions, read_text, with_unrelated
from .report import ARCHIVE, default_config, plan_report, run_report
from .resume import FILE as CHECKPOINT_FILE
from .runs import free_memory, open_run, peak_memory_gb, write_json, write_text
from .sweep import plan_sweep, read_sweep, run_sweep, summarise_sweep
from .texts import usable
from .training import TrainingResult, finished, train
from .tuning import BUDGET, KINDS, running_text, tune
from .ways import MODELS, QUICK, Settings

logger = logging.getLogger("mendkit")

MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
DEFAULT_K = 25

PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
PLACE += (errno.ENOTDIR, errno.EEXIST)
"""Errors of the system that are the place's fault, which the user may mend."""

EXIT_CODES = """\
exit status: 0 all of it was done; 1 a notebook or a run of a sweep failed, a comparison missed, or an unexpected error
(with traceback); 2 a mistake in the command, its files or settings (usage, or one line `error: ...`);
130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        _top_parser().parse_args(words)  # --help and mistakes end here
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    command = COMMANDS[words[0]]
    parser = _parser(words[0], command)
    args = parser.parse_intermixed_args(words[1:])
    args.parser, args.name, args.command = parser, words[0], shlex.join(["python", "-m", "mendkit", *words])
    try:
        if process_count() > 1 and args.name != "train":
            raise MendkitError(f"{args.name} runs in one process; only `train` can be started in several")
        return command.run(args)
    except MendkitError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        if error.errno not in PLACE:
            raise
        sys.stderr.write(f"error: cannot read or write there: {error}; make room, or give another place\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _say(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # which may lack some characters, and UTF-8 lacks half surrogate pairs
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


# --------------------------------------------------------------------------------------------------- commands


def _train(args: argparse.Namespace) -> int:
    if args.resume and args.overwrite:
        args.parser.error("--resume goes on with what --overwrite would remove; give one of them")
    hparams = _hparams(args)
    check_logger(hparams.logger)
    team = Team(hparams.device)
    logger.setLevel(logging.ERROR if team.rank else logging.INFO)
    out = args.out or Path(hparams.results_dir) / "train"
    with team.alone_in(out):
        return _train_alone(args, hparams, out, team=team)


def _train_alone(args: argparse.Namespace, hparams: MENDHyperParams, out: Path, /, *, team: Team) -> int:
    old = team.first(lambda: _earlier_training(args, out))
    examples = read_examples(args.train_data, limit=args.train_limit, skip_invalid=args.skip_invalid)
    validation = read_examples(args.validation_data, limit=args.validation_limit, skip_invalid=args.skip_invalid)
    result = None
    if not args.skip_invalid:  # else only the model says which examples it is
        result = _ended(args, hparams, examples, validation, out, team=team)
    if result is None:
        result, examples = _trained(args, hparams, examples, validation, out, old=old, team=team)
    team.leave()
    if team.rank:
        return 0
    logger.info("%s", result.stopped)
    scores = {name.replace("val.", "validation."): v for name, v in result.best.items() if "val." in name}
    values = {"seconds": result.seconds, "best_step": result.best["step"], "stopped": result.stopped}
    values |= {"skipped": result.skipped, "examples": len(examples), "peak_memory_gb": peak_memory_gb()}
    results = {f"train.{name}": value for name, value in (values | result.cache | scores).items()}
    write_json(out / "results.json", results)
    _say(json.dumps(results, indent=1) if args.json else str(result.archive))
    return 0


def _earlier_training(args: argparse.Namespace, out: Path) -> list[Path]:
    """Files that this training would overwrite; refused unless asked for, or to go on with what is not finished."""
    written = (ARCHIVE, "history.jsonl", CHECKPOINT_FILE, "results.json", "run.json")
    if not args.resume:
        more = " --resume to go on with it," if (out / CHECKPOINT_FILE).exists() else ""
        return _existing(out, written, args.overwrite, more=more)
    if (out / CHECKPOINT_FILE).exists():
        return []
    return _existing(out, (ARCHIVE, "results.json"), False)  # a run without checkpoint is begun anew


def _ended(
    args: argparse.Namespace,
    hparams: MENDHyperParams,
    examples: Sequence[EditExample],
    validation: Sequence[EditExample],
    out: Path,
    /,
    *,
    team: Team,
) -> TrainingResult | None:
    """What this training came to, if it is to be resumed and has ended."""
    result = team.first(lambda: finished(hparams, examples, validation, run_dir=out)) if args.resume else None
    if result is not None:
        logger.info("%s is a run that has ended; nothing is left to do", out)
    return result


def _trained(
    args: argparse.Namespace,
    hparams: MENDHyperParams,
    examples: Sequence[EditExample],
    validation: Sequence[EditExample],
    out: Path,
    /,
    *,
    old: Sequence[Path],
    team: Team,
) -> tuple[TrainingResult, Sequence[EditExample]]:
    """Load the model and train; with the examples that were used."""
    if hparams.archive is not None:
        inspect_archive(hparams.archive)  # before the model is loaded, which may take long
    if not args.ignore_memory:
        team.first(lambda: check_memory(hparams, examples, validation))
    base = load_for_training(hparams)
    if hparams.archive is not None:
        load_archive(hparams.archive, base=base)
        old = [path for path in old if path.resolve() != Path(hparams.archive).resolve()]
    if args.skip_invalid:
        examples, validation = (usable(base, hparams, own) for own in (examples, validation))
        result = _ended(args, hparams, examples, validation, out, team=team)
        if result is not None:
            return result, examples
    team.first(lambda: _open(out, old))
    logger.info("training on %d examples, validating on %d, in %s", len(examples), len(validation), out)
    return train(hparams, examples, validation, base=base, run_dir=out, done_with_base=True), examples


def _edit(args: argparse.Namespace) -> int:
    if bool(args.data) == bool(args.prompt) or bool(args.prompt) != bool(args.target):
        args.parser.error("give --prompt and --target, or --data")
    if args.adapter_rank and not args.save_adapter:
        args.parser.error("--adapter-rank says how to write an adapter; give --save-adapter, too")
    hparams = _hparams(args)
    old = _existing(args.out, ("results.json", "rows.jsonl"), args.overwrite)
    files = _edit_files(args)
    if args.skip_invalid and args.data in (None, "-"):
        args.parser.error("--skip-invalid goes with --data FILE")
    if args.data == "-":
        examples = read_stream(sys.stdin, limit=args.limit)
    elif args.data:
        examples = read_examples(args.data, limit=args.limit, skip_invalid=args.skip_invalid)
    else:
        examples = [EditExample(prompt=args.prompt, target_new=args.target)]
    if files and len(examples) > 1 and not args.together:
        raise MendkitError(
            f"{', '.join(files)}: one edit can be written, these are {len(examples)} separate ones; "
            "give --together to make them one, or --limit 1"
        )
    editor, rows, tables = MENDEditor.from_hparams(hparams), [], []
    if args.skip_invalid:
        examples = usable(editor.base, editor.hparams, examples)
    for example in examples:
        editor.tokens(example)  # what cannot be edited is told before anything is
    for group in [examples] if args.together else [[example] for example in examples]:
        edit, new = before_and_after(editor, group, strength=args.strength, max_new_tokens=args.max_new_tokens)
        rows += new
        if args.save_report:
            tables += in_full(editor, edit, group, max_new_tokens=args.max_new_tokens)
        if not args.json:
            _say("\n".join(map(shown, new)))
    if args.json:
        _say(json.dumps(rows, indent=1, ensure_ascii=False))
    results = {"edit.free_exact": sum(row["success"] for row in rows) / len(rows), "edit.free_exact.n": len(rows)}
    results |= {"edit.skipped": len(examples.skipped)} if args.skip_invalid else {}
    results |= write_files(
        edit, merged=args.save_merged, adapter=args.save_adapter, rank=args.adapter_rank, saved=args.save_edit
    )
    if args.save_report:
        write_report(args.save_report, tables, rows, command=args.command)
    if args.out:
        _open(args.out, old)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(args.out / "rows.jsonl", lines)
        write_json(args.out / "results.json", results)
    return 0


def _edit_files(args: argparse.Namespace) -> list[str]:
    """The options that write the edit itself; refuses to write over anything unasked, or two things to one place."""
    model, adapter, file = args.save_merged, args.save_adapter, args.save_edit
    if model and adapter and model.resolve() == adapter.resolve():
        raise MendkitError(f"--save-merged and --save-adapter are both {model}; give each a folder of its own")
    _existing(model, MODEL_FILES, args.overwrite, "--save-merged")
    _existing(adapter, ADAPTER_FILES, args.overwrite, "--save-adapter")
    for option, path in (("--save-edit", file), ("--save-report", args.save_report)):
        if path and path.is_dir():
            raise MendkitError(f"{path} is a folder; give {option} a file")
        if path:
            _existing(path.parent, (path.name,), args.overwrite, option)
    for option, folder, others in (("--save-merged", model, ADAPTER_FILES), ("--save-adapter", adapter, MODEL_FILES)):
        if folder and any((folder / name).exists() for name in others):
            raise MendkitError(
                f"{folder}: transformers reads a model and an adapter there as one; give another {option}"
            )
    given = {"--save-merged": model, "--save-adapter": adapter, "--save-edit": file}
    return [option for option, path in given.items() if path]


def _evaluate(args: argparse.Namespace) -> int:
    k = args.k or (DEFAULT_K if args.mode == "batch" else None)
    if k is not None and args.mode != "batch":
        args.parser.error("--k goes with --mode batch")
    if args.editor == "context" and args.mode != "single":
        args.parser.error("--editor context edits nothing; it goes with --mode single")
    hparams = _hparams(args)
    old = _existing(args.out, ("results.json", "rows.jsonl"), args.overwrite)
    examples = read_examples(args.data, limit=args.limit, skip_invalid=args.skip_invalid)
    text = read_text(args.text) if args.text else None
    if args.unrelated:
        examples = with_unrelated(examples, read_questions(args.unrelated))
    mend = MENDEditor.from_hparams(hparams) if args.editor in ("mend", "identity") else None
    base, h = (mend.base, mend.hparams) if mend else (load_model(hparams), hparams)
    editor, tuning = (mend, {}) if args.editor in ("mend", "context") else _tuned(args, base, h, mend)
    logger.info("scoring %d edits, mode %s", len(examples), args.mode)
    start = time.perf_counter()
    on = EvaluationSet(
        base,
        h,
        examples,
        max_new_tokens=args.max_new_tokens,
        text=text,
        text_tokens=args.text_tokens,
        fluency=args.fluency,
    )
    report = evaluate(editor, on, mode=args.mode, k=k) if editor else fact_in_context(on)
    results = report.results() | tuning | {"seconds": time.perf_counter() - start, "peak_memory_gb": peak_memory_gb()}
    if args.out:
        _open(args.out, old)
        report.save_rows(args.out / "rows.jsonl")
        write_json(args.out / "results.json", results)
    _say(json.dumps(results, indent=1) if args.json else _table(report))
    return 0


def _tuned(
    args: argparse.Namespace, base: BaseModel, hparams: MENDHyperParams, mend: MENDEditor | None
) -> tuple[Editor, dict[str, Any]]:
    """A baseline at the best of its settings on single validation edits, and which it is."""
    text = read_text(args.key_text) if args.key_text else running_text(read_examples("facts:train"))
    examples = read_examples(args.tune_data, limit=args.tune_limit)
    on = EvaluationSet(base, hparams, examples, max_new_tokens=args.max_new_tokens)
    tuned = tune(args.editor, on, text=text, mend=mend)
    results = tuned.results() | {"tuning.edits": len(on.to_edit)}
    logger.info("%s: %s", tuned.editor.name, results["tuning.kept"])
    return tuned.editor, results


def _table(report: EvaluationReport) -> str:
    """Every mean with its interval, and the unedited model's beside it."""
    lines = [f"{'':34}{'before':>8}{'after':>8}  {'95 % interval':18}{'n':>5}"]
    for name, value in report.summary.items():
        if not name.startswith("before."):
            before = report.summary.get(f"before.{name}")
            old = "–" if before is None else f"{before.mean:.3f}"
            spread = f"[{value.low:.3f}, {value.high:.3f}]"
            lines.append(f"{name:34}{old:>8}{value.mean:>8.3f}  {spread:18}{value.n:>5}")
    lines += [f"{k:34}{'':8}{v:>8.3f}" for k, v in (report.harmonic | dict(report.values)).items()]
    lines.append(", ".join(f"{n} {name.replace('_', ' ')}" for name, n in report.counts.items()))
    return "\n\n".join([*map(_table, report.earlier), f"{report.mode}\n" + "\n".join(lines)])


def _inspect(args: argparse.Namespace) -> int:
    metadata = inspect_archive(args.archive)
    with damage_named(args.archive, "metadata"):
        text = json.dumps(metadata, indent=1) if args.json else _summary(args.archive, metadata)
    _say(text)
    return 0


def _summary(path: Path, metadata: dict[str, Any]) -> str:
    """An archive's metadata for people."""
    base, hparams, training = metadata["base_model"], metadata["hparams"], metadata["training"]
    defaults = MENDHyperParams(model_name=hparams["model_name"]).to_dict()
    changed = [f"{key}: {value}" for key, value in hparams.items() if value != defaults.get(key)]
    count = sum(math.prod(shape) for shape in metadata["tensors"].values())
    best = [f"{key} {value:.4g}" for key, value in training.get("best", {}).items()]
    lines = [
        f"{path}  ({metadata['format']}, {path.stat().st_size / 1e6:.1f} MB)",
        f"base model   {base['name']} ({base['class']}), SHA-256 of its edited layers {base['sites_sha256']}",
        f"transforms   {len(metadata['tensors'])} tensors, {count:,} numbers",
        f"update       sign {metadata['update_sign']:+d}; loss: {metadata['loss_reduction']}",
        f"settings     {', '.join(changed) or 'all at their default'}",
        f"training     {', '.join(best) or 'not recorded'}",
        "step size, shape and name of the edited weights",
    ]
    for site in base["sites"]:
        alpha, shape = metadata["edit_lr"][site["name"]], " × ".join(map(str, site["shape"]))
        lines.append(f"  {alpha:.2e}  {shape:12} {site['name']}")
    return "\n".join(lines)


def _sites(args: argparse.Namespace) -> int:
    first = args.words[0] if args.words else ""
    if not first or "=" in first or Path(first).suffix in (".yaml", ".yml"):
        hparams = _hparams(args)
    else:
        hparams = MENDHyperParams(model_name=first).replace(**parse_overrides(args.words[1:]))
    listing = list_layers(hparams)
    _say(json.dumps(asdict(listing), indent=1) if args.json else table(listing, everything=args.all))
    return 0


def _plan(args: argparse.Namespace) -> int:
    hparams = _hparams(args)
    examples = read_examples(args.train_data, limit=args.train_limit, skip_invalid=args.skip_invalid)
    validation = read_examples(args.validation_data, limit=args.validation_limit, skip_invalid=args.skip_invalid)
    machine = Machine.measured(PLANNED)
    own = plan(hparams, examples, validation, machine=machine)
    figures = ("peak", "needed", "training_needed", "seconds")
    values = asdict(own) | {name: getattr(own, name) for name in figures}
    lines, budget = [plan_table(own)], args.memory or free_memory(choose_device(hparams.device))
    if own.needed > budget:
        settings, other = fitting(hparams, examples, validation, budget=budget, machine=machine)
        values |= {"settings": settings, "with_settings": {name: getattr(other, name) for name in figures}}
        words = " ".join(f"{name}={str(value).lower()}" for name, value in settings.items())
        fits = "fits" if other.needed <= budget else "still does not fit"
        lines.append(f"\nmore than {budget / 1e9:.1f} GB; with {words} it {fits}:\n{plan_table(other)}")
    _say(json.dumps(values, indent=1) if args.json else "\n".join(lines))
    return 0


def _import(args: argparse.Namespace) -> int:
    _existing(args.out, (ARCHIVE, "results.json"), args.overwrite)
    hparams = _hparams(args)
    read_foreign(args.archive)  # before the model is loaded, which may take long
    return _written(args, import_archive(args.archive, hparams, out=args.out / ARCHIVE))


def _export(args: argparse.Namespace) -> int:
    _existing(args.out, ("archive.pt", "results.json"), args.overwrite)
    hparams = _hparams(args)
    inspect_archive(args.archive)
    return _written(args, export_archive(args.archive, args.out / "archive.pt", base=load_model(hparams)))


def _written(args: argparse.Namespace, path: Path) -> int:
    results = {f"{args.name}.archive": str(path), f"{args.name}.from": str(args.archive)}
    write_json(args.out / "results.json", results)
    _say(json.dumps(results, indent=1) if args.json else str(path))
    return 0


def _conformance(args: argparse.Namespace) -> int:
    old = _existing(args.out, ("results.json",), args.overwrite)
    with silence_transformers():
        folders = [folder for given in args.folders for folder in reference_folders(given)]
        results = {str(folder): conformance(folder) for folder in folders}
    rows = [asdict(c) | {"folder": f, "verdict": c.verdict or "ok"} for f, checks in results.items() for c in checks]
    rows = [{k: v if v == v and v != math.inf else None for k, v in row.items()} for row in rows]  # JSON has neither
    missed = sum(not check.passed for checks in results.values() for check in checks)
    if args.out:
        _open(args.out, old)
        summary = {"conformance.comparisons": len(rows), "conformance.missed": missed, "conformance.rows": rows}
        write_json(args.out / "results.json", summary)
    named = {Path(folder).resolve().name: checks for folder, checks in results.items()}
    _say(
        json.dumps(rows, indent=1) if args.json else conformance_table(named if len(named) == len(results) else results)
    )
    return 1 if missed else 0


def _bench(args: argparse.Namespace) -> int:
    old = _existing(args.out, ("run.json", "results.json"), args.overwrite)
    given = {"batch": args.batch, "rank": args.rank, "repeats": args.repeats}
    own = (QUICK if args.quick else {}) | {name: value for name, value in given.items() if value is not None}
    settings = [Settings(model, **own) for model in args.models.split(",")]
    draw = _charts_of_costs() if args.out else None  # before anything is measured, which takes long
    if args.out:
        _open(args.out, old)
        open_run(args.out)
    results = run_bench(settings, deep=args.depths)
    if draw:
        write_json(args.out / "results.json", results)
        for chart in draw(results):
            chart.save(args.out / "figures")
    _say(json.dumps(results, indent=1) if args.json else bench_table(results))
    return 0 if all(own["equal"] for name, own in results.items() if name != "depths") else 1


def _charts_of_costs() -> Callable[[dict[str, Any]], list[Any]]:
    try:
        from .plots import charts_of_costs
    except ImportError as error:
        raise MendkitError(f"{error}; figures need more packages: leave out --out, or see pyproject.toml") from error
    return charts_of_costs


def _report(args: argparse.Namespace) -> int:
    config, settings = _config(args.words)
    out = args.out or Path("runs/sweep" if args.sweep else "runs/report")
    with locked(out):
        if args.sweep:
            return _sweep(args, config, settings, out)
        plan = plan_report(config, settings, out=out, ignore_memory=args.ignore_memory)
        report = run_report(plan, command=args.command, cell_seconds=args.cell_timeout)
    _say(json.dumps(dict(report.results), indent=1) if args.json else str(report.index))
    return _failed(report.failure, out)


def _sweep(args: argparse.Namespace, config: Path, settings: Sequence[str], out: Path) -> int:
    sweep = read_sweep(args.sweep)
    options = ["--ignore-memory"] if args.ignore_memory else []
    options += ["--cell-timeout", str(args.cell_timeout)] if args.cell_timeout else []
    runs = plan_sweep(sweep, config, settings, out=out, options=options)
    run_sweep(sweep, runs, out=out, command=args.command)
    index, failure = summarise_sweep(out)
    _say(json.dumps(sweep_results(read_runs(out)), indent=1) if args.json else str(index))
    for run in (run for run in runs if run.status == "failed"):
        sys.stderr.write(f"error: {run.name}: {run.error}\n")
    return _failed(failure, out) or int(any(run.status == "failed" for run in runs))


def _failed(failure: Failure | None, out: Path) -> int:
    """The exit status after a notebook, which may have failed; says so."""
    if failure is None:
        return 0
    sys.stderr.write(f"error: {failure.where}: {failure.error}\n")
    sys.stderr.write(f"what it did is in {out / failure.notebook}.html; nothing after it was run\n")
    return 130 if failure.interrupted else 1


# ---------------------------------------------------------------------------------------------------- helpers


def _config(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The configuration file, given or default, and the overrides."""
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return Path(words[0]), list(words[1:])
    logger.info("configuration: %s", default_config())
    return default_config(), list(words)


def _hparams(args: argparse.Namespace) -> MENDHyperParams:
    config, settings = _config(args.words)
    return MENDHyperParams.from_hparams(config, **parse_overrides(settings))


def _existing(
    out: Path | None, names: Sequence[str], overwrite: bool, option: str = "--out", *, more: str = ""
) -> list[Path]:
    """Files of an earlier run that this one would overwrite; refused unless asked for. `more`: another remedy."""
    if out is None:
        return []
    if out.exists() and not out.is_dir():
        raise MendkitError(f"{out} is a file; give {option} a folder")
    found = [out / name for name in names if (out / name).exists()]
    if found and not overwrite:
        held = ", ".join(path.name for path in found)
        raise MendkitError(f"{out} holds {held} of an earlier run; give another {option},{more} or --overwrite")
    return found


def _open(out: Path, old: Sequence[Path]) -> None:
    """Make the folder and remove the earlier run's files, so that none is mistaken for this run's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in old:
            path.unlink()
    except OSError as error:
        raise MendkitError(f"cannot write to {out}: {error}; give another --out") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    return MENDHyperParams(model_name="any", cache_bytes=text).cache_bytes


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


# ---------------------------------------------------------------------------------------------------- parsers


def _options_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out that was stopped: same settings, same data, same archive",
    )
    _option_memory(parser)
    _options_data(parser)


def _option_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-memory", action="store_true", help="train even if it is planned to need more memory than is free"
    )


def _options_data(parser: argparse.ArgumentParser) -> None:
    for split in ("train", "validation"):
        source = f"facts:{split}"
        parser.add_argument(f"--{split}-data", default=source, metavar="FILE", help=f"default: {source}")
        parser.add_argument(f"--{split}-limit", type=_count, metavar="N", help="use the first N examples")
    _option_skip(parser)


def _option_skip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip-invalid", action="store_true", help="leave invalid records out and count them")


def _options_plan(parser: argparse.ArgumentParser) -> None:
    _options_data(parser)
    parser.add_argument("--data", dest="train_data", metavar="FILE", help="the same as --train-data")
    parser.add_argument(
        "--memory", type=_bytes, metavar="SIZE", help="propose settings that fit, such as 8GB (default: what is free)"
    )


def _options_edit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", metavar="P", help="what to edit, such as 'The capital of France is'")
    parser.add_argument("--target", metavar="T", help="how the prompt shall go on")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="examples instead, or facts:test; -: lines of JSON or prompt<TAB>target from stdin",
    )
    _option_skip(parser)
    parser.add_argument("--together", action="store_true", help="make all examples one edit (default: each alone)")
    parser.add_argument("--strength", type=_number, default=1.0, metavar="S", help="times the update (default: 1)")
    parser.add_argument("--save-adapter", type=Path, metavar="DIR", help="write the edit as a PEFT LoRA adapter")
    parser.add_argument("--adapter-rank", type=_count, metavar="N", help="its rank at most (default: the edit's own)")
    parser.add_argument("--save-merged", type=Path, metavar="DIR", help="write the edited model for transformers")
    parser.add_argument("--save-edit", type=Path, metavar="FILE", help="write the edit for `Edit.load`")
    parser.add_argument(
        "--save-report", type=Path, metavar="FILE", help="write an HTML page of before and after, other texts included"
    )
    _options_decoding(parser)


def _options_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="facts:test", metavar="FILE", help="default: facts:test")
    parser.add_argument(
        "--mode",
        default="single",
        choices=MODES,
        help="each edit on a fresh model (default), k at once, or all in a row",
    )
    parser.add_argument(
        "--k", type=_count, metavar="K", help=f"edits made at once in mode batch (default: {DEFAULT_K})"
    )
    parser.add_argument(
        "--editor",
        default="mend",
        choices=("mend", *KINDS, "context"),
        help=f"the archive's (default), or a baseline at the best of {BUDGET} settings, or the fact in the context",
    )
    parser.add_argument("--tune-data", default="facts:validation", metavar="FILE", help="edits for these settings")
    parser.add_argument("--tune-limit", type=_count, default=12, metavar="N", help="the first N of them (default: 12)")
    parser.add_argument(
        "--key-text", metavar="FILE", help="text for ROME's covariance (default: facts:train's prompts)"
    )
    parser.add_argument("--text", metavar="FILE", help="held-out text for drawdown of perplexity and accuracy (slow)")
    parser.add_argument(
        "--text-tokens", type=_count, default=TEXT_TOKENS, metavar="N", help=f"of its tokens (default: {TEXT_TOKENS})"
    )
    parser.add_argument("--fluency", action="store_true", help="entropy of 100 freely written tokens, too (slow)")
    parser.add_argument("--unrelated", metavar="FILE", help="NQ-open questions as further unrelated prompts")
    _option_skip(parser)
    _options_decoding(parser)


def _options_sites(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="attention and output layers, too (JSON has all, always)")


def _options_bench(parser: argparse.ArgumentParser) -> None:
    known = ",".join(MODELS)
    parser.add_argument("--models", default=known, metavar="A,B", help=f"of {known}, or YAML files; default: {known}")
    for name, of in (("repeats", "turns"), ("batch", "edits a step"), ("rank", "rank of the hypernetwork's blocks")):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name}", type=_count, metavar="N", help=f"{of}; default: {default}")
    parser.add_argument(
        "--depths", type=_counts, default=(), metavar="A,B", help="also measure random models of so many layers"
    )
    parser.add_argument("--quick", action="store_true", help="a trial: few repeats, a small rank, a small random model")


def _options_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sweep", metavar="FILE", help="a YAML file with a `grid` of settings to run it with; see docs/QUESTIONS.md"
    )
    parser.add_argument("--cell-timeout", type=_count, metavar="S", help="fail if a cell takes longer, in seconds")
    _option_memory(parser)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _options_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=_count, metavar="N", help="use the first N examples")
    parser.add_argument("--max-new-tokens", type=_count, default=50, metavar="N", help="default: 50")


@dataclass(frozen=True)
class _Command:
    run: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None] | None
    does: str
    example: str
    out: str = ""  # the default of --out, in words
    given: tuple[str, ...] = ("words",)  # what it takes: "archive", "words" (CONFIG and settings), "folders"


COMMANDS = {
    "train": _Command(
        _train, _options_train,
        "train a hypernetwork and print its archive's path;\n`archive: null` starts anew, a path goes on",
        "configs/smollm2-135m.yaml max_iters=500 --out runs/first",
        "<results_dir>/train",
    ),
    "edit": _Command(
        _edit, _options_edit,
        "make edits with an archive and print what the model writes before and after;\n"
        "one edit can be kept: as an adapter, as an edited model, or as a file; a page tells of all",
        "archive=runs/first/archive.safetensors --prompt 'The capital of France is' --target Lyon",
    ),
    "evaluate": _Command(
        _evaluate, _options_evaluate,
        "score an archive's edits on examples, or a baseline's",
        "archive=runs/first/archive.safetensors --limit 50 --mode sequential --out runs/scores",
    ),
    "inspect": _Command(
        _inspect, None, "print what an archive says of itself", "runs/first/archive.safetensors --json",
        given=("archive",),
    ),
    "import": _Command(
        _import, None,
        "turn an archive of the original MEND or EasyEdit into one of this kit, without\nrunning anything in it; "
        "CONFIG is its configuration (inner_params in its order)",
        "models/MEND/gpt2-xl gpt2-xl.yaml --out runs/imported", given=("archive", "words"),
    ),
    "export": _Command(
        _export, None, "write an archive of this kit as the file that EasyEdit reads",
        "runs/imported/archive.safetensors gpt2-xl.yaml --out runs/exported", given=("archive", "words"),
    ),
    "conformance": _Command(
        _conformance, None,
        "compare with numbers recorded from the published code: factors, updates, logits,\nscalars, training losses",
        "../shared/reference", given=("folders",),
    ),
    "sites": _Command(
        _sites, _options_sites,
        "list what can be edited in a model, or in the model of a configuration, and what\n"
        "`inner_params: auto` picks there; reads the model's configuration only, no weights",
        "openai-community/gpt2 --all",
    ),
    "plan": _Command(
        _plan, _options_plan,
        "predict memory and time of every phase of training, before anything is loaded: from the\n"
        "shapes of model and texts, and a short measurement of this machine",
        "configs/llama-7b.yaml --memory 8GB",
    ),
    "bench": _Command(
        _bench, _options_bench,
        "measure what training and editing cost, against a textbook MEND on the same model;\n"
        "about 12 minutes, 14 GB and 2 CPU cores for both models",
        "--models smollm2-135m --depths 12,24,48 --out runs/bench", given=(),
    ),
    "report": _Command(
        _report, _options_report,
        "run the notebooks and lay index.html over them: `archive: null` trains, then edits;\n"
        "a path only edits. Settings are hyperparameters, or the notebooks' parameters (test_limit=50).\n"
        "--sweep runs it once for every combination of a grid",
        "max_iters=500 test_limit=50 --out runs/quick",
        "runs/report, or runs/sweep",
    ),
}  # fmt: skip


WRITES = {"conformance": "", "bench": " and figures"}
"""What commands write besides results.json, where it is not rows."""

READERS = ("inspect", "plan", "sites")
"""Commands that write nothing."""


def _top_parser() -> argparse.ArgumentParser:
    indent = "\n" + " " * 14
    listing = "".join(f"\n  {name:12}{c.does.replace(chr(10), indent)}" for name, c in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m mendkit",
        usage="python -m mendkit COMMAND ...  (COMMAND --help says more)",
        description=f"Train and use MEND model editors.\n{listing}",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=[*COMMANDS], metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _parser(name: str, command: _Command) -> argparse.ArgumentParser:
    usage = {"archive": "ARCHIVE", "words": "[CONFIG] [key=value ...]", "folders": "DIR ..."}
    usage["words"] = "[MODEL|CONFIG] [key=value ...]" if name == "sites" else usage["words"]
    given = " ".join(usage[kind] for kind in command.given)
    parser = argparse.ArgumentParser(
        prog=f"python -m mendkit {name}",
        usage=f"python -m mendkit {name} {given} [options]",
        description=command.does,
        epilog=f"example:\n  python -m mendkit {name} {command.example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if "archive" in command.given:
        parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="an archive's path")
    if "folders" in command.given:
        parser.add_argument(
            "folders", type=Path, nargs="+", metavar="DIR", help="folders of reference vectors, or of such folders"
        )
    if "words" in command.given:
        words = "a YAML file (default: configs/smollm2-135m.yaml) and settings that win over it"
        words = f"a hub id, a model folder, a GGUF file, or {words}" if name == "sites" else words
        parser.add_argument("words", nargs="*", metavar="CONFIG key=value", help=words)
    if name not in READERS:
        needed = name in ("import", "export")
        writes = "the archive" if needed else "results.json" + WRITES.get(name, " and rows.jsonl")
        out = f"default: {command.out}" if command.out else f"write {writes} there"
        parser.add_argument("--out", type=Path, required=needed, metavar="DIR", help=out)
    parser.add_argument("--json", action="store_true", help="JSON on stdout and nothing else there")
    if name not in (*READERS, "report"):
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier run's files")
    if command.options is not None:
        command.options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
