"""Sweeps: which runs there are, that each is the ordinary report, and that a failure stays its own.

Runs are real processes, on stub notebooks as in test_report.py; the notebook that compares them is the real one.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

import nbformat
import pytest

import mendkit.reporting.sweep as module
from mendkit.__main__ import main
from mendkit.errors import MendkitError
from mendkit.reporting.compare import read_runs
from mendkit.reporting.findings import HEADLINE
from mendkit.reporting.report import EDIT
from mendkit.reporting.sweep import (
    COMPARE,
    SWEEP,
    Run,
    Sweep,
    local_workers,
    plan_sweep,
    read_sweep,
    run_sweep,
)
from tests.reporting.test_report import archive, here, model_folder, read, write_notebooks

__all__ = ["archive", "here", "model_folder"]  # fixtures

ROOT = Path(__file__).parents[2]
SHARES = "four = dict.fromkeys({names}, 0.5) | {{'single.locality.argmax_agreement': 1 / shown}}"
WRITE = """parts = {n + p: v for n, m in four.items() for p, v in (('', m), ('.low', m), ('.high', m), ('.n', 8))}
(folder / 'results.json').write_text(json.dumps(parts))"""
FAIL = "if shown == 2 and not Path('mended').exists(): raise ValueError('<b>no</b> such thing')"


@pytest.fixture
def grid(here, archive, monkeypatch) -> Path:
    """`here` with an archive, the comparing notebook, an editing one that fails where shown=2, and a sweep of both."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    shares = SHARES.format(names=[f"single.{name}" for name in HEADLINE])
    path = write_notebooks(here / "notebooks", edit=f"{FAIL}\n{shares}") / f"{EDIT}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].source = WRITE
    nbformat.write(notebook, path)
    shutil.copy(ROOT / "notebooks" / f"{COMPARE}.ipynb", here / "notebooks")
    return write(f"grid: {{shown: [2, 4], archive: [{archive}]}}\ncores: 1\nmemory: 1MB\n")


def write(text: str) -> Path:
    path = Path("sweep.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def plan(*settings: str, config: str = "tiny.yaml", out: str = "runs") -> list[Run]:
    return plan_sweep(read_sweep("sweep.yaml"), config, settings, out=Path(out))


# ------------------------------------------------------------------------------------------------- which runs


def test_every_combination_of_every_grid_is_a_run(here):
    shutil.copy("tiny.yaml", "other.yaml")
    write(
        "grid:\n- {rank: [2, null], shown: [1, 3]}\n- {config: [other.yaml], inner_params: [[a.w, b.w]]}\n"
    )
    runs = plan("lr=1e-3")
    assert [run.values for run in runs] == [
        {"rank": 2, "shown": 1}, {"rank": 2, "shown": 3}, {"rank": None, "shown": 1}, {"rank": None, "shown": 3},
        {"config": "other.yaml", "inner_params": ["a.w", "b.w"]},
    ]  # fmt: skip
    folders = [f"runs/{run.name}" for run in runs]
    tails = [run.command[run.command.index("-m") :] for run in runs]
    report = ["-m", "mendkit", "report"]
    assert tails[2] == [
        *report,
        "tiny.yaml",
        "lr=1e-3",
        "rank=null",
        "shown=1",
        "--out",
        folders[2],
    ]
    assert tails[4] == [
        *report,
        "other.yaml",
        "lr=1e-3",
        'inner_params=["a.w", "b.w"]',
        "--out",
        folders[4],
    ]
    (run, *_) = plan_sweep(
        read_sweep("sweep.yaml"), "tiny.yaml", [], out=Path("runs"), options=["--ignore-memory"]
    )
    assert run.command[-1] == "--ignore-memory" and run.name == plan()[0].name
    assert (
        runs[0].name.startswith("rank-2_shown-1-")
        and len(set(folders)) == 5
        and not Path("runs").exists()
    )


def test_the_key_follows_all_that_decides_the_numbers_and_nothing_else(
    here, model_folder, monkeypatch
):
    Path("data.jsonl").write_text('{"prompt": "P", "target_new": "T"}\n', encoding="utf-8")
    shutil.copytree(model_folder, "model")
    write("grid: {test_data: [data.jsonl], model_name: [model]}")

    def name(*settings: str) -> str:
        return plan(*settings)[0].name

    names = [name(), name("lr=2e-3"), name("max_new_tokens=7")]
    assert name("cache_dir=elsewhere", "cache_bytes=1GB", "results_dir=r") == names[0] == name()
    Path("data.jsonl").write_text('{"prompt": "P", "target_new": "U"}\n', encoding="utf-8")
    names.append(name())
    write_notebooks(Path("notebooks"), edit="1 + 1")
    names.append(name())
    os.utime("model/model.safetensors", (1, 1))
    names.append(name())
    monkeypatch.setattr(module, "_code_sha256", lambda: "other code")
    names.append(name())
    assert len(set(names)) == len(names)


MISTAKES = {
    "rank: [1]": r"sweep.yaml: unknown key 'rank'; expected grid, executor",
    "cores: 1": "grid is missing",
    "grid: {rank: 4}": "grid must be a mapping of settings to lists",
    "grid: {rank: []}": "grid must be",
    "grid: []": "grid must be",
    "grid: {rank: [1]}\nworkers: 0": "workers must be an integer of at least 1, got 0",
    "grid: {rank: [1]}\nmemory: much": "memory must be bytes",
    "grid: {rank: [1]}\nexecutor: cloud": "executor must be local, slurm, or the address",
    "grid: {rank: [1]}\nslurm: 3": "slurm must be a mapping",
    "grid: {raank: [1]}": "unknown key 'raank'.*'rank'",
    "grid: {rank: [1, many]}": "rank must be an integer",
    "grid: {rank: [1, 1]}": "two runs of the sweep are the same",
    "grid: {lr: [1e-3]}": "lr: given for all runs, but the sweep's grid varies it",
    "grid: {rank: [1]}\nexecutor: tcp://127.0.0.1:9": "no Dask scheduler answers at tcp|needs `pip",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_found_before_anything_is_written(here, capsys, monkeypatch, text):
    monkeypatch.setattr(module, "ANSWER_SECONDS", 1)
    write(text)
    before = sorted(here.rglob("*"))
    assert main(["report", "tiny.yaml", "lr=1e-4", "--sweep", "sweep.yaml", "--out", "runs"]) == 2
    assert re.search(MISTAKES[text], capsys.readouterr().err)
    assert sorted(here.rglob("*")) == before


def test_a_folder_of_something_else_is_refused(here, capsys):
    write("grid: {rank: [1]}")
    Path("runs").mkdir()
    Path("runs/theirs").write_text("precious")
    with pytest.raises(MendkitError, match=r"runs is there and holds no sweep.*--out"):
        plan()


def test_workers_are_bounded_by_cores_memory_and_the_number_given(monkeypatch):
    free = type("Memory", (), {"available": 10_000_000_000})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(12), raising=False)
    GB = 10**9
    cases = {
        (None, 1, GB): 10,
        (None, 2, GB): 6,
        (None, 1, 3 * GB): 3,
        (2, 1, GB): 2,
        (None, 24, 99 * GB): 1,
    }
    for (workers, cores, memory), expected in cases.items():
        assert local_workers(Sweep((), workers=workers, cores=cores, memory=memory)) == expected


# -------------------------------------------------------------------------------------------------- running


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_what_is_done_is_not_repeated(grid, capsys):
    command = ["report", "tiny.yaml", "--sweep", str(grid), "--out", "runs"]
    assert main(command) == 1
    said, err = capsys.readouterr()
    assert said == "runs/index.html\n" and "code cell 5: ValueError: <b>no</b> such thing" in err
    failed, done = read_runs("runs")
    assert (failed.status, done.status) == (
        "failed",
        "done",
    ) and "<b>no</b> such thing" in failed.error
    assert (
        read(failed.folder / "run.json")["status"] == "failed"
    )  # an ordinary report, with its page
    assert done.results["single.locality.argmax_agreement"] == 0.25 and done.score == pytest.approx(
        0.4
    )
    page = Path("runs/index.html").read_text(encoding="utf-8")
    assert (
        f'href="{done.folder.name}/index.html"' in page
        and f'href="{failed.folder.name}.log"' in page
    )
    assert "&lt;b&gt;no" in page and "<b>no</b>" not in page
    assert "0.25 <small>[0.25, 0.25], n = 8</small>" in page
    assert (done.folder / "index.html").is_file()
    figures = {path.name for path in Path("runs", COMPARE, "figures").iterdir()}
    names = ("success_against_locality", "scores_by_setting", "curves_of_runs")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "csv")}

    before = (done.folder / "run.json").stat().st_mtime_ns
    Path("mended").touch()
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["sweep.done"] == 2 and results["sweep.best"] == 1
    assert (done.folder / "run.json").stat().st_mtime_ns == before
    assert "error" not in {key.split(".")[-1] for key in results}


@pytest.mark.slow
def test_runs_go_to_a_dask_cluster(grid, archive):
    distributed = pytest.importorskip(
        "distributed", reason='needs Dask: pip install -c constraints.txt -e ".[dask]"'
    )
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        write(
            f"grid: {{shown: [4], archive: [{archive}]}}\nexecutor: {cluster.scheduler_address}\n"
        )
        run_sweep(read_sweep(grid), plan(), out=Path("runs"), command="")
        with module._dask(cluster.scheduler_address) as start, pytest.raises(FileNotFoundError):
            start([["no-such-program"]])[0].result()  # what goes wrong in a worker comes back
    (done,) = read_runs("runs")
    assert done.status == "done" and done.score == pytest.approx(0.4)
    assert read(done.folder / "run.json")["kind"] == "report"
    assert read(f"runs/{SWEEP}")["executor"].startswith("tcp://")


def test_commands_go_through_submitit(here, monkeypatch):
    pytest.importorskip(
        "submitit", reason='needs submitit: pip install -c constraints.txt -e ".[slurm]"'
    )
    monkeypatch.setattr(module, "CLUSTER", "local")
    sweep = Sweep(
        (), executor="slurm", cores=1, workers=1, slurm={"timeout_min": 5, "slurm_partition": "x"}
    )
    with module._executor(sweep, Path("out")) as start:
        jobs = start([["sh", "-c", "pwd > seen; exit 3"], ["true"]])
        assert [job.result() for job in jobs] == [3, 0]
    assert Path("seen").read_text().strip() == str(here)
    wrong = Sweep((), executor="slurm", slurm={"slurm_partitoin": "x"})
    with (
        pytest.raises(MendkitError, match=r"slurm cannot be used.*partitoin"),
        module._executor(wrong, Path("out")),
    ):
        pass


def test_a_run_that_is_killed_or_never_ran_says_so(here):
    class Ended:
        def __init__(self, code):
            self.code = code

        def done(self):
            return True

        def result(self):
            if isinstance(self.code, Exception):
                raise self.code
            return self.code

    Path("r.log").write_text("step 3\nstep 4\n\n")
    for code, error in {
        -9: "ended by signal 9; if the machine ran out of memory, raise `memory` or lower `workers`; last: step 4",
        1: "step 4",
        0: "step 4",  # it left no finished report
        KeyError("lost"): "KeyError: 'lost'",
    }.items():
        run = Run("r", {}, [])
        module._judge(run, Ended(code), Path())
        assert (run.status, run.error) == ("failed", error)


def test_an_interrupt_is_passed_on_once_and_what_waits_does_not_start(here):
    note = 'trap "echo ended >> seen; exit 130" INT; echo started >> seen; for i in $(seq 100); do sleep 0.1; done'
    with pytest.raises(KeyboardInterrupt), module._local(1) as start:
        futures = start([["sh", "-c", note]] * 3)
        deadline = time.monotonic() + 60
        while not Path("seen").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert Path("seen").read_text().split() == ["started", "ended"]
    assert futures[0].result() == 130 and futures[1].cancelled() and futures[2].cancelled()
