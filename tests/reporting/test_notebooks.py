"""The notebooks keep to their form, and run from end to end through papermill on a tiny model."""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import papermill
import pytest
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from mendkit.baselines.tuning import BUDGET
from mendkit.mend.archive import inspect_archive
from mendkit.reporting.findings import HEADLINE
from mendkit.runs import project_path
from tests.oracles.tiny import save_tiny

ROOT = Path(__file__).parents[2]
COMPARE = "08_compare_runs.ipynb"
TRAIN, EDIT, INSIDE = (
    "01_train_without_archive.ipynb",
    "02_edit_with_archive.ipynb",
    "03_inside_mend.ipynb",
)
COSTS, PLAY = "07_what_training_costs.ipynb", "06_playground.ipynb"
HONEST, MANY = "04_honest_evaluation.ipynb", "05_many_edits.ipynb"
PARAMETERS = {
    TRAIN: {
        "config": ("str", "configs/smollm2-135m.yaml"),
        "overrides": ("list", []),
        "train_data": ("str", "facts:train"),
        "validation_data": ("str", "facts:validation"),
        "train_limit": ("int", 0),
        "validation_limit": ("int", 0),
        "out": ("str", "runs/01_train_without_archive"),
    },
    EDIT: {
        "config": ("str", "configs/smollm2-135m.yaml"),
        "overrides": ("list", []),
        "archive": ("str", "runs/01_train_without_archive/archive.safetensors"),
        "test_data": ("str", "facts:test"),
        "test_limit": ("int", 160),
        "validation_data": ("str", "facts:validation"),
        "validation_limit": ("int", 40),
        "max_new_tokens": ("int", 16),
        "shown": ("int", 4),
        "out": ("str", "runs/02_edit_with_archive"),
    },
    INSIDE: {
        "config": ("str", "configs/smollm2-135m.yaml"),
        "overrides": ("list", []),
        "archive": ("str", "runs/01_train_without_archive/archive.safetensors"),
        "data": ("str", "facts:test"),
        "examples": ("int", 24),
        "statistics_data": ("str", "facts:train"),
        "statistics_limit": ("int", 64),
        "dense": ("int", 4),
        "sizes": ("list", [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]),
        "out": ("str", "runs/03_inside_mend"),
    },
    COSTS: {
        "models": ("list", ["smollm2-135m", "gpt2-xl-shape"]),
        "batch": ("int", 16),
        "rank": ("int", 1920),
        "repeats": ("int", 3),
        "depths": ("list", [12, 24, 48]),
        "out": ("str", "runs/07_what_training_costs"),
    },
    COMPARE: {"sweep": ("str", "runs/sweep"), "out": ("str", "runs/08_compare_runs")},
    PLAY: {
        "config": ("str", "configs/smollm2-135m.yaml"),
        "overrides": ("list", []),
        "archive": ("str", ""),
        "data": ("str", "facts:test"),
        "facts": ("int", 40),
        "statistics_data": ("str", "facts:train"),
        "statistics_limit": ("int", 64),
        "max_new_tokens": ("int", 8),
        "strengths": ("list", [0, 0.25, 0.5, 0.75, 1, 1.5, 2]),
        "out": ("str", "runs/06_playground"),
    },
    HONEST: {
        "config": ("str", "configs/smollm2-135m.yaml"),
        "overrides": ("list", []),
        "archive": ("str", "runs/01_train_without_archive/archive.safetensors"),
        "test_data": ("str", "facts:test"),
        "test_limit": ("int", 60),
        "validation_data": ("str", "facts:validation"),
        "validation_limit": ("int", 12),
        "text": ("str", ""),
        "kinds": (
            "list",
            ["identity", "finetune", "finetune_capped", "localised", "rome", "gauss_newton"],
        ),
        "max_new_tokens": ("int", 16),
        "shown": ("int", 4),
        "out": ("str", "runs/04_honest_evaluation"),
    },
    MANY: {
        "config": ("str", "configs/smollm2-135m.yaml"),
        "overrides": ("list", []),
        "archive": ("str", "runs/01_train_without_archive/archive.safetensors"),
        "data": ("str", "facts:test"),
        "limit": ("int", 125),
        "at_once": ("list", [1, 5, 25, 125]),
        "in_a_row": ("int", 100),
        "keys_data": ("str", "facts:train"),
        "keys_limit": ("int", 200),
        "text": ("str", ""),
        "kinds": ("list", ["localised", "gauss_newton"]),
        "validation_limit": ("int", 8),
        "max_new_tokens": ("int", 16),
        "out": ("str", "runs/05_many_edits"),
    },
}
FIGURES = {
    TRAIN: {"loss_curves", "validation", "step_sizes", "control"},
    EDIT: {"next_tokens", "headline", "by_relation", "probability_shifts", "strength"},
    INSIDE: {"ranks", "signs", "normalisers", "alignment", "spectra", "step_sizes"},
    COSTS: {"costs_of_training", "memory_of_training"},
    COMPARE: {"success_against_locality", "curves_of_runs", "scores_by_setting"},
    PLAY: {"next_tokens"},
    HONEST: {"decoding", "editors"},
    MANY: {"at_once", "in_a_row"},
}
FEW = {
    "examples": 5,
    "statistics_limit": 8,
    "dense": 2,
    "sizes": [0.001, 0.1],
}  # enough to run notebook 03
SOME = {
    "limit": 4,
    "at_once": [1, 2],
    "in_a_row": 3,
    "keys_limit": 4,
    "kinds": [],
    "max_new_tokens": 3,
}  # and 05
FEWER = {"test_limit": 3, "validation_limit": 1, "max_new_tokens": 3, "shown": 1}  # and 04


def read(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=PARAMETERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# ------------------------------------------------------------------------------------------------------- form


def test_every_notebook_is_tested() -> None:
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} == set(PARAMETERS)


def test_the_one_parameters_cell_holds_annotated_literals_with_comments(name: str) -> None:
    cells = read(name).cells
    tagged = [i for i, cell in enumerate(cells) if cell.metadata.get("tags")]
    assert tagged == [2] and cells[2].metadata.tags == ["parameters"]  # title, imports, parameters
    found = {}
    for line in cells[2].source.splitlines():
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.AnnAssign) and statement.value is not None
        found[ast.unparse(statement.target)] = (
            ast.unparse(statement.annotation),
            ast.literal_eval(statement.value),
        )
        assert re.search(r"  # .{8}", line), f"no comment: {line}"
    assert found == PARAMETERS[name]


def test_papermill_reads_the_parameters(name: str, caplog: pytest.LogCaptureFixture) -> None:
    inferred = papermill.inspect_notebook(str(ROOT / "notebooks" / name))
    assert {key: value["inferred_type_name"] for key, value in inferred.items()} == {
        key: kind for key, (kind, _) in PARAMETERS[name].items()
    }
    assert not caplog.records  # "Unable to parse line"


def test_committed_without_outputs(name: str) -> None:
    notebook = read(name)
    assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))
    assert (
        set(notebook.metadata) == {"kernelspec", "language_info"}
        and notebook.metadata.kernelspec.name == "python3"
    )
    strip = [sys.executable, "-m", "nbstripout", "--keep-id", "--verify"]
    strip += [
        "--extra-keys",
        "metadata.papermill cell.metadata.papermill",
        str(ROOT / "notebooks" / name),
    ]
    done = subprocess.run(strip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cells_are_few_short_and_plain(name: str) -> None:
    """No definition, no magic, no absolute path, at most ten statements; `mendkit` does the rest."""
    notebook = read(name)
    assert 15 <= len(notebook.cells) <= 30
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in code(notebook)[2:]:
        tree = ast.parse(cell.source)  # a magic or a shell command is no Python
        nodes = list(ast.walk(tree))
        assert not any(
            isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom)
            for n in nodes
        )
        assert sum(isinstance(n, ast.stmt) for n in nodes) <= 10
    for cell in code(notebook):
        texts = [n.value for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Constant)]
        assert not any(isinstance(t, str) and re.match(r"[/~\\]|[A-Za-z]:[\\/]", t) for t in texts)


def test_the_first_and_the_last_cell_frame_the_rest(name: str) -> None:
    cells = read(name).cells
    first, last = cells[0].source, cells[-1].source
    assert cells[0].cell_type == cells[-1].cell_type == "markdown"
    assert re.match(r"# .+\?\n", first)
    assert all(
        word in first
        for word in ("**Answer.**", "**Inputs:**", "**Outputs**", "**Run time:**", "CPU")
    )
    assert len(first.split("**Answer.**")[1].split("\n\n")[0].splitlines()) <= 3
    assert last.startswith("## Conclusion and limits")
    links = re.findall(r"\]\(([^)]+)\)", last)
    assert links and all((ROOT / "notebooks" / link).is_file() for link in links)
    assert 'write_json(folder / "results.json", results)' in code(read(name))[-1].source


def test_markdown_claims_no_result(name: str) -> None:
    """A number with decimals can only be a result, and those are computed by the run."""
    for cell in read(name).cells:
        assert cell.cell_type == "code" or not re.search(r"\d\.\d", cell.source)


def test_every_code_cell_has_its_reason_before_it(name: str) -> None:
    """Never more than three code cells in a row, the imports and parameters aside."""
    kinds = "".join(cell.cell_type[0] for cell in read(name).cells[3:])
    assert "cccc" not in kinds and "mm" not in kinds


# -------------------------------------------------------------------------------------------------- execution


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Kernels inherit the environment: this checkout's package is found from any folder, installed or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        yield


def run(name: str, executed: Path, *, cwd: Path = ROOT, **parameters: Any) -> NotebookNode:
    """Execute a notebook as the report does."""
    source = str(ROOT / "notebooks" / name)
    return papermill.execute_notebook(
        source,
        str(executed),
        parameters=parameters,
        kernel_name="python3",
        cwd=str(cwd),
        progress_bar=False,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The notebooks, one after the other, on a tiny random model: their folder, notebooks and results."""
    folder = tmp_path_factory.mktemp("notebooks")
    model = save_tiny(folder / "model")
    overrides = [
        f"model_name={model}",
        "max_iters=4",
        "val_interval=2",
        "log_interval=1",
        "batch_size=4",
        "rank=8",
    ]
    sizes = {"train_limit": 24, "validation_limit": 6}
    out = {name: folder / f"out{name[:2]}" for name in PARAMETERS}
    executed = {
        TRAIN: run(TRAIN, folder / "01.ipynb", overrides=overrides, out=str(out[TRAIN]), **sizes)
    }
    sizes = {"test_limit": 6, "validation_limit": 4, "max_new_tokens": 8, "shown": 2}
    archive = str(out[TRAIN] / "archive.safetensors")
    own = {"overrides": overrides[:1], "archive": archive, "out": str(out[EDIT])}
    executed[EDIT] = run(EDIT, folder / "02.ipynb", **own, **sizes)
    own = {**own, **FEW, "out": str(out[INSIDE])}
    executed[INSIDE] = run(INSIDE, folder / "03.ipynb", **own)
    (folder / "tiny.yaml").write_text(f"model_name: {model}\n")
    sizes = {
        "models": [str(folder / "tiny.yaml")],
        "batch": 2,
        "rank": 8,
        "repeats": 2,
        "depths": [],
    }
    executed[COSTS] = run(COSTS, folder / "07.ipynb", out=str(out[COSTS]), **sizes)
    runs = [
        {"name": f"r{rank}", "values": {"rank": rank}, "status": "done", "error": ""}
        for rank in (2, 4)
    ]
    for run_folder in (folder / f"r{rank}" for rank in (2, 4)):
        shutil.copytree(out[EDIT], run_folder)
        shutil.copytree(out[TRAIN], run_folder / TRAIN.removesuffix(".ipynb"))
    runs.append(
        {"name": "r6", "values": {"rank": 6}, "status": "failed", "error": "<b>out of memory</b>"}
    )
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))
    executed[COMPARE] = run(COMPARE, folder / "08.ipynb", sweep=str(folder), out=str(out[COMPARE]))
    own = {
        "overrides": overrides[:1],
        "archive": archive,
        "out": str(out[PLAY]),
        "facts": 3,
        "strengths": [0, 1],
    }
    executed[PLAY] = run(PLAY, folder / "06.ipynb", **own)
    own = {"overrides": overrides[:1], "archive": archive, "out": str(out[HONEST])}
    executed[HONEST] = run(HONEST, folder / "04.ipynb", **own, **FEWER)
    own = {"overrides": overrides[:1], "archive": archive, "out": str(out[MANY])}
    executed[MANY] = run(MANY, folder / "05.ipynb", **own, **SOME)
    results = {name: json.loads((out[name] / "results.json").read_text()) for name in out}
    return SimpleNamespace(out=out, executed=executed, results=results, overrides=overrides)


@pytest.mark.slow
def test_figures_are_shown_and_saved_with_their_rows(tiny: SimpleNamespace, name: str) -> None:
    files = {path.name for path in (tiny.out[name] / "figures").iterdir()}
    assert files == {f"{figure}.{kind}" for figure in FIGURES[name] for kind in ("png", "csv")}
    outputs = [output for cell in code(tiny.executed[name]) for output in cell.outputs]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == len(FIGURES[name])
    assert not any(output.output_type == "error" for output in outputs)


@pytest.mark.slow
def test_training_leaves_an_archive_and_its_results(tiny: SimpleNamespace) -> None:
    out, results = tiny.out[TRAIN], tiny.results[TRAIN]
    assert (
        inspect_archive(out / "archive.safetensors")["training"]["best"]["step"]
        == results["train.best_step"]
    )
    assert (out / "run.json").is_file() and (out / "history.jsonl").is_file()
    assert results["train.steps"] == 4 and results["train.examples"] == 24
    names = ("seconds", "trunk_seconds", "peak_memory_gb", "stopped", "normaliser_examples")
    shares = ("edit_success", "paraphrase", "neighbourhood", "locality", "score", "loss")
    expected = [f"train.{n}" for n in names] + [
        f"{e}.validation.{n}" for e in ("train", "identity") for n in shares
    ]
    assert {*expected, "identity.edit_lr"} <= set(results)


@pytest.mark.slow
def test_editing_scores_both_editors_on_the_same_edits(tiny: SimpleNamespace) -> None:
    out, results = tiny.out[EDIT], tiny.results[EDIT]
    for prefix, file in (("", "rows.jsonl"), ("identity.", "identity_rows.jsonl")):
        rows = [json.loads(line) for line in (out / file).read_text(encoding="utf-8").splitlines()]
        assert len(rows) == results[f"{prefix}single.edits.scored"] == 6
        for metric in HEADLINE:
            mean = sum(row["values"][metric] for row in rows) / len(rows)
            assert results[f"{prefix}single.{metric}"] == pytest.approx(mean)
    assert {"single.score.headline", "identity.single.score.headline", "identity.edit_lr"} <= set(
        results
    )
    assert results["peak_memory_gb"] > 0


@pytest.mark.slow
def test_a_notebook_run_again_has_the_same_results(tiny: SimpleNamespace, tmp_path: Path) -> None:
    archive = str(tiny.out[TRAIN] / "archive.safetensors")
    sizes = {"test_limit": 6, "validation_limit": 4, "max_new_tokens": 8, "shown": 2}
    given = {
        TRAIN: {"overrides": tiny.overrides, "train_limit": 24, "validation_limit": 6},
        EDIT: {"overrides": tiny.overrides[:1], "archive": archive, **sizes},
    }
    for name, own in given.items():
        run(name, tmp_path / name, out=str(tmp_path / name[:2]), **own)
        again = json.loads((tmp_path / name[:2] / "results.json").read_text())
        assert again.keys() == tiny.results[name].keys()
        differ = {key for key, value in again.items() if value != tiny.results[name][key]}
        assert all("seconds" in key or "memory" in key for key in differ), differ
    assert (tmp_path / "01" / "archive.safetensors").read_bytes() == Path(archive).read_bytes()


@pytest.mark.slow
def test_the_headline_figure_is_drawn_from_the_results(tiny: SimpleNamespace) -> None:
    with (tiny.out[EDIT] / "figures/headline.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["editor"], row["metric"]): float(row["mean"]) for row in csv.DictReader(file)}
    for metric in HEADLINE:
        assert rows["trained editor", metric] == tiny.results[EDIT][f"single.{metric}"]
        assert rows["identity control", metric] == tiny.results[EDIT][f"identity.single.{metric}"]


@pytest.mark.slow
def test_comparing_runs_tells_their_own_scores_and_what_failed(tiny: SimpleNamespace) -> None:
    results, edited = tiny.results[COMPARE], tiny.results[EDIT]
    assert (results["sweep.done"], results["sweep.failed"]) == (2, 1)
    assert results["sweep.run_3.error"] == "<b>out of memory</b>" and results[
        "sweep.run_2.settings"
    ] == {"rank": 4}
    for metric in HEADLINE:
        assert results[f"sweep.run_1.{metric}"] == edited[f"single.{metric}"]
    shown = "".join(
        str(output.get("data")) for cell in code(tiny.executed[COMPARE]) for output in cell.outputs
    )
    assert "&lt;b&gt;out of memory" in shown and "<b>out" not in shown


@pytest.mark.slow
def test_inside_mend_the_gradient_is_a_sum_of_rank_one_terms_and_identity_descends_it(
    tiny: SimpleNamespace,
) -> None:
    results = tiny.results[INSIDE]
    assert results["inside.rank.largest_error"] < 1e-4 and results["inside.rank.above_tokens"] == 0
    assert results["inside.gradient_all_tokens.cosine"] == pytest.approx(1, abs=1e-5)
    assert (
        results["inside.trained.cosine"] < 0.99 and abs(results["inside.init_xavier.cosine"]) < 0.9
    )
    assert results["inside.minus.0.001.loss.edit"] < results["inside.minus.0.loss.edit"]
    assert results["inside.minus.0.loss.edit"] < results["inside.plus.0.001.loss.edit"]


@pytest.mark.slow
def test_many_edits_draws_what_was_measured_at_every_count(tiny: SimpleNamespace) -> None:
    results = tiny.results[MANY]
    for name, modes in {
        "at_once": ("batch_1", "batch_2"),
        "in_a_row": ("sequential_1", "sequential_3"),
    }.items():
        with (tiny.out[MANY] / f"figures/{name}.csv").open(encoding="utf-8", newline="") as file:
            drawn = list(csv.DictReader(file))
        assert {row["editor"] for row in drawn} == {
            "MEND, sum",
            "MEND, least squares",
            "MEND, keys alone",
        }
        assert {row["edits"] for row in drawn} == {mode.rpartition("_")[2] for mode in modes}
        for row in drawn:
            slug, mode = (
                row["editor"].replace(", ", "_").replace(" ", "_").lower(),
                modes[0].partition("_")[0],
            )
            assert results[f"{slug}.{mode}_{row['edits']}.{row['metric']}"] == float(row["mean"])


@pytest.mark.slow
def test_costs_are_measured_on_equal_numbers(tiny: SimpleNamespace) -> None:
    (own,) = tiny.results[COSTS].values()
    assert own["equal"] is True and own["workload"]["edits_per_step"] == 2
    memory = own["memory"]
    assert own["memory_ratio"] == memory["textbook"]["above_gb"] / memory["kit"]["above_gb"]
    assert all(0 < found["above_gb"] < found["peak_gb"] for found in memory.values())
    assert memory.keys() == own["train"].keys()


@pytest.mark.slow
def test_honest_evaluation_scores_every_baseline_on_the_same_edits(tiny: SimpleNamespace) -> None:
    out, results = tiny.out[HONEST], tiny.results[HONEST]
    with (out / "figures/editors.csv").open(encoding="utf-8", newline="") as file:
        drawn = {(row["editor"], row["metric"]): float(row["mean"]) for row in csv.DictReader(file)}
    names = {
        "": "trained MEND",
        "context.": "fact in context",
        "identity.": "identity",
        "finetune.": "fine-tuning",
    }
    names |= {
        "finetune_capped.": "fine-tuning, capped",
        "localised.": "localised fine-tuning",
        "rome.": "ROME",
    }
    names["gauss_newton."] = "Gauss-Newton"
    for prefix, name in names.items():
        assert results[f"{prefix}single.edits.scored"] == results["single.edits.scored"] == 3
        for metric in HEADLINE:
            assert drawn[name, metric] == results[f"{prefix}single.{metric}"]
    assert {results[f"{kind}.tuning.tried"] for kind in PARAMETERS[HONEST]["kinds"][1]} == {BUDGET}
    assert results["tuning.edits"] == 1 and len(list(out.glob("rows_*.jsonl"))) == len(names)


@pytest.mark.slow
def test_inside_mend_without_an_archive_says_that_nothing_was_trained(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    own = {"overrides": tiny.overrides[:1], "archive": "", "out": str(tmp_path / "out")}
    executed = run(INSIDE, tmp_path / "executed.ipynb", **own, **FEW)
    assert any(
        "never trained" in str(output.get("data"))
        for cell in code(executed)
        for output in cell.outputs
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["inside.untrained.cosine"] == pytest.approx(
        results["inside.normalised_per_feature.cosine"]
    )
    assert "inside.trained.cosine" not in results
    assert all(
        value == pytest.approx(1)
        for name, value in results.items()
        if name.startswith("inside.turned.")
    )


@pytest.mark.slow
def test_playing_leaves_an_adapter_and_a_snapshot_for_where_no_kernel_runs(
    tiny: SimpleNamespace,
) -> None:
    out, results = tiny.out[PLAY], tiny.results[PLAY]
    assert (out / "adapter/adapter_model.safetensors").is_file()
    assert results["playground.restored"] is True and results["playground.0.as_before"] == 1
    html = [
        o["data"].get("text/html", "")
        for cell in code(tiny.executed[PLAY])
        for o in cell.outputs
        if "data" in o
    ]
    assert sum("Journal of edits" in own and "data:image/png" in own for own in html) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        (TRAIN, {"overrides": ["archive=some/archive.safetensors"]}, "archive=null"),
        (TRAIN, {"overrides": ["rnak=8"]}, "rank"),
        (EDIT, {"archive": "no/such.safetensors"}, "no such archive"),
        (EDIT, {"test_data": "no/such.json"}, "no such file"),
        (INSIDE, {"archive": "no/such.safetensors"}, "no such archive"),
        (PLAY, {"archive": "no/such.safetensors"}, "no such archive"),
        (HONEST, {"text": "no/such.txt"}, "no such file"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(
    tiny: SimpleNamespace, tmp_path: Path, name: str, parameters: dict[str, Any], said: str
) -> None:
    """Run where JupyterLab runs it: in `notebooks/`, from where the config is found, too."""
    overrides = [tiny.overrides[0], *parameters.pop("overrides", [])]
    with pytest.raises(PapermillExecutionError, match=said) as error:
        where = {"cwd": ROOT / "notebooks", "out": str(tmp_path / "out")}
        run(name, tmp_path / "executed.ipynb", overrides=overrides, **where, **parameters)
    assert error.value.ename.endswith("Error") and not (tmp_path / "out").exists()


def test_paths_are_the_same_from_the_root_and_from_the_notebooks_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notebooks" / "own").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert project_path("config.yaml") == Path("config.yaml") and project_path("runs/new") == Path(
        "runs/new"
    )
    monkeypatch.chdir(tmp_path / "notebooks")
    assert project_path("config.yaml") == tmp_path / "config.yaml"
    assert project_path("runs/new") == tmp_path / "runs/new"  # outputs as well
    assert project_path("own") == Path("own")  # what is there is meant
    assert (
        project_path(tmp_path / "x") == tmp_path / "x"
        and str(project_path("facts:test")) == "facts:test"
    )
