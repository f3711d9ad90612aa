"""Sweeps: which runs there are, that each is the ordinary report, that a failure stays its own.

Runs are real processes on stub notebooks; the notebook that compares them is the real one.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

import mendkit.reporting.sweep as module
from mendkit.__main__ import main
from mendkit.errors import MendkitError
from mendkit.evaluation.results import HEADLINE
from mendkit.reporting.sweep import (
    COMPARE,
    Sweep,
    SweepRun,
    local_workers,
    plan_sweep,
    read_runs,
    read_sweep,
    run_row,
    run_sweep,
)
from tests.oracles.notebooks import write_notebooks

ROOT = Path(__file__).parents[2]
NAMES = [f"single.{name}" for name in HEADLINE.values()]
FAIL = "if shown == 2 and not Path('mended').exists(): raise ValueError('<b>no</b> such thing')"
WRITE = f"""shares = dict.fromkeys({NAMES}, 0.5) | {{'single.locality.argmax_agreement': 1 / shown}}
parts = {{n + p: m for n, m in shares.items() for p in ('', '.low', '.high')}}
parts |= {{n + '.n': 8 for n in shares}}
parts['single.score.headline'] = 4 / (6 + shown)
(folder / 'results.json').write_text(json.dumps(parts))"""


@pytest.fixture
def grid(here, monkeypatch) -> Path:
    """`here` with the comparing notebook, an editing one that fails where shown=2, and a sweep."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    write_notebooks(here / "notebooks", edit=FAIL, last=WRITE)
    shutil.copy(ROOT / "notebooks" / f"{COMPARE}.ipynb", here / "notebooks")
    return write("grid: {shown: [2, 4]}\ncores: 1\nmemory: 1MB\n")


def write(text: str) -> Path:
    path = Path("sweep.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def plan(*settings: str, **options) -> list[SweepRun]:
    return plan_sweep(read_sweep("sweep.yaml"), "tiny.yaml", settings, out=Path("runs"), **options)


# --------------------------------------------------------------------------------------- which runs


def test_every_combination_is_a_run(here):
    shutil.copy("tiny.yaml", "other.yaml")
    write("grid: {config: [tiny.yaml, other.yaml], rank: [2, null], inner_params: [[a.w, b.w]]}")
    runs = plan("lr=1e-3", options=["--ignore-memory"])
    pairs = [(config, rank) for config in ("tiny.yaml", "other.yaml") for rank in (2, None)]
    assert [(run.values["config"], run.values["rank"]) for run in runs] == pairs
    given = ["lr=1e-3", "rank=null", 'inner_params=["a.w", "b.w"]']
    end = ["--out", str(runs[3].folder), "--ignore-memory"]
    assert runs[3].command == ["report", "other.yaml", *given, *end]
    assert runs[0].folder.name.startswith("config-tiny.yaml_rank-2_inner_params-")
    assert len({run.folder for run in runs}) == 4 and not Path("runs").exists()


def test_the_key_follows_all_that_decides_the_numbers_and_nothing_else(
    here, model_folder, monkeypatch
):
    Path("data.jsonl").write_text('{"prompt": "P", "target_new": "T"}\n', encoding="utf-8")
    shutil.copytree(model_folder, "model")
    write("grid: {test_data: [data.jsonl], model_name: [model]}")

    def name(*settings: str) -> str:
        return plan(*settings)[0].folder.name

    names = [name(), name("lr=2e-3"), name("max_new_tokens=7")]
    assert name("cache_dir=elsewhere", "cache_bytes=1GB", "results_dir=r") == names[0] == name()
    Path("data.jsonl").write_text('{"prompt": "P", "target_new": "U"}\n', encoding="utf-8")
    names.append(name())
    write_notebooks(Path("notebooks"), edit="1 + 1")
    names.append(name())
    os.utime("model/model.safetensors", (1, 1))
    names.append(name())
    Path("package").mkdir()
    monkeypatch.setattr(module, "KIT_FOLDER", Path("package"))
    names.append(name())
    assert len(set(names)) == len(names)


MISTAKES = {
    "rank: [1]": r"sweep.yaml: rank: .*; a sweep has grid, executor",
    "grid: {rank: 4}": r"grid\.rank: .* valid list",
    "grid: {rank: [1]}\nexecutor: cloud": "executor: .*local",
    "grid: {raank: [1]}": "unknown key 'raank'.*'rank'",
    "grid: {rank: [1, 1]}": "two runs of the sweep are the same",
    "grid: {lr: [1e-3]}": "lr=1e-3|lr=0.001.*each once",
    "grid: {rank: [1]}\nexecutor: tcp://127.0.0.1:9": "tcp.*cannot be used",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_found_before_anything_is_written(here, capsys, monkeypatch, text):
    monkeypatch.setattr(module, "ANSWER_SECONDS", 1)
    write(text)
    Path("theirs").mkdir()
    Path("theirs/file").write_text("precious")
    before = sorted(here.rglob("*"))
    with pytest.raises(MendkitError, match=r"theirs holds no sweep.*--out"):
        plan_sweep(Sweep(grid={"rank": [1]}), "tiny.yaml", [], out=Path("theirs"))
    assert main(["report", "tiny.yaml", "lr=1e-4", "--sweep", "sweep.yaml", "--out", "runs"]) == 2
    assert re.search(MISTAKES[text], capsys.readouterr().err)
    assert sorted(here.rglob("*")) == before


def test_workers_are_bounded_by_cores_memory_and_the_number_given(monkeypatch):
    free = type("Memory", (), {"available": 10_000_000_000})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("psutil.Process.cpu_affinity", lambda self: range(12))
    cases = {(None, 1, 1): 10, (None, 2, 1): 6, (None, 1, 3): 3, (2, 1, 1): 2, (None, 24, 99): 1}
    for (workers, cores, gigabytes), expected in cases.items():
        sweep = Sweep(grid={"rank": [1]}, workers=workers, cores=cores, memory=gigabytes * 10**9)
        assert local_workers(sweep) == expected


# ------------------------------------------------------------------------------------------ running


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_what_is_done_is_not_repeated(grid, capsys):
    command = ["report", "tiny.yaml", "--ignore-memory"]
    options = ["--sweep", str(grid), "--out", "runs"]
    assert main([*command, *options]) == 1
    said, err = capsys.readouterr()
    assert said == "runs/index.html\n" and "code cell 5: ValueError: <b>no</b> such thing" in err
    failed, done = read_runs("runs")
    assert (failed.status, done.status) == ("failed", "done")
    assert "<b>no</b> such thing" in failed.error
    # a failed run is an ordinary report, too, with its page
    assert json.loads((failed.folder / "run.json").read_text())["status"] == "failed"
    assert done.summary["locality.argmax_agreement"].mean == 0.25
    assert done.score == 0.4
    page = Path("runs/index.html").read_text(encoding="utf-8")
    for run in (done, failed):
        assert f'href="{run.folder.name}/index.html"' in page
    assert "&lt;b&gt;no" in page and "<b>no</b>" not in page and "0.250 [0.250, 0.250]" in page

    before = (done.folder / "run.json").stat().st_mtime_ns
    Path("mended").touch()
    assert main([*command, *options, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["sweep.done"] == 2 and results["sweep.best"] == 1
    assert (done.folder / "run.json").stat().st_mtime_ns == before
    assert "error" not in {key.split(".")[-1] for key in results}


def stub_of_run_row(command, folder, cores, cwd):
    """In a worker of Dask or submitit: what reached it, as a row."""
    if folder.name.startswith("shown-3"):
        raise FileNotFoundError("no such program")
    return "done", f"{command[-1]} {cores} {cwd == os.getcwd()}"


def test_runs_go_to_a_dask_cluster(grid, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="needs `pip install -e '.[dask]'`")
    monkeypatch.setattr(module, "run_row", stub_of_run_row)
    monkeypatch.setattr(module, "run_notebook", lambda *_, **__: None)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        write(f"grid: {{shown: [3, 4]}}\nexecutor: {cluster.scheduler_address}\n")
        run_sweep(read_sweep(grid), plan(options=["last"]), out=Path("runs"), command="")
    lost, done = read_runs("runs")  # what goes wrong in a worker comes back
    assert (lost.status, lost.error) == ("failed", "FileNotFoundError: no such program")
    assert (done.status, done.error) == ("done", "last 2 True")


def test_runs_go_through_submitit(grid, monkeypatch):
    pytest.importorskip("submitit", reason="needs `pip install -e '.[slurm]'`")
    monkeypatch.setattr(module, "CLUSTER", "debug")
    monkeypatch.setattr(module, "run_row", stub_of_run_row)
    monkeypatch.setattr(module, "run_notebook", lambda *_, **__: None)
    write("grid: {shown: [4]}\nexecutor: slurm\nslurm: {timeout_min: 5, slurm_partition: x}\n")
    run_sweep(read_sweep(grid), plan(options=["last"]), out=Path("runs"), command="")
    assert [run.error for run in read_runs("runs")] == ["last 2 True"]
    wrong = Sweep(grid={"shown": [5]}, executor="slurm", slurm={"slurm_partitoin": "x"})
    with pytest.raises(MendkitError, match=r"slurm cannot be used.*partitoin"):
        run_sweep(wrong, plan(), out=Path("other"), command="")


def test_a_run_that_is_killed_or_says_nothing_is_a_row(here, monkeypatch):
    ways = {
        "import os; print('step 4'); os.kill(os.getpid(), 9)": "ended by signal 9 (9: did memory "
        "run out?); last: step 4",
        "import sys; sys.exit('error: no such model\\nbye')": "no such model",
        "pass": "it said nothing",  # and left no finished report
    }
    for code, error in ways.items():
        Path("mendkit.py").write_text(code.replace("'step 4'", "'step 4', flush=True"))
        row = run_row([], Path("run"), 1, str(here))
        assert row == ("failed", error)


def test_an_interrupt_is_passed_on_once_and_what_waits_does_not_start(here, monkeypatch):
    Path("mendkit.py").write_text(
        "import time, sys, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try: open('seen', 'a').write('started\\n'); time.sleep(60)\n"
        "except KeyboardInterrupt: open('seen', 'a').write('ended\\n'); time.sleep(0.5)\n"
    )
    sweep = Sweep(grid={"shown": [1, 2, 3]}, workers=1, memory=1)
    runs = [SweepRun(n, Path(f"run{n}"), {}, []) for n in (1, 2, 3)]

    def interrupted(futures: object) -> None:
        while not Path("seen").is_file() or not Path("seen").read_text():
            time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, runs, out=Path(), command="")
    assert Path("seen").read_text().split() == ["started", "ended"]
    assert [run.status for run in runs] == ["waiting"] * 3


def test_a_sweep_of_another_version_is_refused_in_words(tmp_path):
    (tmp_path / "sweep.json").write_text('{"runs": [{"status": "done"}]}')
    with pytest.raises(MendkitError, match="of another version; run the sweep again"):
        read_runs(tmp_path)
