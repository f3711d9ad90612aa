"""Stub notebooks with the parameters of the real ones, which compute nothing."""

import re
from copy import deepcopy
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mendkit.reporting.report import ARCHIVE_FILE, EDITING, TRAINING

PARAMETERS = {
    TRAINING: """config: str = "c.yaml"  # a file
overrides: list = []
train_data: str = "facts:train"
validation_data: str = "facts:validation"
train_limit: int = 0  # 0 takes all
validation_limit: int = 0
out: str = "runs/1" """,
    EDITING: """config: str = "c.yaml"
overrides: list = []
archive: "Optional[str]" = None
test_data: str = "facts:test"
test_limit: int = 0
validation_limit: int = 100
max_new_tokens: int = 50
shown: int = 4
out: str = "runs/2" """,
}
IMPORTS = """import json, os, sys, time
import re
from copy import deepcopy
from pathlib import Path
folder = Path(out)
secret_code = 1"""
SAID = """print('said before the end')
from IPython.display import display
display({'image/png': 'AAAA', 'text/plain': 'It works'}, raw=True)"""
WRITE = {
    TRAINING: f"""(folder / '{ARCHIVE_FILE}').write_bytes(b'trained now')
values = {{'train.seconds': 1.5, 'train.peak_memory_gb': 3.0, 'identity.edit_lr': 1}}
(folder / 'results.json').write_text(json.dumps(values))""",
    EDITING: """names = 'config overrides archive test_limit max_new_tokens shown out'.split()
seen = {n: globals()[n] for n in names} | {'python': sys.executable, 'cwd': os.getcwd()}
(folder / 'seen.json').write_text(json.dumps(seen))
(folder / 'figures').mkdir()
(folder / 'figures' / 'a b.png').write_text('x')
(folder / 'figures' / 'a b.csv').write_text('x')
name = 'single.edit_success.free_exact'
values = {name: 0.75, name + '.n': 8, name + '.low': 0.5, name + '.high': 1.0}
values |= {'identity.edit_lr': 2, 'peak_memory_gb': 2.0}
(folder / 'results.json').write_text(json.dumps(values))""",
}


def write_notebooks(folder: Path, *, last: str | None = None, **cells: str) -> Path:
    """Stub notebooks; `train=` and `edit=` put a cell before the last one of that notebook.

    `last` replaces the last cell of the editing one.
    """
    folder.mkdir(exist_ok=True)
    for stem, extra in ((TRAINING, cells.get("train")), (EDITING, cells.get("edit"))):
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = new_notebook(metadata={"kernelspec": kernel})
        notebook.cells = [
            new_markdown_cell(f"# {stem}\n\n[Back]({TRAINING}.ipynb)"),
            new_code_cell(PARAMETERS[stem]),
        ]
        notebook.cells[1].metadata["tags"] = ["parameters"]
        end = last if last and stem == EDITING else WRITE[stem]
        for text in (IMPORTS, SAID, extra, end):
            if text:
                notebook.cells.append(new_code_cell(text))
        nbformat.write(notebook, folder / f"{stem}.ipynb")
    return folder


def solved(path: Path) -> nbformat.NotebookNode:
    """A lesson of the course with every solution, and its check, behind the exercise's own check.

    The first check may raise; the cell behind it has the code of the `<details>`.
    """
    lesson = nbformat.read(path, as_version=4)
    cells, check = [], None
    for cell in lesson.cells:
        cells.append(cell)
        if "check" in cell.metadata.get("tags", ()):
            check = deepcopy(cell)
            cell.metadata["tags"].append("raises-exception")
        elif cell.id.endswith("-solution"):
            (code,) = re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)
            cells.append(new_code_cell(code))
            check.id += "-again"
            cells.append(check)
    lesson.cells = cells
    return lesson
