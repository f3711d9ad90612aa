"""The notebooks keep to their form, and run from end to end on a tiny model."""

import ast
import csv
import fcntl
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import nbformat
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from jupyter_server.services.contents.filemanager import FileContentsManager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from nbformat import NotebookNode
from nbformat.v4 import new_output
from traitlets.config import Config

from mendkit.baselines.tuning import BUDGET
from mendkit.errors import MendkitError
from mendkit.evaluation.results import HEADLINE
from mendkit.mend.archive import inspect_archive
from mendkit.methods import METHODS
from mendkit.models.checkpoints import INSTALL
from mendkit.places import project_path
from mendkit.reporting import figures
from mendkit.reporting.figures import Chart
from mendkit.reporting.notebook import check_parameters, read_parameters
from tests.oracles.tiny import save_tiny

ROOT = Path(__file__).parents[2]
NAMES = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
FIGURES = {
    "01": {"loss_curves", "validation", "control"},
    "02": {"next_tokens", "headline", "strength", "own"},
    "03": {"ranks", "signs", "normalisers", "spectra"},
    "04": {"decoding", "editors"},
    "05": {"at_once"},
    "06": {"next_tokens"},
    "07": {"costs_of_training", "memory_of_training"},
    "08": {"success_against_locality", "own"},
    "09": {"editors"},
    "10": {"what_follows", "editors"},
}
SIZES: dict[str, dict[str, Any]] = {  # enough to run each of them
    "01": {"train_limit": 24, "validation_limit": 6},
    "02": {"test_limit": 6, "validation_limit": 4, "max_new_tokens": 8, "shown": 2},
    "03": {"examples": 5, "statistics_limit": 8, "dense": 2, "sizes": [0.001, 0.1]},
    "04": {"test_limit": 3, "validation_limit": 1, "max_new_tokens": 3, "shown": 1,
           "kinds": ["identity", "gauss_newton"]},
    "05": {"limit": 4, "at_once": [1, 2], "keys_limit": 4, "kinds": [], "max_new_tokens": 3},
    "06": {"facts": 3, "strengths": [0, 1]},
    "07": {"batch": 2, "rank": 8, "repeats": 1},
    "08": {},
    "09": {"methods": ["rledit", "ultraedit"], "train_limit": 8, "train_steps": 1,
           "validation_limit": 2, "edits": 4, "max_new_tokens": 3},
    "10": {"train_limit": 8, "train_steps": 1, "validation_limit": 2, "kinds": ["finetune"],
           "tune_limit": 1, "test_limit": 3, "max_new_tokens": 3},
}  # fmt: skip
TRAINING = ["max_iters=4", "val_interval=2", "log_interval=1", "batch_size=4", "rank=8"]


def read(name: str) -> NotebookNode:
    """A notebook without the cell that installs the kit."""
    notebook = nbformat.read(NAMES[name], as_version=4)
    assert notebook.cells.pop(1).id == "install"
    return notebook


def cells(name: str, kind: str = "code") -> list[NotebookNode]:
    return [cell for cell in read(name).cells if cell.cell_type == kind]


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


# ---- form


def test_the_one_parameters_cell_holds_annotated_literals_with_comments(name, caplog):
    notebook = read(name)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    by_code = len(tags) - tags.count(["by-code"])  # what Voilà leaves out, at the end
    assert tags[2] == ["parameters"] and not any(tags[:2] + tags[3:by_code])
    assert (by_code < len(tags)) == (name == "06")
    lines = notebook.cells[2].source.splitlines()
    found = {}
    for before, line in zip(["", *lines], lines, strict=False):
        for statement in ast.parse(line).body:
            assert isinstance(statement, ast.AnnAssign) and statement.value is not None
            ast.literal_eval(statement.value)
            found[ast.unparse(statement.target)] = ast.unparse(statement.annotation)
            assert "  # " in line or before.startswith("# "), f"no comment: {line}"
    assert set(SIZES[name]) < set(found) and "out" in found
    inferred = papermill.inspect_notebook(str(NAMES[name]))
    assert {key: value["inferred_type_name"] for key, value in inferred.items()} == found
    assert not caplog.records  # "Unable to parse line"


def test_cells_are_few_short_and_plain(name):
    """No output, definition, magic or absolute path, at most ten statements; parameters stay."""
    notebook = read(name)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3" and 15 <= len(notebook.cells) <= 34
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for place, cell in enumerate(cells(name)):
        assert (
            not cell.outputs and cell.execution_count is None and not cell.metadata.get("papermill")
        )
        nodes = list(ast.walk(ast.parse(cell.source)))  # a magic or a shell command is no Python
        texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
        assert not any(isinstance(t, str) and re.match(r"[/~\\]|[A-Za-z]:[\\/]", t) for t in texts)
        names = [node for node in nodes if isinstance(node, ast.Name)]
        assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        if place == 1:
            parameters = assigned
        if place > 1:
            assert parameters.isdisjoint(assigned)
            plain = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
            assert not any(isinstance(node, plain) for node in nodes)
            assert sum(isinstance(node, ast.stmt) for node in nodes) <= 10


def test_the_text_frames_the_code_and_claims_no_result(name):
    """A number with decimals can only be a result, and those are computed by the run."""
    texts = [cell.source for cell in cells(name, "markdown")]
    assert re.match(r"# .+\?\n", texts[0])
    for word in ("**Answer.**", "**Inputs:**", "**Outputs**", "**Run time:**", "CPU"):
        assert word in texts[0]
    assert len(texts[0].split("**Answer.**")[1].split("\n\n")[0].splitlines()) <= 3
    assert texts[-1].startswith("## Conclusion and limits")
    links = re.findall(r"\]\(([^)]+)\)", texts[-1])
    assert links and all((ROOT / "notebooks" / link).is_file() for link in links)
    assert 'write_json(folder / "results.json", ' in cells(name)[-1].source
    assert not any(re.search(r"\d\.\d", text) for text in texts)
    kinds = "".join(c.cell_type[0] for c in read(name).cells[3:])
    assert "cccc" not in kinds and "mm" not in kinds and kinds.endswith("m")


def test_the_first_code_cell_installs_the_kit_where_it_is_missing(tmp_path, monkeypatch):
    """The same cell everywhere; its commands go to a Python that writes them down."""
    paths = (ROOT / "notebooks").glob("**/*.ipynb")  # with the course
    sources = {nbformat.read(path, as_version=4).cells[1].source for path in paths}
    (source,) = sources
    assert len([line for line in source.splitlines() if line]) <= 4
    asked, python = tmp_path / "asked", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{asked}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    shell.run_cell(source).raise_error()
    assert not asked.exists()
    monkeypatch.setattr("importlib.util.find_spec", {"ipykernel": "there"}.get)
    with capture_output():
        shell.run_cell(source).raise_error()
    kit, model = asked.read_text().splitlines()
    assert kit == "-m pip install -q mendkit[notebooks]"
    assert model == INSTALL.replace("python ", "").replace("install", "install -q")


def test_a_notebook_that_lab_saves_is_what_git_has_unless_it_is_saved_elsewhere(tmp_path):
    settings = Config()
    runpy.run_path(str(ROOT / "scripts/lab.py"), {"get_config": lambda: settings})
    manager = FileContentsManager(root_dir=str(tmp_path), config=settings)
    notebook = nbformat.read(NAMES["03"], as_version=4)
    notebook.metadata.language_info.version = "3.11"
    for cell in notebook.cells:
        cell.metadata.trusted = True
        if cell.cell_type == "code":
            cell.update(outputs=[new_output("stream", text="said")], execution_count=1)
    for folder in ("runs", "notebooks"):  # the second time without outputs
        (tmp_path / folder).mkdir()
        manager.save({"type": "notebook", "content": notebook}, f"{folder}/03.ipynb")
    assert (tmp_path / "notebooks/03.ipynb").read_bytes() == NAMES["03"].read_bytes()
    assert "said" in (tmp_path / "runs/03.ipynb").read_text(encoding="utf-8")


def test_a_run_time_is_the_same_in_the_readme_and_in_the_notebook(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if f"]({NAMES[name].relative_to(ROOT)})" in line]
    (time,) = re.findall(r"(\d+) minutes?|seconds", row)
    told = cells(name, "markdown")[0].source.partition("**Run time:**")[2]
    assert f" {time or 'seconds'}" in told.partition(".")[0]


EXPLORED = {
    "02": ("relation-table", "generations", "texts", "shift", "weights"),
    "08": ("pair", "failures", "own"),
}


@pytest.mark.parametrize("name", EXPLORED)
def test_the_cells_to_be_changed_are_the_last_before_the_results_and_short(name):
    """A reader changes them, so each is at most five lines."""
    code = cells(name)
    end = [cell.id for cell in code].index("results")
    last = code[end - len(EXPLORED[name]) : end]
    assert tuple(cell.id for cell in last) == EXPLORED[name]
    assert all(len(cell.source.splitlines()) <= 5 for cell in last)


# ---- execution


def run_cells(name: str, parameters: dict[str, Any], *, to: str | None = None) -> list[Any]:
    """Run a notebook's code in this process, up to the cell `to`; what its cells showed."""
    InteractiveShell.clear_instance()
    shell, shown = InteractiveShell.instance(), []
    for cell in cells(name):
        with capture_output() as captured:
            ran = shell.run_cell(cell.source)
        ran.raise_error()
        if cell.metadata.get("tags"):
            shell.user_ns.update(parameters)
        outputs = [shell.display_formatter.format(ran.result)[0]] if ran.result is not None else []
        shown += [ran.result, *outputs, *(output.data for output in captured.outputs)]
        if cell.id == to:
            break
    return shown


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[Callable[[str], SimpleNamespace]]:
    """Runs a notebook on a tiny random model, once; gives its folder and results."""
    folder = tmp_path_factory.mktemp("notebooks")
    model, done = save_tiny(folder / "model"), dict[str, SimpleNamespace]()
    (folder / "tiny.yaml").write_text(f"model_name: {model}\n")

    def parameters(name: str) -> dict[str, Any]:
        given = {"out": str(folder / name), "overrides": [f"model_name={model}"], **SIZES[name]}
        if name == "01":
            given["overrides"] += TRAINING
        elif name == "07":
            given["models"] = [str(folder / "tiny.yaml")]
        elif name == "08":
            given["sweep"] = str(folder)
        else:
            given["archive"] = str(ran("01").out / "archive.safetensors")
        return given

    def ran(name: str) -> SimpleNamespace:
        if name not in done:
            given = parameters(name)
            shown, out = run_cells(name, given), Path(given["out"])
            results = json.loads((out / "results.json").read_text())
            files = {path.name for path in (out / "figures").iterdir()}
            assert files == {f"{stem}.{kind}" for stem in FIGURES[name] for kind in ("png", "csv")}
            pictures = [x for x in shown if isinstance(x, dict) and "image/png" in x]
            assert len(pictures) == len(FIGURES[name])
            for x in shown:
                if isinstance(x, Chart):
                    check_whole(x)
            if "archive" in given:
                told = json.loads((out / "run.json").read_text())["hparams"]
                assert str(told["archive"]) == given["archive"]
            done[name] = SimpleNamespace(out=out, results=results, shown=shown, given=given)
        return done[name]

    yield ran
    InteractiveShell.clear_instance()


def check_whole(chart: Chart) -> None:
    """Title, labels, n; all that is drawn lies within the figure."""
    figure = chart.figure
    assert "".join(figure.get_suptitle().split()) == "".join(chart.finding.split())
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    texts = [figure.legends[0].get_title().get_text()]
    texts += [tick.get_text() for ax in figure.axes for tick in ax.get_yticklabels()]
    texts += [ax.get_title(loc="left") for ax in figure.axes]
    assert chart.name in ("loss_curves", "next_tokens") or any("n = " in text for text in texts)
    with matplotlib.rc_context(fname=figures.STYLE):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.05  # inches


def drawn(run: SimpleNamespace, figure: str) -> list[dict[str, str]]:
    with (run.out / f"figures/{figure}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def assert_drawn(run: SimpleNamespace, figure: str, editors: dict[str, str], edits: int) -> None:
    """A figure has the headline results of so many edits; `editors` by the results' prefix."""
    shares = {(row["editor"], row["metric"]): float(row["mean"]) for row in drawn(run, figure)}
    for prefix, editor in editors.items():
        assert run.results[f"{prefix}.edits.scored"] == edits
        for metric in HEADLINE.values():
            assert shares[editor, metric] == run.results[f"{prefix}.{metric}"]


@pytest.mark.slow
def test_a_notebook_run_again_has_the_same_results(tiny, tmp_path):
    """Each time in a kernel of its own: in pytest's process some processors round otherwise."""
    results = []
    for name in ("once", "again"):
        papermill.execute_notebook(
            str(NAMES["01"]), str(tmp_path / f"{name}.ipynb"),
            {**tiny("01").given, "out": str(tmp_path / name)}, kernel_name="python3",
            cwd=str(ROOT), progress_bar=False,
        )  # fmt: skip
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    first, again = results
    assert again.keys() == first.keys() == tiny("01").results.keys()
    differ = {key for key, value in again.items() if value != first[key]}
    assert all("seconds" in key or "memory" in key for key in differ), differ
    archives = [tmp_path / name / "archive.safetensors" for name in ("once", "again")]
    assert archives[0].read_bytes() == archives[1].read_bytes()
    best = inspect_archive(archives[0])["training"]["best"]
    assert best["step"] == first["train.best_step"] and first["train.steps"] == 4
    names = {"seconds", "trunk_seconds", "peak_memory_gb", "stopped", "normaliser_examples"}
    expected = {f"train.{name}" for name in names} | {"identity.edit_lr", "train.examples"}
    for share in ("edit_success", "paraphrase", "neighbourhood", "locality", "score", "loss"):
        expected |= {f"train.validation.{share}", f"identity.validation.{share}"}
    assert expected <= set(first)


@pytest.mark.slow
def test_editing_scores_both_editors_on_the_same_edits(tiny):
    run = tiny("02")
    editors = {"single": "trained editor", "identity.single": "identity control"}
    assert_drawn(run, "headline", editors, 6)
    for prefix, file in zip(editors, ("rows.jsonl", "identity_rows.jsonl"), strict=True):
        rows = list(map(json.loads, (run.out / file).read_text(encoding="utf-8").splitlines()))
        for metric in HEADLINE.values():
            mean = sum(row["values"][metric] for row in rows) / len(rows)
            assert run.results[f"{prefix}.{metric}"] == pytest.approx(mean)
    assert {"single.score.headline", "identity.edit_lr", "peak_memory_gb"} <= set(run.results)


@pytest.mark.slow
def test_inside_mend_identity_descends_a_gradient_of_rank_one_terms(tiny):
    inside = {name.removeprefix("inside."): x for name, x in tiny("03").results.items()}
    assert inside["rank.largest_error"] < 1e-4 and inside["rank.above_tokens"] == 0
    assert inside["gradient_all_tokens.cosine"] == pytest.approx(1, abs=1e-5)
    assert inside["trained.cosine"] < 0.99 and abs(inside["init_xavier.cosine"]) < 0.9
    assert inside["minus.0.001.loss.edit"] < inside["minus.0.loss.edit"]
    assert inside["minus.0.loss.edit"] < inside["plus.0.001.loss.edit"]
    assert sum(name.startswith("turned.") for name in inside) > 1


@pytest.mark.slow
def test_honest_evaluation_scores_every_baseline_on_the_same_edits(tiny):
    run = tiny("04")
    names = {"single": "trained MEND", "context.single": "fact in context"}
    names |= {"identity.single": "identity", "gauss_newton.single": "Gauss-Newton"}
    assert_drawn(run, "editors", names, 3)
    assert run.results["gauss_newton.tuning.tried"] == BUDGET and run.results["tuning.edits"] == 1
    assert len(list(run.out.glob("rows_*.jsonl"))) == len(names)


@pytest.mark.slow
def test_many_edits_draws_what_was_measured_at_every_count(tiny):
    run = tiny("05")
    rows = drawn(run, "at_once")
    assert {row["edits"] for row in rows} == {"1", "2"}
    editors = {row["editor"] for row in rows}
    assert editors == {"MEND, sum", "MEND, least squares", "MEND, keys alone"}
    for row in rows:
        slug = re.sub(r"[^a-z]+", "_", row["editor"].lower())
        value = run.results[f"{slug}.batch_{row['edits']}.{row['metric']}"]
        assert value == float(row["mean"])


@pytest.mark.slow
def test_six_editors_are_scored_on_the_same_edits_and_trained_as_long_as_told(tiny):
    run = tiny("09")
    names = ["mend", "mendkit", "rledit", "ultraedit"]
    for name in names:
        for how, k in (("in turn", ""), ("at once", "_by_4")):
            label = f"{name}, {how}"
            slug = re.sub(r"[^a-z]+", "_", label)
            assert_drawn(run, "editors", {f"{slug}.locft_4{k}": label}, 4)
            assert len((run.out / f"rows_{slug}.jsonl").read_text().splitlines()) == 4
    told = {name: run.results[f"{name}.train.steps"] for name in names[2:]}
    assert told == {"rledit": 1, "ultraedit": 0}
    for name, settings in METHODS.items():
        if name in told:
            trained = inspect_archive(run.out / name)["hparams"]
            assert trained["method"] == name and trained["ridge"] == settings["ridge"]


@pytest.mark.slow
def test_what_follows_is_scored_for_every_editor_and_archives_replace_training(tiny, tmp_path):
    run = tiny("10")
    names = ["archive", "recipe", "consequences", "negated forms", "middle blocks"]
    names += ["passage", "finetune", "fact in context"]
    rows = {(x["editor"], x["metric"]): float(x["mean"]) for x in drawn(run, "what_follows")}
    assert {editor for editor, _ in rows} == {*names, "unedited"}
    for name in names:
        slug = re.sub(r"[^a-z]+", "_", name)
        for metric in ("negation.leak", "consequence.free_exact_in_domain"):
            assert rows[name, metric] == run.results[f"{slug}.single.{metric}"]
        if name in names[2:6]:
            trained = inspect_archive(run.out / slug)["hparams"]
            assert trained["cconsequence"] == 0.6 and run.results[f"{slug}.train.steps"] == 1
            assert (trained["edit_on"] == "text") == (name == "passage")
    archives = [f"mine={run.out / 'passage'}"]
    again = {**run.given, "archives": archives, "kinds": [], "out": str(tmp_path)}
    shown = run_cells("10", again, to="table")
    assert any("mine" in str(x) for x in shown) and not list(tmp_path.glob("*/archive*"))


@pytest.mark.slow
def test_playing_leaves_an_adapter_and_a_snapshot_for_where_no_kernel_runs(tiny):
    run = tiny("06")
    assert (run.out / "adapter/adapter_model.safetensors").is_file()
    assert run.results["playground.restored"] is True
    assert run.results["playground.0.as_before"] == 1
    html = [x.get("text/html", "") for x in run.shown if isinstance(x, dict)]
    assert sum("Journal of edits" in text and "data:image/png" in text for text in html) == 1


@pytest.mark.slow
def test_costs_are_measured_on_equal_numbers(tiny):
    (found,) = tiny("07").results.values()
    assert found["equal"] is True and found["workload"]["edits_per_step"] == 2
    memory = found["memory"]
    assert found["memory_ratio"] == memory["textbook"]["above_gb"] / memory["kit"]["above_gb"]
    assert all(0 < values["above_gb"] < values["peak_gb"] for values in memory.values())
    assert memory.keys() == found["train"].keys()


@pytest.mark.slow
def test_comparing_runs_tells_their_scores_and_what_failed(tiny):
    edited, folder = tiny("02"), tiny("02").out.parent
    runs = []
    for number, rank in enumerate((2, 4, 6), 1):
        run = {"number": number, "folder": f"r{rank}", "values": {"rank": rank}, "command": []}
        runs.append({**run, "status": "done", "error": ""})
        shutil.copytree(edited.out, folder / f"r{rank}")
        shutil.copytree(tiny("01").out, folder / f"r{rank}" / NAMES["01"].stem)
    runs[-1] |= {"status": "failed", "error": "<b>no memory</b>"}
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))
    run = tiny("08")
    assert (run.results["sweep.done"], run.results["sweep.failed"]) == (2, 1)
    assert run.results["sweep.run_3.error"] == "<b>no memory</b>"
    assert run.results["sweep.run_2.settings"] == {"rank": 4}
    for metric in HEADLINE.values():
        assert run.results[f"sweep.run_1.{metric}"] == edited.results[f"single.{metric}"]
    shown = str([x for x in run.shown if isinstance(x, dict)])
    assert "run 1 and run 2" in shown and "edit_success.free_exact" in shown
    assert "&lt;b&gt;no memory" in shown and "<b>no" not in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("01", {"overrides": ["archive=some/archive.safetensors"]}, "archive=null"),
        ("01", {"overrides": ["rnak=8"]}, "rank"),
        ("02", {"archive": "no/such.safetensors"}, "no such archive"),
        ("02", {"archive": None}, "archive is null"),
        ("05", {"archive": "null"}, "archive is null"),
        ("09", {"methods": ["memit"]}, "memit.yaml"),
        ("03", {"archive": "no/such.safetensors"}, "no such archive"),
        ("04", {"text": "no/such.txt"}, "no such file"),
        ("06", {"archive": "no/such.safetensors"}, "no such archive"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    tiny, tmp_path, monkeypatch, name, changes, said
):
    """Run where JupyterLab runs it: in `notebooks/`, from where the config is found, too."""
    given = {**tiny("02").given, **SIZES[name], "out": str(tmp_path / "out")}
    overrides = given["overrides"][:1] + changes.get("overrides", [])
    monkeypatch.chdir(ROOT / "notebooks")
    with pytest.raises(Exception, match=said) as error:
        run_cells(name, {**given, **changes, "overrides": overrides}, to="settings")
    assert error.type.__module__ == "mendkit.errors" and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_inside_mend_without_an_archive_says_that_nothing_was_trained(tiny, tmp_path):
    given = {**tiny("03").given, "archive": "", "out": str(tmp_path / "out")}
    shown = run_cells("03", given, to="turned")
    assert any("never trained" in str(x) for x in shown)
    html = next(x["text/html"] for x in reversed(shown) if isinstance(x, dict))
    assert html.count(">1<") == 3  # the least, the median and the greatest cosine
    assert any(isinstance(x, Chart) for x in shown)


ANNOTATIONS = {
    "archive": str, "config": str, "overrides": list[str], "sizes": list[float], "kinds": list[str],
    "shown": int, "test_limit": int,
}  # fmt: skip
GIVEN = {"archive": "a", "config": "c", "overrides": [], "sizes": [1.0], "kinds": ["x"]}
GIVEN |= {"shown": 4, "test_limit": 0}
MEANT = [("archive", given, None) for given in (None, "", "null", "None", "~")] + [
    ("overrides", "rank=8 model_name='my model'", ["rank=8", "model_name=my model"]),
    ("overrides", "[inner_params=auto]", ["inner_params=auto"]),
    ("sizes", "0.1, 1e-3 2", [0.1, 0.001, 2.0]),
    ("sizes", [1, 2], [1.0, 2.0]),
    ("sizes", 1, [1.0]),
    ("kinds", "identity,rome", ["identity", "rome"]),
    ("kinds", "rome", ["rome"]),
    ("test_limit", "7", 7),
    ("config", 7, "7"),
    ("config", "0012", "0012"),
]
REFUSED = [("shown", 0), ("shown", "4.5"), ("shown", None), ("test_limit", -1), ("config", None)]
REFUSED += [("overrides", 4), ("overrides", [4]), ("sizes", "a"), ("sizes", "[nan")]
REFUSED += [("config", " ")]


@pytest.mark.parametrize(("name", "given", "value"), MEANT)
def test_a_parameter_from_papermill_means_what_it_means_on_the_command_line(name, given, value):
    namespace = {"__annotations__": ANNOTATIONS, **GIVEN, name: given}
    check_parameters(namespace)
    assert namespace == {"__annotations__": ANNOTATIONS, **GIVEN, name: value}


@pytest.mark.parametrize(("name", "given"), REFUSED)
def test_a_parameter_that_means_nothing_is_refused_by_name(name, given):
    with pytest.raises(MendkitError, match=f"^{name} must be .*, got "):
        check_parameters({"__annotations__": ANNOTATIONS, **GIVEN, name: given})


def test_a_name_that_is_no_parameter_is_refused_with_the_nearest():
    cells = ["import re", "# Parameters\nshown = 4\ntset_limit = 5\n"]
    with pytest.raises(MendkitError, match="'tset_limit'; did you mean test_limit"):
        check_parameters({"__annotations__": ANNOTATIONS, **GIVEN, "In": cells})


def test_another_archive_takes_the_place_of_the_one_in_the_box_and_of_no_other(
    tmp_path, monkeypatch
):
    """As `make lab ARCHIVE=...` has it; 02 to 06 and 09 begin with the one in the box."""
    archive = tmp_path / "mine.safetensors"
    monkeypatch.setenv("MENDKIT_ARCHIVE", str(archive))
    for number in (*range(2, 7), 9):
        default = read_parameters(NAMES[f"{number:02d}"])["archive"].default
        for given, expected in (
            (default, str(archive)),
            ("other.safetensors", "other.safetensors"),
        ):
            namespace = {"__annotations__": {"archive": str}, "archive": given}
            check_parameters(namespace)
            assert namespace["archive"] == expected


@pytest.mark.slow
def test_a_notebook_runs_from_any_folder_and_has_its_run_folder_to_itself(
    tiny, tmp_path, monkeypatch
):
    given = {**tiny("02").given, "out": "out"}
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    other = os.open("out", os.O_RDONLY)  # as another process has it
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(MendkitError, match="out is in use by another run"):
        run_cells("02", given, to="settings")
    assert list(Path("out").iterdir()) == []
    os.close(other)
    run_cells("02", given, to="settings")  # finds its config
    other = os.open("out", os.O_RDONLY)
    with pytest.raises(BlockingIOError):  # and keeps the folder
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_paths_are_the_same_from_the_root_and_from_the_notebooks_folder(tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "mine").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert project_path("config.yaml") == Path("config.yaml")
    monkeypatch.chdir(tmp_path / "notebooks")
    assert project_path("config.yaml") == tmp_path / "config.yaml"
    assert project_path("runs/new") == tmp_path / "runs/new"  # outputs as well
    assert project_path("mine") == Path("mine")  # what is there is meant
    assert str(project_path("facts:test")) == "facts:test"
