"""The commands `train`, `plan`, `report`, `notebooks` and `bench`."""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

import mendkit

from ..errors import MendkitError
from ..runs import kit_files, make_folder, user_path, write_text
from . import app as cli
from .app import Data, IgnoreMemory, Json, Limit, Out, Overwrite, SkipInvalid, Words, logger

if TYPE_CHECKING:
    from ..data.examples import EditExample
    from ..mend.archive import TrainingResult
    from ..reporting.report import ReportPlan

Resume = Annotated[bool, Option("--resume", help="go on with the stopped run in --out")]
GRID = "YAML with a `grid` of settings"
SweepFile = Annotated[Path | None, Option(metavar="FILE", parser=user_path, help=GRID)]
Seconds = Annotated[int | None, Option(min=1, metavar="S", help="fail if a cell takes longer")]
Models = Annotated[str, Option(metavar="A,B", help="models, or YAML files")]
Count = Annotated[int, Option(min=1, metavar="N")]


@cli.command("train configs/smollm2-135m.yaml max_iters=500 --out runs/first")
def train(
    words: Words = None,
    *,
    resume: Resume = False,
    ignore_memory: IgnoreMemory = False,
    train_data: Data = "facts:train",
    train_limit: Limit = None,
    validation_data: Data = "facts:validation",
    validation_limit: Limit = None,
    skip_invalid: SkipInvalid = False,
    out: Out = None,
    overwrite: Overwrite = False,
) -> int:
    """Train a hypernetwork and print the path of its archive.

    `archive: null` starts anew; a path goes on training from that archive. Without --out the run
    is written to <results_dir>/train.
    """
    from ..cost.plan import check_memory
    from ..mend.archive import Checkpoint, look_at_archive
    from ..mend.batches import usable
    from ..mend.distributed import Team
    from ..mend.training import check_logger
    from ..models.load import load_for_training

    hparams = cli.hyperparameters(words)
    check_logger(hparams.logger)
    run = out or Path(hparams.results_dir, "train")
    team = Team(hparams.device)
    logger.setLevel(logging.ERROR if team.rank else logging.INFO)
    with team.alone_in(run):
        # 1. What can be wrong is looked at before anything is written.
        place = team.first(lambda: _place(run, resume=resume, overwrite=overwrite))
        read = partial(mendkit.read_examples, skip_invalid=skip_invalid, columns=hparams.columns)
        examples: Sequence[EditExample] = read(train_data, limit=train_limit)
        validation: Sequence[EditExample] = read(validation_data, limit=validation_limit)
        if not ignore_memory:
            team.first(lambda: check_memory(hparams, examples, validation))
        if hparams.archive is not None:
            look_at_archive(hparams, to_train=True)
        base = load_for_training(hparams)
        if hparams.archive is not None:
            mendkit.load_archive(hparams.archive, base=base)
        if skip_invalid:  # only the tokenizer can tell which are too long
            examples = usable(base, hparams, examples)
            validation = usable(base, hparams, validation)
        # 2. Training, unless the run has ended already.
        known = Checkpoint(run, hparams, examples, validation)
        result = team.first(known.read) if resume else None
        if result is None or result.stopped is None:
            team.first(lambda: place.clear(keep=hparams.archive))
            sources = len(examples), train_data, len(validation), validation_data
            logger.info("training on %d examples of %s, validating on %d of %s", *sources)
            logger.info("run folder: %s", run)
            go = partial(mendkit.train, base=base, run_dir=run, done_with_base=True)
            result = go(hparams, examples, validation)
        else:
            logger.info("the run in %s has ended; nothing is left to do", run)
    team.leave()
    if team.rank == 0:
        logger.info("%s", result.stopped)
        place.write({"train.examples": len(examples), **_results(result)})
        cli.say(str(result.archive))
    return 0


def _place(run: Path, *, resume: bool, overwrite: bool) -> cli.RunFolder:
    """The run's folder. Raises MendkitError if it holds a run that was not to be replaced."""
    if resume and overwrite:
        raise MendkitError("--resume needs the files that --overwrite removes; give one of them")
    stopped = (run / "checkpoint.safetensors").exists()
    names = ["archive.safetensors", "results.json"]
    if resume:
        # A stopped run goes on. Without a checkpoint the run starts anew, and replaces no result.
        return cli.RunFolder(run, *([] if stopped else names), overwrite=False)
    if stopped and not overwrite:
        raise MendkitError(
            f"{run} holds an earlier run; give another --out, --resume to go on with it, "
            "or --overwrite"
        )
    names += ["history.jsonl", "run.json", "checkpoint.safetensors"]
    return cli.RunFolder(run, *names, overwrite=overwrite)


def _results(result: "TrainingResult") -> dict[str, Any]:
    from ..runs import peak_memory_gb

    results = {
        "seconds": result.seconds,
        "best_step": result.best["step"],
        "stopped": result.stopped,
        "skipped": result.skipped,
        "peak_memory_gb": peak_memory_gb(),
        **result.cache,
    }
    for name, value in result.best.items():
        if name.startswith("val."):
            results[name.replace("val.", "validation.")] = value
    return {f"train.{name}": value for name, value in results.items()}


@cli.command("plan configs/llama-7b.yaml stream_trunk=true")
def plan(
    words: Words = None,
    *,
    train_data: Data = "facts:train",
    train_limit: Limit = None,
    validation_data: Data = "facts:validation",
    validation_limit: Limit = None,
    as_json: Json = False,
) -> int:
    """Predict the memory of every phase of training before anything is loaded."""
    from ..cost.plan import plan as predict
    from ..cost.plan import plan_table

    hparams = cli.hyperparameters(words)
    read = partial(mendkit.read_examples, columns=hparams.columns)
    examples = read(train_data, limit=train_limit)
    validation = read(validation_data, limit=validation_limit)
    found = predict(hparams, examples, validation)
    cli.show(found.to_dict(), plan_table(found), as_json=as_json)
    return 0


@cli.command("report max_iters=500 test_limit=50 --out runs/quick")
def report(
    context: typer.Context,
    words: Words = None,
    *,
    sweep: SweepFile = None,
    cell_timeout: Seconds = None,
    ignore_memory: IgnoreMemory = False,
    out: Out = None,
    as_json: Json = False,
) -> int:
    """Run the notebooks, and write index.html over their results.

    `archive: null` trains, then edits; a path only edits. Settings are hyperparameters, or
    parameters of the notebooks (test_limit=50). --sweep runs the report once for every combination
    of a grid (docs/QUESTIONS.md). Without --out it is written to runs/report, or runs/sweep.
    """
    from ..reporting.report import plan_report, run_report
    from ..reporting.sweep import plan_sweep, read_runs, read_sweep, run_sweep, sweep_results

    config, settings = cli.configuration(words)
    folder = out or Path("runs/sweep" if sweep else "runs/report")
    status = 0
    if sweep:
        options = ["--ignore-memory"] if ignore_memory else []
        if cell_timeout:
            options += ["--cell-timeout", str(cell_timeout)]
        grid = read_sweep(sweep)
        runs = plan_sweep(grid, config, settings, out=folder, options=options)
        index, failure = run_sweep(grid, runs, out=folder, command=context.obj)
        results = sweep_results(read_runs(folder))
        for run in runs:
            if run.status == "failed":
                sys.stderr.write(f"error: {run.folder.name}: {run.error}\n")
                status = 1
    else:
        plan = plan_report(config, settings, out=folder)
        _check_report(plan, ignore_memory=ignore_memory)
        done = run_report(plan, command=context.obj, cell_seconds=cell_timeout)
        index, failure, results = done.index, done.failure, dict(done.results)
    cli.show(results, str(index), as_json=as_json)
    if failure is None:
        return status
    sys.stderr.write(f"error: {failure.where}: {failure.error}\n")
    page = folder / f"{failure.notebook}.html"
    sys.stderr.write(f"what it did is in {page}; nothing after it was run\n")
    return 130 if failure.interrupted else 1


def _check_report(plan: "ReportPlan", *, ignore_memory: bool) -> None:
    """Look at all that can be wrong before a kernel starts."""
    from ..cost.plan import check_memory
    from ..mend.archive import look_at_archive
    from ..mend.training import check_logger
    from ..reporting.report import check_report

    data = check_report(plan)
    check_logger(plan.hparams.logger)
    if plan.hparams.archive is not None:
        look_at_archive(plan.hparams)
    elif not ignore_memory:
        check_memory(plan.hparams, *data[:2], keep_trunk=True)


@cli.command("notebooks mine")
def notebooks(
    folder: Annotated[Path, Argument(metavar="DIR", parser=user_path)],
    *,
    overwrite: Overwrite = False,
) -> int:
    """Copy the kit's notebooks and configurations into DIR, to be run there and changed.

    In DIR, `jupyter lab` and `report` use these files instead of the kit's.
    """
    held = kit_files()
    if not held:
        raise MendkitError("this installation has no notebooks; install mendkit from its wheel")
    for name in held:
        if (folder / name).exists() and not overwrite:
            raise MendkitError(f"{folder} holds {name}; give another folder, or --overwrite")
    for name, file in held.items():
        make_folder((folder / name).parent)
        write_text(folder / name, file.read_text(encoding="utf-8"))
    cli.say(str(folder / "notebooks"))
    return 0


@cli.command("bench --models smollm2-135m --out runs/bench")
def bench(
    *,
    models: Models = "smollm2-135m,gpt2-xl-shape",
    repeats: Count = 3,
    batch: Count = 16,
    rank: Count = 1920,
    out: Out = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> int:
    """Measure what training and editing cost, against a textbook MEND on the same model.

    --repeats turns make steps of --batch edits, with a hypernetwork of --rank. Both models take
    12 minutes, 14 GB and 2 cores. The exit status is 1 if the textbook and the kit do not agree.
    """
    from ..cost.bench import bench_table, run_bench
    from ..reporting.plots import charts_of_costs
    from ..runs import open_run

    place = cli.RunFolder(out, "run.json", "results.json", overwrite=overwrite)
    if out:
        place.clear()
        open_run(out)
    results = run_bench(models.split(","), batch=batch, rank=rank, repeats=repeats)
    place.write(results)
    if out:
        for chart in charts_of_costs(results):
            chart.save(out / "figures")
    cli.show(results, bench_table(results), as_json=as_json)
    return int(not all(found["equal"] for found in results.values()))
