"""One notebook: its parameters, its run in a kernel of its own, its page in HTML.

papermill reads and sets the parameters; nbclient runs the cells. The kernel is the Python that
runs this process.
"""

import ast
import difflib
import logging
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import MendkitError
from ..places import project_path
from ..strict_yaml import read_value

START_SECONDS = 120
IOPUB_SECONDS = 60  # a busy machine may be late with a cell's last output
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
PATHS = ("archive", "config", "data", "out", "sweep", "text")  # and all that end in _data
NULLABLE = ("archive", "text")
IN_THE_BOX = "smollm2-135m"  # the notebooks' archive; MENDKIT_ARCHIVE puts another in its place
NULL_WORDS = (None, "", "null", "None", "~")
TYPES = {"Optional": Optional} | {kind.__name__: kind for kind in (bool, int, float, list, str)}


@dataclass(frozen=True)
class Parameter:
    """A name that a notebook's cell tagged `parameters` assigns, with its annotation."""

    name: str
    annotation: Any  # a type; an optional one may be null
    default: Any = None

    def read(self, given: Any) -> Any:
        """The value that is meant by `given`, a text or what papermill makes of one.

        Text for a number, a truth value or a list is read as YAML; a list may also be words.
        Raises MendkitError.
        """
        optional = self.name in NULLABLE or type(None) in get_args(self.annotation)
        if optional and given in NULL_WORDS:
            return None
        value, is_list = given, list in (self.annotation, get_origin(self.annotation))
        try:
            if str in (self.annotation, *get_args(self.annotation)) and not is_list:
                value = str(given) if type(given) in (int, float) else given
                if not str(value).strip():
                    raise ValueError("non-empty text")
            elif isinstance(given, str):
                value = _words(given) if is_list else read_value(given)
            elif is_list and isinstance(given, int | float):
                value = [given]
            return self._adapter().validate_python(value, strict=True)
        except ValidationError as error:
            fault = error.errors()[0]["msg"].removeprefix("Input should be ")
        except ValueError as error:
            fault = str(error)
        raise MendkitError(f"{self.name} must be {fault}, got {given!r}")

    def _adapter(self) -> Any:
        """What checks a value. A limit of 0 means no limit; other integers begin with 1."""
        annotation = self.annotation
        if annotation is int:
            least = 0 if self.name.endswith("limit") else 1
            annotation = Annotated[int, Field(ge=least)]
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def _words(text: str) -> Any:
    """A list from YAML such as `[1, 2]`, or from words; settings (`key=value`) keep commas."""
    if text.lstrip().startswith("["):
        return read_value(text)
    if "=" in text:
        return shlex.split(text)
    return [read_value(word) for word in re.split(r"[,\s]+", text.strip()) if word]


def check_parameters(namespace: dict[str, Any]) -> None:
    """Check a notebook's parameters (`globals()`) by the rules of the command line, in place.

    Afterwards they have their annotated types, and paths are those of `project_path`. Raises
    MendkitError for a value that means none, and for what papermill set that is no parameter.
    """
    annotations = namespace["__annotations__"]
    for name in _injected(namespace.get("In", ())):
        if name not in annotations:
            near = difflib.get_close_matches(name, annotations, 1, 0.4) or [*annotations]
            raise MendkitError(f"unknown parameter {name!r}; did you mean {' or '.join(near)}?")
    for name, annotation in annotations.items():
        value = Parameter(name, annotation).read(namespace[name])
        if name == "archive" and value == IN_THE_BOX:
            value = os.environ.get("MENDKIT_ARCHIVE") or value
        if value is not None and (name in PATHS or name.endswith("_data")):
            value = str(project_path(value))
        namespace[name] = value


def _injected(sources: Sequence[str]) -> list[str]:
    """The names that papermill's cell assigns, of the cells that have run."""
    names = []
    for source in sources:
        if source.startswith("# Parameters\n"):
            names += re.findall(r"^(\w+) = ", source, re.MULTILINE)
    return names


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, by name.

    Raises MendkitError if it is no notebook, or has no cell tagged `parameters`.
    """
    if not path.is_file():
        raise MendkitError(
            f"{path}: no such notebook; run in a checkout of mendkit, or install it anew"
        )
    try:
        import papermill
    except ImportError as error:
        extra = 'the extra `notebooks`: in a checkout `pip install -e ".[notebooks]"`'
        raise MendkitError(f"{error}; notebooks need {extra}") from None
    try:
        # papermill formats paths: braces must be doubled
        inspected = papermill.inspect_notebook(str(path).replace("{", "{{").replace("}", "}}"))
        found = {name: _parameter(**about) for name, about in inspected.items()}
    except Exception as error:  # papermill has no error of its own for what is no notebook
        raise MendkitError(f"{path}: not a notebook with Python parameters: {error!r}") from None
    if not found:
        raise MendkitError(f"{path}: no cell tagged `parameters` that assigns one")
    return found


def _parameter(*, name: str, inferred_type_name: str, default: str, help: str) -> Parameter:
    """A parameter as papermill describes it; without annotation its default tells its type."""
    value = ast.literal_eval(default)
    if inferred_type_name == "None":
        return Parameter(name, type(value), value)
    # papermill's pattern lets names and brackets through, and nothing that could be called
    return Parameter(name, eval(inferred_type_name, {"__builtins__": {}}, TYPES), value)


@dataclass(frozen=True)
class Failure:
    """Why a notebook did not end well; `cell` counts its code cells from 1 as executed."""

    notebook: str
    cell: int | None  # None: in no cell
    error: str
    source: str = ""  # of the cell
    interrupted: bool = False  # by the user

    @property
    def where(self) -> str:
        """Notebook and cell, for people."""
        place = f"code cell {self.cell}" if self.cell else "outside of its cells"
        return f"{self.notebook}, {place}"


def run_notebook(
    path: Path,
    executed: Path,
    parameters: Mapping[str, Any],
    *,
    page: Path,
    show: Callable[[str], None] = lambda line: None,
    cell_seconds: int | None = None,
) -> Failure | None:
    """Execute a notebook in a kernel of its own; None if it ran to its end.

    It is saved as `executed` after every cell, and as HTML (`page`) at the end, so a failure leaves
    what was done by then. What the kernel wrote past the notebook is in a `.log` beside it. `show`
    gets the live line; `cell_seconds` limits every cell.
    """
    import nbformat

    number, source, fault, interrupted = 0, "", "", False
    log = executed.with_suffix(".log")
    with log.open("wb") as file:
        try:
            client = _client(path, parameters, show)
            client.timeout = cell_seconds
            with client.setup_kernel(stdout=file, stderr=file):
                for index, cell in enumerate(client.nb.cells):
                    if cell.cell_type == "code":
                        number, source = number + 1, cell.source
                    try:
                        client.execute_cell(cell, index)
                    finally:
                        nbformat.write(client.nb, executed)
        except KeyboardInterrupt:
            fault, interrupted = "interrupted", True
            # The cell's tasks see the kernel die, and nobody is left to hear of it.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        except Exception as error:  # whatever it is, the report must be finished and say so
            lines = str(error).strip().splitlines() or [""]
            fault = f"{type(error).__name__}: {lines[0]}"
            if hasattr(error, "ename") and hasattr(error, "evalue"):  # of a cell
                fault = ANSI.sub("", f"{error.ename}: {error.evalue}").strip()
    if not fault or not log.stat().st_size:
        log.unlink()
    unwritten = _export(executed, page) if executed.is_file() else ""
    if fault:
        return Failure(path.stem, number or None, fault, source, interrupted)
    return Failure(path.stem, None, unwritten) if unwritten else None


def _client(path: Path, parameters: Mapping[str, Any], show: Callable[[str], None]) -> Any:
    """What runs the notebook's cells, with the parameters set, and passes the live line on."""
    from nbclient import NotebookClient
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    class LiveClient(NotebookClient):
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            # the live line is a display that is updated, so it has an id
            content = msg["content"]
            line = content.get("data", {}).get("text/markdown")
            if line and content.get("transient", {}).get("display_id"):
                show(f"cell {cell_index + 1}/{len(self.nb.cells)}: {line.strip()}")
            return super().process_message(msg, cell, cell_index)

    kernel = {"kernel_name": "python3", "language": "python"}
    notebook = parameterize_notebook(load_notebook_node(str(path)), dict(parameters), **kernel)
    client = LiveClient(notebook, kernel_name="python3", coalesce_streams=True)
    client.startup_timeout, client.iopub_timeout = START_SECONDS, IOPUB_SECONDS
    return client


def _export(executed: Path, page: Path) -> str:
    """Write an executed notebook as HTML, text and outputs without code; why that failed.

    Links to notebooks lead to their pages, and one on top to the report's.
    """
    import nbformat
    from nbconvert import HTMLExporter

    hidden = dict.fromkeys(["exclude_input", "exclude_input_prompt", "exclude_output_prompt"], True)
    template = Path(__file__).parent / "templates" / "notebook.html.j2"
    try:
        notebook = nbformat.read(executed, as_version=4)
        notebook.metadata["title"] = notebook.cells[0].source.partition("\n")[0].lstrip("# ")
        exporter = HTMLExporter(template_file=str(template), **hidden)
        text, _ = exporter.from_notebook_node(notebook)
        text = re.sub(r'href="(\w+)\.ipynb"', r'href="\1.html"', text)
        if page.name != "index.html":
            text = text.replace("<main>", '<main><p><a href="index.html">← the report</a></p>', 1)
        page.write_text(text, encoding="utf-8")
    except Exception as error:  # the rest of the report is still worth having
        return f"export to HTML: {type(error).__name__}: {error}"
    return ""
