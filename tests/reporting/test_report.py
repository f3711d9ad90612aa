"""Claims about the report: what is checked before a kernel starts, what remains whatever happens in one.

The notebooks are stubs that take the real ones' parameters and compute nothing; the real ones run elsewhere.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mendkit.__main__ import main
from mendkit.errors import ArchiveError, DataError, HyperParamError, MendkitError, ModelError
from mendkit.mend.archive import save_archive
from mendkit.mend.hypernetwork import MEND
from mendkit.reporting.notebook import Parameter, read_parameters, run_notebook
from mendkit.reporting.page import Html, tag, write_page
from mendkit.reporting.report import ARCHIVE, EDIT, TRAIN, plan_report, run_report
from tests.oracles.claims import hparams as mend_hparams
from tests.oracles.claims import with_statistics
from tests.oracles.tiny import save_tiny

PARAMETERS = {
    TRAIN: """config: str = "c.yaml"  # a file
overrides: list = []
train_data: str = "facts:train"
validation_data: str = "facts:validation"
train_limit: int = 0  # 0 takes all
validation_limit: int = 0
out: str = "runs/1" """,
    EDIT: """config: str = "c.yaml"
overrides: list = []
archive: str | None = None
test_data: str = "facts:test"
test_limit: int = 0
validation_limit: int = 100
max_new_tokens: int = 50
shown: int = 4
out: str = "runs/2" """,
}
IMPORTS = (
    "import json, os, sys, time\nfrom pathlib import Path\nfolder = Path(out)\nsecret_code = 1"
)
SAID = "print('said before the end')"
WRITE = {
    TRAIN: f"(folder / '{ARCHIVE}').write_bytes(b'trained now')\n"
    "values = {'train.seconds': 1.5, 'train.peak_memory_gb': 3.0, 'identity.edit_lr': 1}\n"
    "(folder / 'results.json').write_text(json.dumps(values))",
    EDIT: "names = [n for n in list(globals()) if n in "
    "'config overrides archive test_limit max_new_tokens shown out'.split()]\n"
    "seen = {n: globals()[n] for n in names} | {'python': sys.executable, 'cwd': os.getcwd()}\n"
    "(folder / 'seen.json').write_text(json.dumps(seen))\n"
    "(folder / 'figures').mkdir()\n"
    "(folder / 'figures' / 'a b.png').write_bytes(b'')\n(folder / 'figures' / 'a b.csv').write_text('x')\n"
    "name = 'single.edit_success.free_exact'\n"
    "values = {name: 0.75, name + '.n': 8, name + '.low': 0.5, name + '.high': 1.0, 'identity.edit_lr': 2}\n"
    "(folder / 'results.json').write_text(json.dumps(values | {'peak_memory_gb': 2.0}))",
}


def write_notebooks(folder: Path, **cells: str) -> Path:
    """Stub notebooks; `train=` and `edit=` put another cell before the last one."""
    folder.mkdir(exist_ok=True)
    for stem, extra in ((TRAIN, cells.get("train")), (EDIT, cells.get("edit"))):
        notebook = new_notebook(
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        )
        notebook.cells = [new_markdown_cell(f"# {stem}"), new_code_cell(PARAMETERS[stem])]
        notebook.cells[1].metadata["tags"] = ["parameters"]
        notebook.cells += [
            new_code_cell(text) for text in (IMPORTS, SAID, extra, WRITE[stem]) if text
        ]
        nbformat.write(notebook, folder / f"{stem}.ipynb")
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path, model_folder, monkeypatch) -> Path:
    """A working directory with a config and stub notebooks."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(f"model_name: {model_folder}\nrank: 4\n", encoding="utf-8")
    monkeypatch.setattr(
        "mendkit.reporting.report.check_memory", lambda *_, **__: None
    )  # takes seconds; has a test of its own
    write_notebooks(tmp_path / "notebooks")
    return tmp_path


@pytest.fixture
def archive(here, llama) -> Path:
    """A real archive for the model of `here`."""
    mend = with_statistics(llama, MEND(llama.sites, mend_hparams()))
    return save_archive("given.safetensors", llama, mend)


def report(*settings: str, out: str = "out", **options):
    return run_report(plan_report("tiny.yaml", settings, out=out), **options)


def read(path: str | Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------- running


def test_both_notebooks_run_and_what_they_leave_is_merged(here):
    done = report("lr=1e-3", "test_limit=7", "shown=2", out="out/{new}", command="make <report>")
    out = Path("out/{new}")
    assert done.failure is None and done.results == read(out / "results.json")
    name = "single.edit_success.free_exact"
    expected = {"train.seconds": 1.5, "identity.edit_lr": 2, name: 0.75, f"{name}.n": 8}
    assert done.results.items() >= expected.items()
    assert done.results["report.peak_memory_gb"] == 3.0 and done.results["report.seconds"] > 0
    seen = read(out / EDIT / "seen.json")
    assert seen == {
        "config": "tiny.yaml",
        "overrides": ["lr=1e-3"],
        "archive": str(out / TRAIN / ARCHIVE),
        "test_limit": 7,
        "max_new_tokens": 50,
        "shown": 2,
        "out": str(out / EDIT),
        "python": sys.executable,
        "cwd": str(here),
    }
    assert (out / ARCHIVE).read_bytes() == b"trained now"
    run = read(out / "run.json")
    assert run["kind"] == "report" and run["status"] == "done" and run["failure"] is None
    html = (out / f"{EDIT}.html").read_text(encoding="utf-8")
    assert "said before the end" in html and "secret_code" not in html
    assert "secret_code" in (out / f"{EDIT}.ipynb").read_text(encoding="utf-8")


def test_the_page_links_what_is_there_and_nothing_from_elsewhere(here):
    report(command="make <report>")
    page = Path("out/index.html").read_text(encoding="utf-8")
    for link in (
        f"{TRAIN}.html",
        f"{EDIT}.ipynb",
        "results.json",
        ARCHIVE,
        f"{EDIT}/figures/a%20b.csv",
    ):
        assert f'href="{link}"' in page
    assert f'src="{EDIT}/figures/a%20b.png"' in page
    assert "make &lt;report&gt;" in page and "<script" not in page and "http" not in page
    assert "0.750" in page and "[0.500, 1.000], n = 8" in page and "by definition" in page
    assert "rank: 4" in page and "seed: 42" not in page and 'class="failed"' not in page


def test_with_an_archive_only_the_second_notebook_runs(here, archive):
    done = report(f"archive={archive}", "lr=1e-3")
    assert done.failure is None and "train.seconds" not in done.results
    assert read(f"out/{EDIT}/seen.json")["archive"] == str(archive)
    assert read(f"out/{EDIT}/seen.json")["overrides"] == ["lr=1e-3"]
    assert Path("out", ARCHIVE).read_bytes() == archive.read_bytes()
    assert not Path("out", TRAIN).exists() and not Path("out", f"{TRAIN}.ipynb").exists()


FAULTS = {
    "raises": (
        "raise ValueError('<b>no</b> \\x1b[31msuch thing')",
        4,
        "ValueError: <b>no</b> such thing",
    ),
    "dies": ("os.write(2, b'last words'); os._exit(3)", 4, "DeadKernelError"),
    "hangs": ("time.sleep(600)", 4, "CellTimeoutError"),
    "exits": ("raise SystemExit(0)", 4, "it exited before its last cell"),
    "spoils the last cell": ("json = None", 5, "AttributeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_notebook_keeps_what_it_did_and_says_where(here, fault):
    cell, number, message = FAULTS[fault]
    write_notebooks(here / "notebooks", train=cell)
    number += 1  # papermill's own cell with the parameters given
    done = report(cell_seconds=4)
    assert (
        done.failure.notebook == TRAIN
        and done.failure.cell == number
        and message in done.failure.error
    )
    assert read("out/results.json")["failed"] == TRAIN == done.results["failed"]
    assert (
        read("out/run.json")["status"] == "failed"
        and read("out/run.json")["failure"]["cell"] == number
    )
    for suffix in (".ipynb", ".html"):
        assert "said before the end" in Path("out", TRAIN).with_suffix(suffix).read_text(
            encoding="utf-8"
        )
    page = Path("out/index.html").read_text(encoding="utf-8")
    assert (
        'class="failed"' in page
        and f"{TRAIN} failed, code cell {number}" in page
        and "<b>no</b>" not in page
    )
    assert not Path("out", f"{EDIT}.ipynb").exists() and not Path("out", ARCHIVE).exists()
    log = Path("out", f"{TRAIN}.log")
    assert log.is_file() == (f'href="{TRAIN}.log"' in page)
    assert fault != "dies" or log.read_bytes() == b"last words"


@pytest.mark.parametrize(
    "last",
    ["pass", "(folder / 'results.json').write_text('[1]')", "(folder / 'results.json').mkdir()"],
)
def test_an_end_without_results_is_a_failure(here, last):
    path = here / "notebooks" / f"{EDIT}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].source = last
    nbformat.write(notebook, path)
    done = report()
    assert (
        done.failure.notebook == EDIT
        and "results.json" in done.failure.error
        and done.failure.cell is None
    )
    assert done.results["train.seconds"] == 1.5 and done.results["failed"] == EDIT
    assert Path("out", ARCHIVE).is_file()


def test_training_without_an_archive_is_a_failure(here):
    cell = f"json.dump({{}}, open(folder / 'results.json', 'w'))\n(folder / '{ARCHIVE}').unlink()"
    path = here / "notebooks" / f"{TRAIN}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(new_code_cell(cell))
    nbformat.write(notebook, path)
    done = report()
    assert done.failure.notebook == TRAIN and ARCHIVE in done.failure.error
    assert not Path("out", EDIT).exists() and not Path("out", ARCHIVE).exists()


def test_the_live_line_is_passed_on(here):
    cell = "from IPython.display import Markdown, display\n"
    cell += "handle = display(Markdown('step 1'), display_id=True)\n"
    cell += "handle.update(Markdown('step 2'))\ndisplay(Markdown('a remark'))"
    write_notebooks(here / "notebooks", edit=cell)
    Path("o").mkdir()
    lines = []
    failure = run_notebook(f"notebooks/{EDIT}.ipynb", "o/x.ipynb", {"out": "o"}, show=lines.append)
    assert failure is None
    assert [line for line in lines if ":" in line] == ["cell 5/6: step 1", "cell 5/6: step 2"]
    assert lines[0] == "cell 1/6" and lines[-1] == "cell 6/6"


def test_an_interrupt_ends_kernel_and_report_which_had_its_folder_to_itself(
    here, monkeypatch, capsys
):
    write_notebooks(
        here / "notebooks", train="Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)"
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = [
        sys.executable,
        "-m",
        "mendkit",
        "report",
        "tiny.yaml",
        "--ignore-memory",
        "--out",
        "out",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("pid").is_file() or not Path("pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert main(["report", "tiny.yaml", "--out", "out"]) == 2
    assert "error: out is in use by another run" in capsys.readouterr().err
    with pytest.raises(MendkitError, match="in use by another run"):
        report()
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"error: {TRAIN}, code cell 5: interrupted" in stderr and "Traceback" not in stderr
    assert stdout.strip() == "out/index.html" and read("out/results.json")["failed"] == TRAIN
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


# ----------------------------------------------------------------------------------------------- the folder


def test_an_earlier_report_leaves_nothing_that_could_be_mistaken(here):
    report()
    Path("out/notes.txt").write_text("mine")
    write_notebooks(here / "notebooks", train="1 / 0")
    done = report()
    assert done.failure and set(done.results) == {"report.seconds", "failed"}
    left = {path.name for path in Path("out").iterdir() if path.suffix != ".log"}
    expected = {
        "notes.txt",
        "run.json",
        "results.json",
        "index.html",
        TRAIN,
        f"{TRAIN}.ipynb",
        f"{TRAIN}.html",
    }
    assert left == expected and not any(Path("out", TRAIN).iterdir())


@pytest.mark.parametrize(
    "mark", [None, "{}", "[]", '{"kind": "training", "notebooks": []}', "no JSON"]
)
def test_a_folder_of_something_else_is_refused_and_left_alone(here, mark):
    Path("out").mkdir()
    Path("out/results.json").write_text("theirs")
    if mark is not None:
        Path("out/run.json").write_text(mark)
    with pytest.raises(MendkitError, match=r"out holds files but no report.*--out"):
        report()
    assert Path("out/results.json").read_text() == "theirs" and not Path("out/index.html").exists()


def test_a_file_in_place_of_the_folder_is_refused(here):
    Path("out").write_text("theirs")
    with pytest.raises(MendkitError, match="out is a file"):
        report()
    assert Path("out").read_text() == "theirs"


def test_a_forged_mark_removes_nothing_outside(here):
    Path("out").mkdir()
    Path("precious").mkdir()
    Path("out/run.json").write_text(
        json.dumps({"kind": "report", "notebooks": ["../precious", "..", "."]})
    )
    Path("out/..data").mkdir()
    assert report().failure is None
    assert Path("precious").is_dir() and Path("tiny.yaml").is_file() and Path("out/..data").is_dir()


def test_the_archive_of_the_report_that_is_replaced(here, archive):
    report(f"archive={archive}")
    content = archive.read_bytes()
    archive.unlink()
    with pytest.raises(MendkitError, match=r"belongs to the earlier report.*--out"):
        Path("out", EDIT, ARCHIVE).write_bytes(content)
        report(f"archive=out/{EDIT}/{ARCHIVE}")
    assert Path("out/results.json").is_file()
    assert report(f"archive=out/{ARCHIVE}").failure is None  # this one is kept
    assert Path("out", ARCHIVE).read_bytes() == content
    assert read(f"out/{EDIT}/seen.json")["archive"] == f"out/{ARCHIVE}"


# ------------------------------------------------------------------------------------------------- checking

MISTAKES = {
    "tset_limit=5": (MendkitError, r"unknown name 'tset_limit'.*notebook parameter 'test_limit'"),
    "raank=5": (HyperParamError, r"unknown key 'raank'.*'rank'"),
    "max_new_tokens=0": (MendkitError, r"max_new_tokens must be an integer of at least 1, got '0'"),
    "test_limit=ten": (MendkitError, r"test_limit must be an integer of at least 0, got 'ten'"),
    "test_limit=1.5": (MendkitError, r"test_limit must be an integer"),
    "shown=": (MendkitError, r"shown must be an integer"),
    "rank=many": (HyperParamError, r"rank must be an integer"),
    "train_limit": (HyperParamError, r"expected key=value"),
    "test_data=nowhere.json": (DataError, r"nowhere.json: no such file"),
    "train_data=facts:all": (DataError, r"no such split"),
    "train_data=tiny.yaml": (DataError, r"tiny.yaml"),
    "archive=nowhere.safetensors": (ArchiveError, r"nowhere.safetensors: no such archive"),
    "archive=tiny.yaml": (ArchiveError, r"not a readable archive"),
    "model_name=/nowhere/model": (ModelError, r"no such file or folder"),
    "inner_params=[no.weight]": (MendkitError, r"no\.weight"),
    "out=elsewhere": (HyperParamError, r"unknown key 'out'"),
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_mistake_is_found_before_anything_is_written(here, setting):
    before = sorted(here.rglob("*"))
    error, message = MISTAKES[setting]
    with pytest.raises(error, match=message):
        plan_report("tiny.yaml", [setting], out="out")
    assert sorted(here.rglob("*")) == before


def test_a_name_given_twice_is_refused(here):
    with pytest.raises(MendkitError, match="shown is given twice"):
        plan_report("tiny.yaml", ["shown=2", "shown=3"], out="out")


def test_a_training_parameter_has_no_place_beside_an_archive(here, archive):
    with pytest.raises(MendkitError, match=rf"train_limit is a parameter of {TRAIN}.*archive=null"):
        plan_report("tiny.yaml", ["train_limit=5", f"archive={archive}"], out="out")


def test_the_archive_of_another_model_is_refused(here, archive, gpt2, tmp_path_factory):
    other = save_tiny(tmp_path_factory.mktemp("gpt2"), gpt2)
    with pytest.raises(ArchiveError, match="trained for another model"):
        plan_report("tiny.yaml", [f"archive={archive}", f"model_name={other}"], out="out")
    assert not Path("out").exists()


def test_memory_is_checked_for_a_model_that_stays_whole(here, archive, monkeypatch):
    def check(hparams, train, validation, *, keep_trunk):
        assert (hparams.rank, len(train), len(validation), keep_trunk) == (4, 6, 2, True)
        raise MendkitError("too much")

    monkeypatch.setattr("mendkit.reporting.report.check_memory", check)
    few = ["train_limit=6", "validation_limit=2"]
    with pytest.raises(MendkitError, match="too much"):
        plan_report("tiny.yaml", few, out="out")
    assert not Path("out").exists()
    assert plan_report("tiny.yaml", few, out="out", ignore_memory=True)
    assert plan_report("tiny.yaml", [f"archive={archive}"], out="out")  # trains nothing


def test_notebooks_that_are_none_are_refused(here):
    with pytest.raises(MendkitError, match="cannot be read"):
        plan_report("tiny.yaml", out="out", notebooks_dir="nowhere")
    path = here / "notebooks" / f"{EDIT}.ipynb"
    path.write_text("{}")
    with pytest.raises(MendkitError, match="not a notebook"):
        plan_report("tiny.yaml", out="out")
    nbformat.write(new_notebook(cells=[new_code_cell("a = 1")]), path)
    with pytest.raises(MendkitError, match="no cell tagged `parameters`"):
        plan_report("tiny.yaml", out="out")


# --------------------------------------------------------------------------------------- parameters, markup


@pytest.mark.parametrize(
    ("kinds", "text", "value"),
    [
        ("int", "12", 12),
        ("int None", "null", None),
        ("int None", "3", 3),
        ("float", "1e-3", 1e-3),
        ("float", "2", 2.0),
        ("bool", "true", True),
        ("bool", "false", False),
        ("str", "0012", "0012"),
        ("str", "null", "null"),
        ("str None", "", None),
        ("list", '[1, "a"]', [1, "a"]),
    ],
)
def test_a_value_is_read_as_its_parameter_is_typed(kinds, text, value):
    read_value = Parameter("x", frozenset(kinds.split()), None).parse(text)
    assert read_value == value and type(read_value) is type(value)


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ("int", "1.0"), ("int", "0"), ("int", "true"), ("float", "nan"), ("float", "x"), ("bool", "1"),
        ("bool", "False"), ("list", "1"), ("list", "[1"), ("str", " "), ("int None", "none at all"),
    ],
)  # fmt: skip
def test_another_value_is_refused(kinds, text):
    with pytest.raises(MendkitError, match=r"x must be .*, got"):
        Parameter("x", frozenset(kinds.split()), None).parse(text)


def test_parameters_are_read_with_their_types(tmp_path):
    source = 'a: int | None = None\nb: "str" = "x"  # why\nc: Optional[float] = 1.5\n'
    source += "d = [1]\ne: list[str] = []\nf = -1"
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    found = {
        name: (set(p.kinds), p.default) for name, p in read_parameters(tmp_path / "n.ipynb").items()
    }
    assert found == {
        "a": ({"int", "None"}, None),
        "b": ({"str"}, "x"),
        "c": ({"float", "None"}, 1.5),
        "d": ({"list"}, [1]),
        "e": ({"list"}, []),
        "f": ({"int"}, -1),
    }


def test_what_is_not_markup_is_escaped():
    assert tag("p", "<i>", tag("b", "&"), Html("&amp;"), class_='"x"') == (
        '<p class="&quot;x&quot;">&lt;i&gt;<b>&amp;</b>&amp;</p>'
    )


def test_the_page_stands_without_results(tmp_path):
    run = {
        "notebooks": [EDIT], "hparams": {"model_name": "<m>", "rank": 3}, "started": "now",
        "command": "", "config": "c", "settings": [], "versions": {"torch": None},
        "machine": {"cores": 1, "threads": 1, "processor": "p"},
        "failure": {"notebook": EDIT, "cell": None, "error": "<e>", "source": ""},
    }  # fmt: skip
    page = write_page(tmp_path, run, {"odd": float("nan"), "text": "<t>"}).read_text(
        encoding="utf-8"
    )
    assert (
        "&lt;m&gt;" in page
        and "&lt;e&gt;" in page
        and "&lt;t&gt;" in page
        and "did not run" in page
    )
    assert "<t>" not in page and "<table>" in page and "rank: 3" in page
