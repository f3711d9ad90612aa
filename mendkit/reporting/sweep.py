"""Sweeps: a grid of settings, in which every run is the ordinary report in a folder of its own.

    grid:                      every combination is a run; a list of such mappings gives several grids
      config: [configs/gpt2.yaml, configs/smollm2-135m.yaml]
      rank: [64, 256]          whatever `report` takes as key=value: hyperparameters and notebook parameters
    executor: local            or slurm (submitit), or the address of a Dask scheduler, tcp://host:8786
    workers: 4                 runs at once, at most; what runs here is also bounded by cores and free memory
    cores: 2                   of one run
    memory: 4GB                of one run
    slurm: {timeout_min: 240}  further parameters, as submitit names them

A run is a process, `python -m mendkit report …`, so nothing that happens in it can stop the others; what it said is in
`<run>.log`. Its folder's name ends in a key over all that decides its numbers (settings, package, notebooks, data,
archive, model, versions): where that folder holds a finished report, the run is not repeated. Other machines must see
the same files under the same paths.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil

from ..errors import MendkitError
from ..hparams import to_bytes
from ..runs import clock, provenance, write_json
from ..strict_yaml import read_yaml
from .notebook import Failure, run_notebook
from .report import Plan, data_of, default_notebooks, draft_report, export

logger = logging.getLogger(__name__)

SWEEP, COMPARE = "sweep.json", "08_compare_runs"
ELSEWHERE = ("cache_dir", "disk_cache_bytes", "cache_bytes", "results_dir", "logger")
"""Hyperparameters that change no result."""
POLL_SECONDS, ANSWER_SECONDS = 0.2, 10  # between looks at runs; for a scheduler to answer
CLUSTER = "slurm"  # submitit's name of it


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says; `memory` in bytes."""

    grid: tuple[Mapping[str, Any], ...]  # the settings of every run
    executor: str = "local"
    workers: int | None = None
    cores: int = 2
    memory: int = 4_000_000_000
    slurm: Mapping[str, Any] | None = None


@dataclass
class Run:
    """One run of a sweep, before and after."""

    name: str  # of its folder in the sweep's
    values: dict[str, Any]  # the grid's settings
    command: list[str]
    status: str = "waiting"  # done, failed
    error: str = ""


@runtime_checkable
class Future(Protocol):
    """What executors promise; `result()` is the exit status of a command, or raises."""

    def done(self) -> bool: ...
    def result(self) -> Any: ...


Start = Callable[[Sequence[Sequence[str]]], Sequence[Future]]


# ---------------------------------------------------------------------------------------------------- checking


def read_sweep(path: str | Path, /) -> Sweep:
    """Read a sweep's file. Raises MendkitError naming file and key, HyperParamError for what is not YAML."""
    given, _ = read_yaml(Path(path))
    checks: dict[str, tuple[Callable[[Any], Any], str]] = {
        "grid": (
            _combinations,
            "a mapping of settings to lists of values, or a list of such mappings",
        ),
        "executor": (
            _executor_name,
            "local, slurm, or the address of a Dask scheduler such as tcp://host:8786",
        ),
        **dict.fromkeys(("workers", "cores"), (_count, "an integer of at least 1")),
        "memory": (to_bytes, "bytes, or text such as 4GB"),
        "slurm": (dict, "a mapping of submitit's parameters, such as {slurm_partition: gpu}"),
    }
    values = {}
    for key, value in given.items():
        if key not in checks:
            raise MendkitError(f"{path}: unknown key {key!r}; expected {', '.join(checks)}")
        check, expected = checks[key]
        try:
            values[key] = check(value)
        except (AttributeError, LookupError, TypeError, ValueError):
            raise MendkitError(f"{path}: {key} must be {expected}, got {value!r}") from None
    if "grid" not in values:
        raise MendkitError(
            f"{path}: grid is missing; add `grid: {{rank: [64, 256]}}` with the settings to vary"
        )
    return Sweep(**values)


def _combinations(grid: Any) -> tuple[dict[str, Any], ...]:
    """Every combination of the values of each grid."""
    grids = grid if isinstance(grid, list) else [grid]
    for key, values in (item for own in grids for item in own.items()):
        if not isinstance(key, str) or not isinstance(values, list) or not values:
            raise ValueError
    if not grids or not all(grids):
        raise ValueError
    return tuple(
        dict(zip(own, values, strict=True))
        for own in grids
        for values in itertools.product(*own.values())
    )


def _executor_name(name: str) -> str:
    if name not in ("local", "slurm") and "://" not in name:
        raise ValueError
    return name


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value


def plan_sweep(
    sweep: Sweep,
    config: str | Path,
    settings: Sequence[str],
    /,
    *,
    out: Path,
    options: Sequence[str] = (),
) -> list[Run]:
    """The runs of a sweep in `out`, those done already marked so. Nothing is written, no model is loaded.
    `options` are further ones of the `report` command.

    Raises the kit's errors for unknown settings, mistyped values, runs that are alike, and a folder of something else.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / SWEEP).is_file())):
        raise MendkitError(
            f"{out} is there and holds no sweep; nothing was touched: give --out a new or empty folder"
        )
    runs: dict[str, Run] = {}
    twice = {text.partition("=")[0].strip() for text in settings} & {
        key for values in sweep.grid for key in values
    }
    if twice:
        raise MendkitError(
            f"{', '.join(sorted(twice))}: given for all runs, but the sweep's grid varies it; drop one"
        )
    for values in sweep.grid:
        own = [
            *settings,
            *(f"{key}={_text(value)}" for key, value in values.items() if key != "config"),
        ]
        plan = draft_report(values.get("config", config), own, out=out)
        words = "_".join(f"{key}-{_text(value)}" for key, value in values.items())
        name = f"{re.sub(r'[^A-Za-z0-9.+_-]+', '-', words)[:60]}-{_key(plan)[:10]}"
        if name in runs:
            raise MendkitError(
                f"two runs of the sweep are the same: {values} and {runs[name].values}; drop one"
            )
        report = [
            sys.executable,
            "-m",
            "mendkit",
            "report",
            str(plan.config),
            *own,
            "--out",
            str(out / name),
            *options,
        ]
        threads, say = (
            f"OMP_NUM_THREADS={sweep.cores}",
            ["sh", "-c", 'exec "$@" >"$0" 2>&1', str(out / f"{name}.log")],
        )
        runs[name] = Run(name, dict(values), ["env", threads, *say, *report])
        if _finished(out / name):
            runs[name].status = "done"
    return [*runs.values()]


def _text(value: Any) -> str:
    """A value as a setting has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _key(plan: Plan) -> str:
    """SHA-256 over all that decides a report's numbers."""
    archive = [plan.hparams.archive] if plan.hparams.archive else []
    names = [plan.hparams.model_name, plan.hparams.tokenizer_name or ""]
    content = {
        "hparams": {
            key: value for key, value in plan.hparams.to_dict().items() if key not in ELSEWHERE
        },
        "given": dict(plan.given),
        "files": [
            _sha256(Path(path))
            for path in (*plan.notebooks.values(), *(s for s, _ in data_of(plan)), *archive)
        ],
        "models": [_listing(Path(name)) for name in names],
        "code": _code_sha256(),
        "versions": provenance()["versions"],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    """Of a file's content; None for what is none, such as facts:train, which belongs to the package."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _listing(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a model's files: weights are too large to read for a key."""
    files = [path] if path.is_file() else sorted(path.glob("*")) if str(path) != "." else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@cache
def _code_sha256() -> str:
    """Of the package: its modules and facts."""
    files = sorted(
        path
        for kind in ("*.py", "data/facts/*.jsonl")
        for path in Path(__file__).parents[1].rglob(kind)
    )
    return hashlib.sha256(
        "".join(f"{path.name} {_sha256(path)}\n" for path in files).encode()
    ).hexdigest()


def _finished(folder: Path) -> bool:
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return run["kind"] == "report" and run["status"] == "done"
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ----------------------------------------------------------------------------------------------------- running


def run_sweep(sweep: Sweep, runs: Sequence[Run], /, *, out: Path, command: str) -> None:
    """Run what is not done yet, and note in `out`/sweep.json how each run ended. A failed one stops no other.

    Raises MendkitError if the executor cannot be had, or the folder not be written to.
    """
    todo = [run for run in runs if run.status != "done"]
    logger.info("sweep: %d runs, %d of them done already", len(runs), len(runs) - len(todo))
    began, content = (
        time.monotonic(),
        {"kind": "sweep", "command": command, **asdict(sweep), **provenance()},
    )

    def note() -> None:
        write_json(out / SWEEP, content | {"runs": [asdict(run) for run in runs]})

    with _executor(sweep, out) if todo else nullcontext() as start:
        try:
            note()
        except OSError as error:
            raise MendkitError(
                f"cannot write the sweep to {out}: {error}; name another folder with --out"
            ) from None
        pending = (
            list(zip(start([run.command for run in todo]), todo, strict=True)) if start else []
        )
        while pending:
            for future, run in [pair for pair in pending if pair[0].done()]:
                pending.remove((future, run))
                _judge(run, future, out)
                note()
                head = f"[{len(todo) - len(pending)}/{len(todo)}] {run.name}: {run.status}"
                took = clock(time.monotonic() - began)
                logger.info("%s at %s%s", head, took, f"; {run.error}" if run.error else "")
            time.sleep(POLL_SECONDS)


def summarise_sweep(out: Path, /) -> tuple[Path, Failure | None]:
    """Run the notebook that compares the runs; its page, and why it failed if it did."""
    executed, page = out / f"{COMPARE}.ipynb", out / "index.html"
    given = {"sweep": str(out), "out": str(out / COMPARE)}
    failure = run_notebook(default_notebooks() / f"{COMPARE}.ipynb", executed, given)
    return page, export(executed, page, failure)


def _judge(run: Run, future: Future, out: Path) -> None:
    """Whether a run that ended is done; else what it said last."""
    try:
        code = future.result()
    except Exception as error:  # the executor's: a worker that died, a job that was cancelled
        run.status, run.error = "failed", f"{type(error).__name__}: {error}"
        return
    if code == 0 and _finished(out / run.name):
        run.status, run.error = "done", ""
        return
    log = out / f"{run.name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    said = [line for line in lines if line.startswith("error: ")] or [
        line for line in lines if line.strip()
    ]
    run.status, run.error = (
        "failed",
        said[-1].removeprefix("error: ") if said else "it said nothing",
    )
    if code < 0:
        memory = (
            "; if the machine ran out of memory, raise `memory` or lower `workers`"
            if code == -9
            else ""
        )
        run.error = f"ended by signal {-code}{memory}; last: {run.error}"


def _executor(sweep: Sweep, out: Path) -> AbstractContextManager[Start]:
    if sweep.executor == "local":
        return _local(local_workers(sweep))
    return _slurm(sweep, out) if sweep.executor == "slurm" else _dask(sweep.executor)


def local_workers(sweep: Sweep, /) -> int:
    """How many runs this machine takes at once: bounded by its cores, free memory and `workers`; at least one."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    memory = psutil.virtual_memory().available
    count = max(1, min(sweep.workers or cores, cores // sweep.cores, memory // sweep.memory))
    logger.info("at once: %d, with %d cores and %.1f GB of memory free", count, cores, memory / 1e9)
    return count


@contextmanager
def _local(workers: int) -> Iterator[Start]:
    """Processes of this machine. An interrupt is passed on to each once, and all are waited for."""
    children: set[subprocess.Popen] = set()

    def call(command: Sequence[str]) -> int:
        with subprocess.Popen(command, start_new_session=True) as child:
            children.add(child)
            return child.wait()

    with ThreadPoolExecutor(workers) as pool:
        try:
            yield lambda commands: [pool.submit(call, command) for command in commands]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.send_signal(signal.SIGINT)
            raise


def _elsewhere() -> Callable[[Sequence[str]], int]:
    """What a worker on another machine calls; it needs nothing but Python to do so."""
    return partial(subprocess.call, cwd=str(Path.cwd()))


@contextmanager
def _slurm(sweep: Sweep, out: Path) -> Iterator[Start]:
    """One array of Slurm jobs; an interrupt cancels them."""
    jobs: list[Any] = []
    try:
        import submitit

        executor = submitit.AutoExecutor(folder=out / "slurm", cluster=CLUSTER)
        executor.update_parameters(
            name="mendkit", cpus_per_task=sweep.cores, mem_gb=sweep.memory / 1e9,
            slurm_array_parallelism=sweep.workers or len(sweep.grid), **(sweep.slurm or {}),
        )  # fmt: skip
    except ImportError as error:
        raise MendkitError(
            f"{error}; slurm needs `pip install -c constraints.txt -e '.[slurm]'`"
        ) from None
    except (
        RuntimeError,
        NameError,
        TypeError,
        ValueError,
    ) as error:  # submitit's: no Slurm here, a wrong parameter
        raise MendkitError(f"executor: slurm cannot be used: {error}") from None

    def start(commands: Sequence[Sequence[str]]) -> Sequence[Future]:
        jobs.extend(executor.map_array(_elsewhere(), commands))
        return jobs

    try:
        yield start
    except BaseException:
        for job in jobs:
            job.cancel()
        raise


@contextmanager
def _dask(address: str) -> Iterator[Start]:
    """A Dask cluster that runs already: a run for every thread of its workers. An interrupt drops what waits there."""
    try:
        from distributed import Client

        client = Client(address, timeout=ANSWER_SECONDS)
    except ImportError as error:
        raise MendkitError(
            f"{error}; Dask needs `pip install -c constraints.txt -e '.[dask]'`"
        ) from None
    except (OSError, ValueError) as error:
        raise MendkitError(
            f"executor: no Dask scheduler answers at {address} ({error}); start one"
        ) from None
    with client:
        yield lambda commands: client.map(_elsewhere(), commands, pure=False)
