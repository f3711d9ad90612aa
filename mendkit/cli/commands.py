"""What each command of the command line does (`__main__.py` has their options).

Results go to stdout, progress and messages to stderr. What can be wrong is looked at before anything is written, and
nothing is overwritten unasked.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..baselines.base import fact_in_context
from ..baselines.tuning import running_text, tune
from ..cost.bench import bench_table, run_bench
from ..cost.plan import check_memory, fitting, in_words, plan, plan_table
from ..cost.ways import QUICK, Settings
from ..data.examples import EditExample
from ..data.files import read_examples, read_questions, read_text, with_unrelated
from ..errors import MendkitError
from ..evaluation.evaluate import evaluate
from ..evaluation.many import Editor
from ..evaluation.prepare import EvaluationSet
from ..evaluation.results import EvaluationReport
from ..hparams import MENDHyperParams, parse_overrides
from ..interop.conformance import conformance, conformance_table, reference_folders
from ..interop.foreign import export_archive, import_archive, read_foreign
from ..mend.archive import inspect_archive, load_archive
from ..mend.batches import usable
from ..mend.checkpoint import FILE as CHECKPOINT_FILE
from ..mend.distributed import Team
from ..mend.editor import MENDEditor
from ..mend.export import ADAPTER_FILES
from ..mend.files import damage_named
from ..mend.loggers import check_logger
from ..mend.training import TrainingResult, finished, train
from ..models.base import BaseModel
from ..models.checkpoints import choose_device, silence_transformers
from ..models.listing import list_layers, table
from ..models.load import load_for_training, load_model
from ..reporting.notebook import Failure
from ..reporting.report import ARCHIVE, default_config
from ..reporting.sweep import plan_sweep, read_runs, read_sweep, run_sweep, sweep_results
from ..runs import free_memory, open_run, peak_memory_gb, write_json, write_text
from .edit_command import before_and_after, in_full, read_stream, shown, write_files, write_report

logger = logging.getLogger("mendkit")

MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
DEFAULT_K = 25


def _say(text: str) -> None:
    encoding = (
        sys.stdout.encoding or "utf-8"
    )  # which may lack some characters, and UTF-8 lacks half surrogate pairs
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def do_train(args: argparse.Namespace) -> int:
    """Train and write the archive."""
    if args.resume and args.overwrite:
        args.parser.error("--resume goes on with what --overwrite would remove; give one of them")
    hparams = _hparams(args)
    check_logger(hparams.logger)
    team = Team(hparams.device)
    logger.setLevel(logging.ERROR if team.rank else logging.INFO)
    out = args.out or Path(hparams.results_dir) / "train"
    with team.alone_in(out):
        return _train_alone(args, hparams, out, team=team)


def _train_alone(
    args: argparse.Namespace, hparams: MENDHyperParams, out: Path, /, *, team: Team
) -> int:
    old = team.first(lambda: _earlier_training(args, out))
    examples = read_examples(
        args.train_data, limit=args.train_limit, skip_invalid=args.skip_invalid
    )
    validation = read_examples(
        args.validation_data, limit=args.validation_limit, skip_invalid=args.skip_invalid
    )
    result = None
    if not args.skip_invalid:  # else only the model says which examples it is
        result = _ended(args, hparams, examples, validation, out, team=team)
    if result is None:
        result, examples = _trained(args, hparams, examples, validation, out, old=old, team=team)
    team.leave()
    if team.rank:
        return 0
    logger.info("%s", result.stopped)
    scores = {
        name.replace("val.", "validation."): v for name, v in result.best.items() if "val." in name
    }
    values = {
        "seconds": result.seconds,
        "best_step": result.best["step"],
        "stopped": result.stopped,
    }
    values |= {
        "skipped": result.skipped,
        "examples": len(examples),
        "peak_memory_gb": peak_memory_gb(),
    }
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
    return _existing(
        out, (ARCHIVE, "results.json"), False
    )  # a run without checkpoint is begun anew


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
    result = (
        team.first(lambda: finished(hparams, examples, validation, run_dir=out))
        if args.resume
        else None
    )
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
    logger.info(
        "training on %d examples, validating on %d, in %s", len(examples), len(validation), out
    )
    return train(
        hparams, examples, validation, base=base, run_dir=out, done_with_base=True
    ), examples


def do_edit(args: argparse.Namespace) -> int:
    """Make edits and show what the model writes before and after."""
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
        edit, new = before_and_after(
            editor, group, strength=args.strength, max_new_tokens=args.max_new_tokens
        )
        rows += new
        if args.save_report:
            tables += in_full(editor, edit, group, max_new_tokens=args.max_new_tokens)
        if not args.json:
            _say("\n".join(map(shown, new)))
    if args.json:
        _say(json.dumps(rows, indent=1, ensure_ascii=False))
    results = {
        "edit.free_exact": sum(row["success"] for row in rows) / len(rows),
        "edit.free_exact.n": len(rows),
    }
    results |= {"edit.skipped": len(examples.skipped)} if args.skip_invalid else {}
    results |= write_files(
        edit,
        merged=args.save_merged,
        adapter=args.save_adapter,
        rank=args.adapter_rank,
        saved=args.save_edit,
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
        raise MendkitError(
            f"--save-merged and --save-adapter are both {model}; give each a folder of its own"
        )
    _existing(model, MODEL_FILES, args.overwrite, "--save-merged")
    _existing(adapter, ADAPTER_FILES, args.overwrite, "--save-adapter")
    for option, path in (("--save-edit", file), ("--save-report", args.save_report)):
        if path and path.is_dir():
            raise MendkitError(f"{path} is a folder; give {option} a file")
        if path:
            _existing(path.parent, (path.name,), args.overwrite, option)
    for option, folder, others in (
        ("--save-merged", model, ADAPTER_FILES),
        ("--save-adapter", adapter, MODEL_FILES),
    ):
        if folder and any((folder / name).exists() for name in others):
            raise MendkitError(
                f"{folder}: transformers reads a model and an adapter there as one; give another {option}"
            )
    given = {"--save-merged": model, "--save-adapter": adapter, "--save-edit": file}
    return [option for option, path in given.items() if path]


def do_evaluate(args: argparse.Namespace) -> int:
    """Score an archive's edits, or a baseline's."""
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
    editor, tuning = (
        (mend, {}) if args.editor in ("mend", "context") else _tuned(args, base, h, mend)
    )
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
    results = (
        report.to_dict()
        | tuning
        | {"seconds": time.perf_counter() - start, "peak_memory_gb": peak_memory_gb()}
    )
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
    results = tuned.to_dict() | {"tuning.edits": len(on.to_edit)}
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


def do_inspect(args: argparse.Namespace) -> int:
    """Print what an archive says of itself."""
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


def do_sites(args: argparse.Namespace) -> int:
    """List what can be edited in a model."""
    first = args.words[0] if args.words else ""
    if not first or "=" in first or Path(first).suffix in (".yaml", ".yml"):
        hparams = _hparams(args)
    else:
        hparams = MENDHyperParams(model_name=first).replace(**parse_overrides(args.words[1:]))
    listing = list_layers(hparams)
    _say(
        json.dumps(asdict(listing), indent=1) if args.json else table(listing, everything=args.all)
    )
    return 0


def do_plan(args: argparse.Namespace) -> int:
    """Predict the memory of every phase."""
    hparams = _hparams(args)
    examples = read_examples(
        args.train_data, limit=args.train_limit, skip_invalid=args.skip_invalid
    )
    validation = read_examples(
        args.validation_data, limit=args.validation_limit, skip_invalid=args.skip_invalid
    )
    found = plan(hparams, examples, validation)
    values, lines = found.to_dict(), [plan_table(found)]
    budget = args.memory or free_memory(choose_device(hparams.device))
    if found.needed > budget:
        settings, other = fitting(hparams, examples, validation, budget=budget)
        values |= {"settings": settings, "with_settings": {"needed": other.needed}}
        fits = "fits" if other.needed <= budget else "still does not fit"
        lines.append(
            f"\nmore than {budget / 1e9:.1f} GB; with {in_words(settings)} it {fits}:\n"
            f"{plan_table(other)}"
        )
    _say(json.dumps(values, indent=1) if args.json else "\n".join(lines))
    return 0


def do_import(args: argparse.Namespace) -> int:
    """Turn a foreign archive into one of this kit."""
    _existing(args.out, (ARCHIVE, "results.json"), args.overwrite)
    hparams = _hparams(args)
    read_foreign(args.archive)  # before the model is loaded, which may take long
    return _written(args, import_archive(args.archive, hparams, out=args.out / ARCHIVE))


def do_export(args: argparse.Namespace) -> int:
    """Write an archive as the file that EasyEdit reads."""
    _existing(args.out, ("archive.pt", "results.json"), args.overwrite)
    hparams = _hparams(args)
    inspect_archive(args.archive)
    return _written(
        args, export_archive(args.archive, args.out / "archive.pt", base=load_model(hparams))
    )


def _written(args: argparse.Namespace, path: Path) -> int:
    results = {f"{args.name}.archive": str(path), f"{args.name}.from": str(args.archive)}
    write_json(args.out / "results.json", results)
    _say(json.dumps(results, indent=1) if args.json else str(path))
    return 0


def do_conformance(args: argparse.Namespace) -> int:
    """Compare with recorded numbers; 1 if one missed."""
    old = _existing(args.out, ("results.json",), args.overwrite)
    with silence_transformers():
        folders = [folder for given in args.folders for folder in reference_folders(given)]
        results = {str(folder): conformance(folder) for folder in folders}
    rows = [
        asdict(c) | {"folder": f, "verdict": c.verdict or "ok"}
        for f, checks in results.items()
        for c in checks
    ]
    rows = [
        {k: v if v == v and v != math.inf else None for k, v in row.items()} for row in rows
    ]  # JSON has neither
    missed = sum(not check.passed for checks in results.values() for check in checks)
    if args.out:
        _open(args.out, old)
        summary = {
            "conformance.comparisons": len(rows),
            "conformance.missed": missed,
            "conformance.rows": rows,
        }
        write_json(args.out / "results.json", summary)
    named = {Path(folder).resolve().name: checks for folder, checks in results.items()}
    _say(
        json.dumps(rows, indent=1)
        if args.json
        else conformance_table(named if len(named) == len(results) else results)
    )
    return 1 if missed else 0


def do_bench(args: argparse.Namespace) -> int:
    """Measure what training and editing cost; 1 if the ways are not equal."""
    old = _existing(args.out, ("run.json", "results.json"), args.overwrite)
    given = {"batch": args.batch, "rank": args.rank, "repeats": args.repeats}
    own = (QUICK if args.quick else {}) | {
        name: value for name, value in given.items() if value is not None
    }
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
        from ..reporting.plots import charts_of_costs
    except ImportError as error:
        raise MendkitError(
            f"{error}; figures need more packages: leave out --out, or see pyproject.toml"
        ) from error
    return charts_of_costs


def do_report(args: argparse.Namespace) -> int:
    """Run the notebooks, or a sweep of such runs."""
    config, settings = _config(args.words)
    out = args.out or Path("runs/sweep" if args.sweep else "runs/report")
    if args.sweep:
        return _sweep(args, config, settings, out)
    from ..cost.plan import check_memory
    from ..reporting.report import check_report, plan_report, run_report

    plan = plan_report(config, settings, out=out)
    data = check_report(plan)
    check_logger(plan.hparams.logger)
    if plan.hparams.archive is not None:
        inspect_archive(plan.hparams.archive)
    elif not args.ignore_memory:
        check_memory(plan.hparams, *data[:2], keep_trunk=True)
    report = run_report(plan, command=args.command, cell_seconds=args.cell_timeout)
    _say(json.dumps(dict(report.results), indent=1) if args.json else str(report.index))
    return _failed(report.failure, out)


def _sweep(args: argparse.Namespace, config: Path, settings: Sequence[str], out: Path) -> int:
    sweep = read_sweep(args.sweep)
    options = ["--ignore-memory"] if args.ignore_memory else []
    options += ["--cell-timeout", str(args.cell_timeout)] if args.cell_timeout else []
    runs = plan_sweep(sweep, config, settings, out=out, options=options)
    index, failure = run_sweep(sweep, runs, out=out, command=args.command)
    _say(json.dumps(sweep_results(read_runs(out)), indent=1) if args.json else str(index))
    for run in (run for run in runs if run.status == "failed"):
        sys.stderr.write(f"error: {run.folder.name}: {run.error}\n")
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
    out: Path | None,
    names: Sequence[str],
    overwrite: bool,
    option: str = "--out",
    *,
    more: str = "",
) -> list[Path]:
    """Files of an earlier run that this one would overwrite; refused unless asked for. `more`: another remedy."""
    if out is None:
        return []
    if out.exists() and not out.is_dir():
        raise MendkitError(f"{out} is a file; give {option} a folder")
    found = [out / name for name in names if (out / name).exists()]
    if found and not overwrite:
        held = ", ".join(path.name for path in found)
        raise MendkitError(
            f"{out} holds {held} of an earlier run; give another {option},{more} or --overwrite"
        )
    return found


def _open(out: Path, old: Sequence[Path]) -> None:
    """Make the folder and remove the earlier run's files, so that none is mistaken for this run's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in old:
            path.unlink()
    except OSError as error:
        raise MendkitError(f"cannot write to {out}: {error}; give another --out") from None
