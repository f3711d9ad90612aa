"""The course: stubs fail their checks, solutions pass them, and a check names a known mistake."""

import re
from pathlib import Path

import nbformat
import pytest
import torch

from mendkit import EditExample, MENDHyperParams, load_model, save_archive
from mendkit.mend.batches import edit_tokens
from mendkit.mend.factors import edit_factors
from mendkit.mend.hypernetwork import MEND
from mendkit.models.trunk import FrozenTrunk
from mendkit.reporting.course import ExerciseError, check
from mendkit.reporting.notebook import run_notebook
from tests.oracles.notebooks import solved
from tests.oracles.tiny import save_tiny

ROOT = Path(__file__).parents[2]
LESSONS = {path.name[0]: path for path in sorted((ROOT / "notebooks/course").glob("*.ipynb"))}
SIZES = {
    "1": {},
    "2": {"limit": 8, "rank": 4},
    "3": {"limit": 8, "validation_limit": 3, "max_steps": 8},
    "4": {"count": 4, "validation_limit": 2, "max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny model, and an archive of it for the lesson that needs one."""
    folder = tmp_path_factory.mktemp("course")
    hparams = MENDHyperParams(model_name=str(save_tiny(folder / "model")), rank=4, edit_lr=0.1)
    base = load_model(hparams)
    mend = MEND(base.sites, hparams)
    edit = edit_tokens(base, hparams, EditExample("The capital of France is", "Lyon"))
    mend.warm_up([edit_factors(FrozenTrunk(base), hparams, [edit])])
    save_archive(folder / "archive.safetensors", base, mend)
    return {"overrides": [f"model_name={hparams.model_name}"], "archive": folder}


@pytest.mark.slow
@pytest.mark.parametrize("number", LESSONS)
def test_stubs_fail_their_checks_and_solutions_pass_them(number, given, tmp_path):
    lesson = tmp_path / "lesson.ipynb"
    nbformat.write(solved(LESSONS[number]), lesson)
    parameters = {"overrides": given["overrides"], **SIZES[number]}
    if number == "4":
        parameters["archive"] = str(given["archive"] / "archive.safetensors")
    done, page = tmp_path / "done.ipynb", tmp_path / "done.html"
    assert run_notebook(lesson, done, parameters, page=page) is None
    said = {cell.id: cell.get("outputs") for cell in nbformat.read(done, as_version=4).cells}
    checks = [name for name in said if name.endswith("-check")]
    assert 4 <= len(checks) <= 6
    for name in checks:
        (stopped,) = [output for output in said[name] if output.output_type == "error"]
        assert stopped.ename == "ExerciseError" and "nothing yet" in stopped.evalue
        assert len(stopped.traceback) == 1  # one sentence
        assert "✓" in str(said[f"{name}-again"])


@pytest.mark.parametrize("number", LESSONS)
def test_a_lesson_has_the_form_of_a_lesson(number):
    notebook = nbformat.read(LESSONS[number], as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    assert list(cells)[:4] == ["title", "install", "imports", "parameters"]
    assert not any(cell.get("outputs") for cell in notebook.cells)
    title = cells["title"].source
    assert re.match(r"# .+\?\n\n\*\*Course, lesson \d of 4", title) and "**Run time:**" in title
    for name in [name for name in cells if name.endswith("-check")]:
        stem = name.removesuffix("-check")
        around = [f"{stem}-why", stem, name, f"{stem}-solution"]
        place = [list(cells).index(each) for each in around if each in cells]
        assert place[-3:] == list(range(place[-3], place[-3] + 3))  # one below the other
        assert cells[f"{stem}-solution"].source.startswith("<details>\n<summary>Solution")
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    links = re.findall(r"\]\(([^)#:]+)\)", "".join(texts))
    assert links and all((LESSONS[number].parent / link).is_file() for link in links)
    prose = re.sub(r"(?s)<details>.*|^>.*?$|^- |^#.*?$|[*`]", "", "\n\n".join(texts), flags=re.M)
    long = [s for s in re.split(r"[.?:!;]\s|\n", prose) if len(s.split()) > 25]
    assert not long, long


def test_a_check_tells_right_from_wrong_and_why():
    right = torch.tensor([1.0, 2.0])
    check("it", right + 1e-7, right)
    check("it", "a", "a")
    wrong = {
        "nothing yet": None,
        "its shape is": right[:1],
        "not finite": right / 0,
        "the sign": -right,
        "the relative error is": right + 1,
        "expected numbers": "words",
    }
    for why, found in wrong.items():
        with pytest.raises(ExerciseError, match=why):
            check("it", found, right, mistakes={"the sign is wrong": -right})
    with pytest.raises(ExerciseError, match="got 'b', expected 'a'"):
        check("it", "b", "a")
    with pytest.raises(ExerciseError, match="nothing yet"):
        check("it", (1.0, None), (1.0, 2.0))
