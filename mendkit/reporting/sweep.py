"""Sweeps: a grid of settings, in which every run is the ordinary report, and what they came to.

A sweep's file (docs/QUESTIONS.md) has a `grid` and says where its runs are executed. Each run is a
process of its own. Its folder's name ends in a key over all that decides its numbers, and a
finished run is not repeated. Other machines must see the same files under the same paths.
"""

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import psutil
from pandas.io.formats.style import Styler
from pydantic import BaseModel, Field, ValidationError

from ..errors import MendkitError
from ..evaluation.results import HEADLINE, EvaluationReport, Summary
from ..hparams import Bytes, CountFrom1
from ..runs import locked, provenance, sha256, user_path, write_json
from ..strict_yaml import read_yaml
from . import tables
from .notebook import Failure, run_notebook
from .report import ReportPlan, default_notebook, plan_report, read_json

logger = logging.getLogger(__name__)

KIT_FOLDER = Path(__file__).parents[1]
SWEEP, COMPARE = "sweep.json", "08_compare_runs"
ANSWER_SECONDS = 10  # for a scheduler to answer
CLUSTER = "slurm"  # submitit's name of it
NO_RESULT = ("cache_dir", "disk_cache_bytes", "cache_bytes", "results_dir", "logger")

Grid = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]


class Sweep(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a sweep's file says."""

    grid: Grid  # settings and lists of their values
    executor: str = Field("local", pattern="^(local|slurm|.+://.+)$")  # or a Dask scheduler
    workers: CountFrom1 | None = None  # runs at once, at most
    cores: CountFrom1 = 2  # of one run
    memory: Bytes = 4_000_000_000  # of one run
    slurm: dict[str, Any] = {}  # further parameters, as submitit names them


@dataclass(eq=False)
class SweepRun:
    """A run of a sweep: what was varied and how it ended."""

    number: int  # from 1
    folder: Path
    values: Mapping[str, Any]  # the grid's settings
    command: Sequence[str]
    status: str = "waiting"  # done, failed
    error: str = ""

    @property
    def results(self) -> dict[str, Any]:
        """Its flat results; empty if it did not end well."""
        return read_json(self.folder / "results.json") if self.status == "done" else {}

    @property
    def summary(self) -> Summary:
        """Means of the trained editor with their intervals."""
        return Summary.from_dict(self.results, "single.")

    @property
    def report(self) -> EvaluationReport:
        """The rows of its edits. Raises MendkitError if it has none."""
        return EvaluationReport.load(self.folder)

    @property
    def score(self) -> float | None:
        """Harmonic mean of the four headline shares."""
        return self.results.get("single.score.headline")

    @property
    def title(self) -> str:
        """Its number and what was varied, in words."""
        varied = [f"{key} {_setting(value)}" for key, value in self.values.items()]
        return f"Run {self.number} ({', '.join(varied)})"


def _setting(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


# ----------------------------------------------------------------------------------------- planning


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep's file. Raises MendkitError naming file, key and what was expected."""
    given, _ = read_yaml(Path(path))
    try:
        return Sweep(**given)
    except ValidationError as error:
        fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    key = ".".join(map(str, fault["loc"]))
    known = ", ".join(Sweep.model_fields)
    raise MendkitError(f"{path}: {key}: {fault['msg']}; a sweep has {known}")


def plan_sweep(
    sweep: Sweep,
    config: str | Path,
    settings: Sequence[str],
    *,
    out: Path,
    options: Sequence[str] = (),
) -> list[SweepRun]:
    """The runs of a sweep in `out`, those done already marked so; nothing is written.

    `options` are further ones of the `report` command. Raises the kit's errors for settings that
    are unknown, mistyped or given twice, for equal runs, and for a folder of something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / SWEEP).is_file():
        raise MendkitError(f"{out} holds no sweep; nothing was touched: give --out a new folder")
    runs: dict[Path, SweepRun] = {}
    for combination in itertools.product(*sweep.grid.values()):
        values = dict(zip(sweep.grid, combination, strict=True))
        varied = {key: _setting(value) for key, value in values.items()}
        words = re.sub(r"[^A-Za-z0-9.+_-]+", "-", "_".join(map("-".join, varied.items())))
        file = varied.pop("config", str(config))
        given = [*settings, *map("=".join, varied.items())]
        folder = out / f"{words[:60]}-{_report_key(plan_report(file, given, out=out))[:10]}"
        if folder in runs:
            raise MendkitError(f"two runs of the sweep are the same: {values}; drop one")
        command = ["report", file, *given, "--out", str(folder), *options]
        status = "done" if _is_finished(folder) else "waiting"
        runs[folder] = SweepRun(len(runs) + 1, folder, values, command, status)
    return list(runs.values())


def _report_key(plan: ReportPlan) -> str:
    """SHA-256 over all that decides a report's numbers; of files their sizes and times."""
    hparams = {key: v for key, v in plan.hparams.to_dict().items() if key not in NO_RESULT}
    paths: list[str | Path] = [KIT_FOLDER, *map(default_notebook, plan.notebooks)]
    paths += [source for source, _ in plan.data()]
    names = [plan.archive, hparams["model_name"], hparams["tokenizer_name"]]
    paths += [name for name in names if name]
    content = [hparams, dict(plan.given), provenance()["versions"]]
    for path in map(user_path, paths):
        for file in sorted([path, *path.rglob("*")]):
            if file.is_file() and file.suffix != ".pyc":
                content.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return sha256(json.dumps(content, sort_keys=True))


def _is_finished(folder: Path) -> bool:
    run = read_json(folder / "run.json")
    return run.get("kind") == "report" and run.get("status") == "done"


# ------------------------------------------------------------------------------------------ running


def run_sweep(
    sweep: Sweep, runs: Sequence[SweepRun], *, out: Path, command: str
) -> tuple[Path, Failure | None]:
    """Run what waits, then the notebook that compares; its page, and why it failed if it did.

    `out`/sweep.json says how each run ended; a failed one stops no other. Raises MendkitError if
    the executor cannot be had, or the folder is in use.
    """
    about = {"kind": "sweep", "command": command, **sweep.model_dump(), **provenance()}

    def note() -> None:
        rows = [asdict(run) | {"folder": run.folder.name} for run in runs]
        write_json(out / SWEEP, about | {"runs": rows})

    waiting = [run for run in runs if run.status != "done"]
    with ExitStack() as stack:
        remote = _remote(sweep, out, stack) if waiting else None
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            note()
            for run in _as_they_end(sweep, waiting, remote):
                note()
                logger.info("%s: %s %s", run.title, run.status, run.error)
            page, given = out / "index.html", {"sweep": str(out), "out": str(out / COMPARE)}
            notebook, executed = default_notebook(COMPARE), out / f"{COMPARE}.ipynb"
            return page, run_notebook(notebook, executed, given, page=page)


def _as_they_end(sweep: Sweep, runs: Sequence[SweepRun], remote: Any) -> Iterator[SweepRun]:
    """Start runs, here or on what `remote` submits to; yield each one when it has ended."""
    jobs = []

    def work(run: SweepRun) -> tuple[str, str]:
        task = (run.command, run.folder, sweep.cores, os.getcwd())
        if remote is None:
            return run_row(*task)
        jobs.append(remote.submit(run_row, *task))
        return jobs[-1].result()

    # A thread for each run that may run at once; it waits for a process, or for a job.
    workers = sweep.workers or len(runs) or 1
    with ThreadPoolExecutor(workers if remote else local_workers(sweep)) as threads:
        futures = {threads.submit(work, run): run for run in runs}
        try:
            for future in as_completed(futures):
                run = futures[future]
                try:
                    run.status, run.error = future.result()
                except Exception as error:  # a worker that died, a job that was cancelled
                    run.status, run.error = "failed", f"{type(error).__name__}: {error}"
                yield run
        except BaseException:
            # An interrupt cancels what waits and ends what runs, once.
            threads.shutdown(wait=False, cancel_futures=True)
            for job in jobs:
                job.cancel()
            for child in psutil.Process().children() if remote is None else ():
                child.send_signal(signal.SIGINT)
            raise


def run_row(command: Sequence[str], folder: Path, cores: int, cwd: str) -> tuple[str, str]:
    """Run a report as a process of its own: its status, and its error if it failed.

    What it says is in a log beside its folder.
    """
    log = folder.with_name(f"{folder.name}.log")
    with log.open("wb") as file:
        code = subprocess.run(
            [sys.executable, "-m", "mendkit", *command],
            stdout=file,
            stderr=file,
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": str(cores)},
            start_new_session=True,  # a terminal's interrupt reaches it once, from `_as_they_end`
        ).returncode
    if code == 0 and _is_finished(folder):
        return "done", ""
    said = log.read_text(encoding="utf-8", errors="replace").strip() or "it said nothing"
    errors = re.findall("^error: (.*)", said, re.MULTILINE) or [said.splitlines()[-1]]
    killed = f"ended by signal {-code} (9: did memory run out?); last: " if code < 0 else ""
    return "failed", killed + errors[-1]


def _remote(sweep: Sweep, out: Path, stack: ExitStack) -> Any:
    """Slurm's or Dask's executor; None for this machine."""
    try:
        if sweep.executor == "slurm":
            import submitit

            executor = submitit.AutoExecutor(folder=out / "slurm", cluster=CLUSTER)
            wanted = {"cpus_per_task": sweep.cores, "mem_gb": sweep.memory / 1e9}
            executor.update_parameters(name="mendkit", **wanted | sweep.slurm)
            return executor
        if sweep.executor != "local":
            from distributed import Client

            client = stack.enter_context(Client(sweep.executor, timeout=ANSWER_SECONDS))
            return client.get_executor(pure=False)
    except Exception as error:  # not installed, a wrong parameter, nobody answers
        raise MendkitError(f"executor: {sweep.executor} cannot be used: {error}") from None
    return None


def local_workers(sweep: Sweep) -> int:
    """How many runs this machine takes at once, by cores, free memory and `workers`; at least 1."""
    cores = len(psutil.Process().cpu_affinity()) if psutil.LINUX else psutil.cpu_count()
    memory = psutil.virtual_memory().available
    return max(1, min(sweep.workers or cores, cores // sweep.cores, memory // sweep.memory))


# ---------------------------------------------------------------------------------------- comparing


def read_runs(folder: str | Path) -> list[SweepRun]:
    """The runs of the sweep in a folder. Raises MendkitError if it holds none, or an old one."""
    rows = read_json(user_path(folder) / SWEEP).get("runs")
    if rows is None:
        raise MendkitError(f"{folder} holds no sweep; run `mendkit report CONFIG --sweep FILE`")
    try:
        return [SweepRun(**row | {"folder": user_path(folder) / row["folder"]}) for row in rows]
    except (KeyError, TypeError):
        raise MendkitError(f"{folder}/{SWEEP} is of another version; run the sweep again") from None


def runs_frame(runs: Sequence[SweepRun]) -> pd.DataFrame:
    """A row a run: its settings, status, error, headline shares with intervals, score and cost."""
    records = []
    for run in runs:
        results, summary = run.results, run.summary
        record: dict[str, Any] = {"run": run.number}
        record |= {key: _setting(value) for key, value in run.values.items()}
        record |= {"status": run.status, "error": run.error, "score": run.score}
        record |= {role: summary.get(name) for role, name in HEADLINE.items()}
        record["edit, known facts"] = summary.get(f"known.{HEADLINE['edit']}")
        record["edit, unknown facts"] = summary.get(f"unknown.{HEADLINE['edit']}")
        record["seconds"] = results.get("report.seconds")
        record["training seconds"] = results.get("train.seconds")
        record["peak memory in GB"] = results.get("report.peak_memory_gb")
        records.append(record)
    return pd.DataFrame(records).set_index("run")


def runs_table(runs: Sequence[SweepRun]) -> Styler:
    """`runs_frame` with a link to each run's page, as seen from the sweep's folder."""
    pages = [tables.escape(run.folder.name) for run in runs]
    links = [f'<a href="{page}/index.html">page</a>' for page in pages]
    return tables.table(runs_frame(runs).assign(page=links), {"page": "{}"})


def sweep_results(runs: Sequence[SweepRun]) -> dict[str, Any]:
    """Flat numbers of the comparison, for results.json."""
    ended = [run.status for run in runs]
    results: dict[str, Any] = {
        f"sweep.{status}": ended.count(status) for status in ("done", "failed", "waiting")
    }
    for run in runs:
        values = {"settings": run.values, "status": run.status, "score": run.score}
        values |= {name: interval.mean for name, interval in run.summary.items()}
        values |= {"error": run.error or None}
        for name, value in values.items():
            if value is not None:
                results[f"sweep.run_{run.number}.{name}"] = value
    scores = {run.number: run.score for run in runs if run.score is not None}
    if scores:
        results["sweep.best"] = max(scores, key=scores.__getitem__)
    return results
