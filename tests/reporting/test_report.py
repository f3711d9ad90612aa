"""The report: what is checked before a kernel starts, what remains whatever happens in one.

The notebooks are stubs that take the real ones' parameters and compute nothing.
"""

import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mendkit import runs
from mendkit.__main__ import main
from mendkit.errors import DataError, HyperParamError, MendkitError
from mendkit.evaluation.results import HEADLINE
from mendkit.places import in_the_box
from mendkit.reporting import plots
from mendkit.reporting.notebook import read_parameters, run_notebook
from mendkit.reporting.report import (
    ARCHIVE_FILE,
    EDITING,
    TRAINING,
    check_report,
    plan_report,
    run_report,
    write_index,
)
from tests.oracles.claims import EXAMPLES
from tests.oracles.notebooks import write_notebooks


def checked(*settings: str, out: str = "out"):
    plan = plan_report("tiny.yaml", settings, out=out)
    check_report(plan)
    return plan


def report(*settings: str, out: str = "out", **options):
    return run_report(checked(*settings, out=out), **options)


def read(path: str | Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ running


def test_both_notebooks_run_and_the_page_links_what_they_leave(here):
    out = Path("out/{new}")
    done = report("lr=1e-3", "test_limit=7", "shown=2", out=str(out), command="make <report>")
    assert done.failure is None and done.results == read(out / "results.json")
    name = "single.edit_success.free_exact"
    expected = {"train.seconds": 1.5, "identity.edit_lr": 2, name: 0.75, f"{name}.n": 8}
    assert done.results.items() >= expected.items()
    assert done.results["report.peak_memory_gb"] == 3.0 and done.results["report.seconds"] > 0
    assert read(out / EDITING / "seen.json") == {
        "config": "tiny.yaml",
        "overrides": ["lr=1e-3"],
        "archive": str(out / TRAINING / ARCHIVE_FILE),
        "test_limit": 7,
        "max_new_tokens": 50,
        "shown": 2,
        "out": str(out / EDITING),
        "python": sys.executable,
        "cwd": str(here),
    }
    assert (out / ARCHIVE_FILE).read_bytes() == b"trained now"
    run = read(out / "run.json")
    assert run["kind"] == "report" and run["status"] == "done" and run["failure"] is None
    shown = (out / f"{EDITING}.html").read_text(encoding="utf-8")
    assert "said before the end" in shown and "secret_code" not in shown
    assert f"<title>{EDITING}</title>" in shown and 'href="index.html"' in shown
    assert f'href="{TRAINING}.html"' in shown and ".ipynb" not in shown
    assert 'alt="It works"' in shown and "No description" not in shown
    assert "<script" not in shown  # nothing is loaded
    assert "secret_code" in (out / f"{EDITING}.ipynb").read_text(encoding="utf-8")

    page = done.index.read_text(encoding="utf-8")
    figure = f"{EDITING}/figures/a%20b.csv"
    for link in (f"{TRAINING}.html", f"{EDITING}.ipynb", ARCHIVE_FILE, figure):
        assert f'href="{link}"' in page
    assert f'src="{EDITING}/figures/a%20b.png" alt="a b"' in page
    assert "make &lt;report&gt;" in page and "<script" not in page and "http" not in page
    assert "0.750" in page and "[0.500, 1.000], n&nbsp;=&nbsp;8" in page and "by definition" in page
    assert "rank: 4" in page and "seed: 42" not in page and 'class="failed"' not in page


def test_with_an_archive_only_the_second_notebook_runs_and_a_report_may_replace_itself(here):
    done = report("archive=given.safetensors", "lr=1e-3")
    assert done.failure is None and "train.seconds" not in done.results
    seen = read(f"out/{EDITING}/seen.json")
    assert seen["archive"] == "given.safetensors" and "lr=1e-3" in seen["overrides"]
    assert not Path("out", TRAINING).exists() and not Path("out", f"{TRAINING}.ipynb").exists()
    Path("given.safetensors").unlink()
    for kept in (f"out/{ARCHIVE_FILE}", "out"):
        assert report(f"archive={kept}").failure is None
        assert Path("out", ARCHIVE_FILE).read_bytes() == b"an archive"
    Path("out", EDITING, ARCHIVE_FILE).write_bytes(b"inside")
    with pytest.raises(MendkitError, match=r"would be replaced.*--out"):
        checked(f"archive=out/{EDITING}/{ARCHIVE_FILE}")


def test_an_archive_may_be_one_of_the_kit_or_a_run_folder(here):
    Path("run").mkdir()
    Path("run", ARCHIVE_FILE).write_bytes(b"of a run")
    inside = {"run": b"of a run", "smollm2-135m": in_the_box()["smollm2-135m"].read_bytes()}
    for name, content in inside.items():
        assert report(f"archive={name}").failure is None
        assert Path("out", ARCHIVE_FILE).read_bytes() == content


FAULTS = {
    "raises": (r"raise ValueError('<b>no</b> \x1b[31msuch thing')", "ValueError: <b>no</b> such"),
    "dies": ("os.write(2, b'last words'); os._exit(3)", "DeadKernelError"),
    "hangs": ("time.sleep(600)", "CellTimeoutError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_notebook_keeps_what_it_did_and_says_where(here, fault):
    """Cells are counted with the one that papermill adds for the parameters given."""
    cell, message = FAULTS[fault]
    write_notebooks(here / "notebooks", train=cell)
    Path("out", "notes").mkdir(parents=True)
    Path("out", "run.json").write_text('{"kind": "report", "notebooks": ["../notebooks"]}')
    Path("out", EDITING).mkdir()  # of an earlier report
    done = report(cell_seconds=4)
    assert done.failure.where == f"{TRAINING}, code cell 5" and message in done.failure.error
    assert done.results == read("out/results.json") and done.results["failed"] == TRAINING
    run = read("out/run.json")
    assert run["status"] == "failed" and run["failure"]["cell"] == 5
    for suffix in (".ipynb", ".html"):
        text = Path("out", TRAINING).with_suffix(suffix).read_text(encoding="utf-8")
        assert "said before the end" in text
    page = Path("out/index.html").read_text(encoding="utf-8")
    assert 'class="failed"' in page and "<b>no</b>" not in page
    assert f"{TRAINING} failed, code cell 5" in page
    log = Path("out", f"{TRAINING}.log")
    assert log.is_file() == (f'href="{TRAINING}.log"' in page)
    assert fault != "dies" or log.read_bytes().endswith(b"last words")
    # Nothing is left that could be mistaken, and nothing is removed that is no report's.
    left = {path.name for path in Path("out").iterdir() if path.suffix != ".log"}
    written = {f"{TRAINING}{suffix}" for suffix in ("", ".ipynb", ".html")}
    written |= {"run.json", "results.json", "index.html"}
    assert left == written | {"notes"} and Path("notebooks").is_dir()


def test_an_end_without_results_or_archive_is_a_failure(here):
    write_notebooks(here / "notebooks", last="pass")
    done = report()
    assert done.failure.cell is None and "results.json" in done.failure.error
    assert done.results["train.seconds"] == 1.5 and done.results["failed"] == EDITING
    assert Path("out", ARCHIVE_FILE).is_file()


def test_the_live_line_is_passed_on(here):
    cell = "from IPython.display import Markdown, display\n"
    cell += "handle = display(Markdown('step 1'), display_id=True)\n"
    cell += "handle.update(Markdown('step 2'))\ndisplay(Markdown('a remark'))"
    write_notebooks(here / "notebooks", edit=cell)
    Path("o").mkdir()
    lines, given = [], {"out": "o"}
    paths = Path(f"notebooks/{EDITING}.ipynb"), Path("o/x.ipynb")
    assert not run_notebook(*paths, given, page=Path("o/x.html"), show=lines.append)
    assert lines == ["cell 6/7: step 1", "cell 6/7: step 2"]


def test_an_interrupt_ends_kernel_and_report_which_had_its_folder_to_itself(
    here, monkeypatch, capsys
):
    cell = "Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    write_notebooks(here / "notebooks", train=cell)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = [sys.executable, "-m", "mendkit", "report", "tiny.yaml", "--ignore-memory"]
    process = subprocess.Popen(
        [*command, "--out", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite in the background of a shell ignores this signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not Path("pid").is_file() or not Path("pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert main(["report", "tiny.yaml", "--out", "out"]) == 2
    assert "error: out is in use by another run" in capsys.readouterr().err
    with pytest.raises(MendkitError, match="in use by another run"):
        run_report(plan_report("tiny.yaml", out="out"))
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"error: {TRAINING}, code cell 5: interrupted" in stderr and "Traceback" not in stderr
    assert stdout.strip() == "out/index.html" and read("out/results.json")["failed"] == TRAINING
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


# ----------------------------------------------------------------------------------------- checking


@pytest.mark.parametrize("mark", [None, '{"kind": "training"}'])
def test_a_folder_of_something_else_is_refused_and_left_alone(here, mark):
    Path("out").mkdir()
    Path("out/results.json").write_text("theirs")
    if mark is not None:
        Path("out/run.json").write_text(mark)
    with pytest.raises(MendkitError, match=r"out holds files but no report.*--out"):
        checked()
    with pytest.raises(MendkitError, match="out holds files but no report"):
        run_report(plan_report("tiny.yaml", out="out"))
    assert Path("out/results.json").read_text() == "theirs" and not Path("out/index.html").exists()
    with pytest.raises(MendkitError, match="is a file"):
        checked(out="out/results.json")


MISTAKES = {
    "tset_limit=5": (
        MendkitError,
        r"unknown name 'tset_limit'.*notebook parameter is 'test_limit'",
    ),
    "raank=5": (HyperParamError, r"unknown key 'raank'.*'rank'"),
    "test_limit=1.5": (MendkitError, r"test_limit must be a valid integer, got '1.5'"),
    "train_data=facts:all": (DataError, r"facts:all: no such facts"),
    "shown=2 shown=3": (MendkitError, "shown is given twice"),
    "archive=given.safetensors train_limit=5": (MendkitError, rf"train_limit is of {TRAINING}"),
}


@pytest.mark.parametrize("settings", MISTAKES)
def test_a_mistake_is_found_before_anything_is_written(here, settings):
    before = sorted(here.rglob("*"))
    error, message = MISTAKES[settings]
    with pytest.raises(error, match=message):
        checked(*settings.split())
    assert sorted(here.rglob("*")) == before


def test_memory_is_checked_for_a_model_that_stays_whole(here, monkeypatch, capsys):
    def check(hparams, train, validation, *, keep_trunk):
        assert (hparams.rank, len(train), len(validation), keep_trunk) == (4, 6, 2, True)
        raise MendkitError("too much")

    monkeypatch.setattr("mendkit.cost.plan.check_memory", check)
    monkeypatch.setattr("mendkit.reporting.report.run_report", lambda *_, **__: 1 / 0)
    few = ["report", "tiny.yaml", "train_limit=6", "validation_limit=2", "--out", "out"]
    assert main(few) == 2 and "error: too much" in capsys.readouterr().err
    assert not Path("out").exists()
    with pytest.raises(ZeroDivisionError):  # it goes on
        main([*few, "--ignore-memory"])


def test_notebooks_that_are_none_are_refused(here):
    with pytest.raises(MendkitError, match="no such notebook"):
        read_parameters(Path("nowhere.ipynb"))
    with pytest.raises(MendkitError, match="not a notebook"):
        read_parameters(Path("tiny.yaml"))
    with pytest.raises(MendkitError, match="no cell tagged `parameters`"):
        read_parameters(notebook_of(new_code_cell("a = 1")))


def test_a_runs_folder_says_of_which_commit_and_data_it_is(tmp_path, monkeypatch):
    git = ["git", "-C", str(runs.CHECKOUT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    digests = []
    for name, examples in {"a": EXAMPLES, "b": list(EXAMPLES), "c": EXAMPLES[1:]}.items():
        run = read(runs.open_run(tmp_path / name, data={"test": examples}) / "run.json")
        assert run["commit"] in ((head, f"{head}-dirty") if head else (None,))
        assert run["data"]["test"]["examples"] == len(examples)
        digests.append(run["data"]["test"]["sha256"])
    assert digests[0] == digests[1] != digests[2]
    # An installed kit has no commit, even where another repository is around it.
    monkeypatch.setattr(runs, "CHECKOUT", runs.CHECKOUT / "tests")
    assert runs._commit.__wrapped__() is None


# -------------------------------------------------------------------------------- parameters, pages


def test_parameters_are_read_with_their_types(here):
    source = 'a_limit: "Optional[int]" = None\nb: str = (\n    "x"  # why\n)\n'
    source += "c = 1.5\ne: list[str] = []"
    found = read_parameters(notebook_of(new_code_cell(source, metadata={"tags": ["parameters"]})))
    assert {name: (p.annotation, p.default) for name, p in found.items()} == {
        "a_limit": (int | None, None),
        "b": (str, "x"),
        "c": (float, 1.5),
        "e": (list[str], []),
    }


def notebook_of(*cells) -> Path:
    path = Path("notebooks", f"{EDITING}.ipynb")
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(new_notebook(cells=[*cells], metadata={"kernelspec": kernel}), path)
    return path


RUN = {
    **{"notebooks": [EDITING], "command": "", "config": "c.yaml", "settings": [], "data": {}},
    **{"started": "2026-11-29T02:38:24+0000", "commit": None, "versions": {"torch": None}},
    **{"machine": {"cores": 1, "threads": 1, "processor": "p"}, "failure": None},
}


def test_a_figure_of_the_page_has_its_finding_as_text(tmp_path):
    frame = pd.DataFrame({"size": [1, 2, 3], "loss": [3, 2, 1]})
    chart = plots.scatter(frame, "size", "loss").save(tmp_path / EDITING / "figures")
    run = RUN | {"hparams": {"model_name": "m", "rank": 3, "seed": 7}}
    page = write_index(tmp_path, run, {}).read_text("utf-8")
    assert f'alt="{chart.finding}"' in page and f"<span>{chart.finding}</span>" in page


def test_the_page_stands_without_results(tmp_path):
    failure = {"notebook": EDITING, "cell": None, "error": "<e>", "source": ""}
    run = RUN | {"hparams": {"model_name": "<m>", "rank": 3, "seed": 7}}
    run |= {"commit": "abc-dirty", "failure": failure}
    page = write_index(tmp_path, run, {"odd": float("nan"), "text": "<t>"}).read_text("utf-8")
    for text in ("&lt;m&gt;", "&lt;e&gt;", "&lt;t&gt;", "did not run", "rank: 3", "2026-11-29"):
        assert text in page
    assert "<t>" not in page and "<table" in page and "abc with changes" in page


def test_the_page_tells_what_was_won_and_shows_a_known_edit_as_it_was(tmp_path):
    row = {"prompt": "p", "target_new": "it's <b>", "ground_truth": "old", "outputs": []}
    texts = [("edit", "old", "it's <b>", 1.0), ("neighbours", "Rome", "Milan", 0.5)]
    texts += [("unrelated", "tea", "tea", 1.0), ("neighbours", None, None, 0.25)]
    for role, before, after, score in texts:
        text = {"role": role, "prompt": f"{role} of it", "before": before, "after": after}
        row["outputs"].append(text | {"score": score})
    rows = [row | {"prompt": "first", "known": False}, row | {"known": True}, row]
    folder = tmp_path / EDITING
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    near, free = (f"single.{HEADLINE[role]}" for role in ("neighbours", "edit"))
    results = {"single.score.headline": 0.85, "identity.single.score.headline": 0.63}
    results |= {near: 0.9, f"{near}.n": 160, f"{near}.low": 0.85, f"{near}.high": 0.95}
    results |= {f"single.known.{HEADLINE['edit']}": 1.0, f"single.known.{HEADLINE['edit']}.n": 2}
    results |= {free: 0.75, f"{free}.n": 160, "single.edits.scored": 160}
    results |= {f"paired.{HEADLINE['neighbours']}.better": 142.0}
    results |= {f"paired.{HEADLINE['neighbours']}.worse": 1.0, "report.seconds": 1324.4}
    run = RUN | {"hparams": {"model_name": "m", "rank": 3, "seed": 7}}
    run |= {"settings": ["rank=4", "test_limit=9", "archive=x"]}
    run |= {"data": {"test": {"examples": 160, "sha256": "d1g3st"}}}
    page = write_index(tmp_path, run, results).read_text("utf-8")
    title = re.search("<h1>(.*)</h1>", page)[1]
    assert title.startswith("MEND scores 0.85 on 160 edits of m, the untrained control 0.63; neigh")
    assert "neighbours kept: 142 better, 1 worse." in page and "2026-11-29, 22 min 4 s" in page
    edit = page.partition("<h2>One edit: p … it&#39;s &lt;b&gt;</h2>")[2].partition("</table>")[0]
    ticks = re.findall("<td>([✓✗])</td>", edit)
    assert ticks == ["✓", "✗", "✓"] and "unedited model knew" in page
    known = page.partition("<h2>Facts that the unedited model knew")[2].partition("</table>")[0]
    assert "<b>1.000</b>" in known and "<small>n&nbsp;=&nbsp;2</small>" in known
    assert "160 examples, SHA-256 d1g3st" in page and "seed 7" in page
    command = re.search("<pre>(python.*)</pre>", page)[1]
    assert shlex.split(html.unescape(command)) == [
        *["python", "-m", "mendkit", "edit", "c.yaml", "rank=4"],
        f"archive={tmp_path / ARCHIVE_FILE}",
        *["--prompt", "p", "--target", "it's <b>"],
    ]
    # What a table of scores holds is not told again.
    others = page.partition("Other numbers")[2]
    assert "single.edits.scored" in others and f"{near}.low" not in others
