"""The commands `report` and `bench`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

import mendkit

from ..errors import MendkitError
from . import app as cli
from .app import IgnoreMemory, Json, Out, Overwrite, Words

if TYPE_CHECKING:
    from ..reporting.report import ReportPlan

SweepFile = Annotated[Path | None, Option(metavar="FILE", help="YAML with a `grid` of settings")]
Seconds = Annotated[int | None, Option(min=1, metavar="S", help="fail if a cell takes longer")]
Models = Annotated[str, Option(metavar="A,B", help="of these, or YAML files")]
Count = Annotated[int, Option(min=1, metavar="N")]
Depths = Annotated[str, Option(metavar="A,B", help="random models of so many layers, too")]
Quick = Annotated[bool, Option("--quick", help="a trial: small models, few repeats")]


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
    from ..mend.training import check_logger
    from ..reporting.report import check_report

    data = check_report(plan)
    check_logger(plan.hparams.logger)
    if plan.hparams.archive is not None:
        mendkit.inspect_archive(plan.hparams.archive)
    elif not ignore_memory:
        check_memory(plan.hparams, *data[:2], keep_trunk=True)


@cli.command("bench --models smollm2-135m --depths 12,24,48 --out runs/bench")
def bench(
    *,
    models: Models = "smollm2-135m,gpt2-xl-shape",
    repeats: Count = 3,
    batch: Count = 16,
    rank: Count = 1920,
    depths: Depths = "",
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> int:
    """Measure what training and editing cost, against a textbook MEND on the same model.

    It makes `repeats` turns of steps of `batch` edits with a hypernetwork of `rank`: about 12
    minutes, 14 GB and 2 cores for both models. The exit status is 1 if the textbook and the kit
    do not agree.
    """
    from ..cost.bench import bench_table, run_bench
    from ..cost.ways import QUICK, Settings
    from ..runs import open_run

    place = cli.RunFolder(out, "run.json", "results.json", overwrite=overwrite)
    sizes = QUICK if quick else {"batch": batch, "rank": rank, "repeats": repeats}
    settings = [Settings(model, **sizes) for model in models.split(",")]
    layers = _integers(depths)
    if out:
        from ..reporting.plots import charts_of_costs  # before anything is measured

        place.clear()
        open_run(out)
    results = run_bench(settings, deep=layers)
    if out:
        place.write(results)
        for chart in charts_of_costs(results):
            chart.save(out / "figures")
    cli.show(results, bench_table(results), as_json=as_json)
    measured = [found for name, found in results.items() if name != "depths"]
    return int(not all(found["equal"] for found in measured))


def _integers(text: str) -> tuple[int, ...]:
    parts = text.split(",") if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise MendkitError(f"--depths: expected numbers such as 12,24, got {text!r}")
    return tuple(int(part) for part in parts)
