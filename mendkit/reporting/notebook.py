"""One notebook: its parameters, its run in a kernel of its own, its export.

papermill runs it; around that stands what papermill leaves open. Parameters are read from the syntax tree
of the cell tagged `parameters` (papermill's inspector does not see `int | None`) and typed by it, so that a
wrong name or value is refused before a kernel starts. The kernel is the interpreter that runs this process,
whatever kernels are registered. The notebook's live line, a display that is updated, is passed on to the
terminal. A failing cell, a dead kernel, a time-out and an interrupt are told apart from success.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import MendkitError

CHECKOUT = Path(__file__).resolve().parents[2]
IOPUB_SECONDS = 60  # a busy machine may be late with a cell's last output
START_SECONDS = 120
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_INSTALL = 'notebooks need more packages: pip install -c constraints.txt -e ".[notebooks]"'


@dataclass(frozen=True)
class Parameter:
    """A name assigned in the cell tagged `parameters`; `kinds` are its types' names, "None" for null."""

    name: str
    kinds: frozenset[str]
    default: Any

    def parse(self, text: str) -> Any:
        """The value that `text` means; integers are counts. Raises MendkitError for text that is none."""
        least = 0 if self.name.endswith("_limit") else 1  # 0: no limit
        if "None" in self.kinds and text in ("null", "None", "~", ""):
            return None
        for kind in ("bool", "int", "float", "list", "str"):
            if kind in self.kinds:
                try:
                    value = _READ[kind](text)
                    if kind == "int" and value < least:
                        raise ValueError
                    return value
                except ValueError:
                    continue
        expected = " or ".join(_WORDS[kind].format(least) for kind in _WORDS if kind in self.kinds)
        raise MendkitError(f"{self.name} must be {expected}, got {text!r}")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def _list(text: str) -> list[Any]:
    if not isinstance(value := json.loads(text), list):
        raise ValueError
    return value


def _bool(text: str) -> bool:
    return bool(("false", "true").index(text))  # a ValueError for all other text


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text


_READ: dict[str, Callable[[str], Any]] = {
    "bool": _bool, "int": int, "float": _float, "list": _list, "str": _filled,
}  # fmt: skip
_WORDS = {
    "bool": "true or false", "int": "an integer of at least {}", "float": "a finite number",
    "list": "a JSON list", "str": "non-empty text", "None": "null",
}  # fmt: skip


def read_parameters(path: str | Path) -> dict[str, Parameter]:
    """The parameters of a notebook. Raises MendkitError if it is none, or has no cell tagged `parameters`."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
        cells = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", ())]
        body = ast.parse("".join(cells[0]["source"])).body if cells else []
    except OSError as error:
        raise MendkitError(
            f"{path}: cannot be read ({error.strerror}); run in a checkout of mendkit"
        ) from None
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise MendkitError(
            f"{path}: not a notebook, or its parameters are not Python: {error!r}"
        ) from None
    found = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and getattr(node, "value", None) is not None:
            default = ast.literal_eval(node.value)
            found[target.id] = Parameter(
                target.id, _kinds(getattr(node, "annotation", None), default), default
            )
    if not found:
        raise MendkitError(f"{path}: no cell tagged `parameters` that assigns one")
    return found


def _kinds(annotation: ast.expr | None, default: Any) -> frozenset[str]:
    if annotation is None:
        return frozenset({type(default).__name__.replace("NoneType", "None")})
    if isinstance(annotation, ast.Subscript):  # list[str], Optional[int]
        head = ast.unparse(annotation.value).split(".")[-1]
        return (
            _kinds(annotation.slice, None) | {"None"} if head == "Optional" else frozenset({head})
        )
    if isinstance(annotation, ast.BinOp):
        return _kinds(annotation.left, None) | _kinds(annotation.right, None)
    text = annotation.value if isinstance(annotation, ast.Constant) else None
    if isinstance(text, str):
        return _kinds(ast.parse(text, mode="eval").body, None)
    return frozenset({ast.unparse(annotation)})


# ---------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Failure:
    """Why a notebook did not end well; `cell` counts its code cells from 1 as executed, None: in no cell."""

    notebook: str
    cell: int | None
    error: str
    source: str = ""  # of the cell
    interrupted: bool = False  # by the user

    @property
    def where(self) -> str:
        """Notebook and cell, for people."""
        return (
            f"{self.notebook}, code cell {self.cell}"
            if self.cell
            else f"{self.notebook}, outside of its cells"
        )


@dataclass
class _Place:
    """The cell that runs."""

    number: int | None = None
    of: int = 0
    source: str = ""


def run_notebook(
    path: str | Path,
    executed: str | Path,
    parameters: Mapping[str, Any],
    /,
    *,
    show: Callable[[str], None] = lambda line: None,
    cell_seconds: int | None = None,
) -> Failure | None:
    """Execute a notebook with `parameters` in a kernel of its own; None if it ran to its end.

    Saves it as `executed` after every cell, so that a failure leaves what was done by then, and
    what the kernel wrote past it in a `.log` beside it. It runs in the working directory. `show` gets
    the live line; `cell_seconds` limits every cell. Raises MendkitError if papermill is not installed.
    """
    papermill = _import_papermill()
    place, name, log = _Place(), Path(path).stem, Path(executed).with_suffix(".log")
    failure = None
    try:
        with log.open("wb") as file:
            papermill.engines.papermill_engines.register("mendkit", _engine(place, show, file))
            _execute(papermill, path, executed, parameters, cell_seconds)
        if (place.number or 0) < place.of:  # papermill takes `exit()` for an end
            failure = Failure(name, place.number, "it exited before its last cell", place.source)
    except KeyboardInterrupt:
        failure = Failure(name, place.number, "interrupted", place.source, interrupted=True)
    except Exception as error:  # whatever it is, the report must be finished and say so
        failure = Failure(name, place.number, _message(error), place.source)
    if failure is None or (log.is_file() and not log.stat().st_size):
        log.unlink()
    return failure


def _execute(
    papermill: Any,
    path: str | Path,
    executed: str | Path,
    parameters: Mapping[str, Any],
    cell_seconds: int | None,
) -> None:
    papermill.execute_notebook(
        _braced(path), _braced(executed), parameters=dict(parameters), engine_name="mendkit",
        kernel_name="python3", language="python", progress_bar=False, start_timeout=START_SECONDS,
        execution_timeout=cell_seconds, iopub_timeout=IOPUB_SECONDS, coalesce_streams=True,
    )  # fmt: skip


def _import_papermill() -> Any:
    try:
        import papermill
        import papermill.engines
    except ImportError as error:
        raise MendkitError(f"{error}; {_INSTALL}") from error
    return papermill


def _braced(path: str | Path) -> str:
    """papermill formats paths: braces must be doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _message(error: Exception) -> str:
    """The last word of an error: name and value in a cell, else the first line."""
    if hasattr(error, "ename"):
        return _ANSI.sub("", f"{error.ename}: {error.evalue}").strip()
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _engine(place: _Place, show: Callable[[str], None], log: BinaryIO) -> type:
    """papermill's engine with the kernel of this interpreter, and a client that tells place and live line."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine

    class Client(PapermillNotebookClient):
        def execute_cell(self, cell: Any, cell_index: int, *args: Any, **kwargs: Any) -> Any:
            if cell.cell_type == "code":
                place.number = sum(c.cell_type == "code" for c in self.nb.cells[: cell_index + 1])
                place.of = sum(c.cell_type == "code" for c in self.nb.cells)
                place.source = cell.source
                show(f"cell {place.number}/{place.of}")
            return super().execute_cell(cell, cell_index, *args, **kwargs)

        def process_message(self, msg: Mapping[str, Any], *args: Any) -> Any:
            content = msg["content"]
            if content.get("transient", {}).get("display_id") and "text/markdown" in content.get(
                "data", {}
            ):
                show(f"cell {place.number}/{place.of}: {content['data']['text/markdown'].strip()}")
            return super().process_message(msg, *args)

    class LiveEngine(Engine):
        @classmethod
        def execute_managed_notebook(
            cls, nb_man: Any, kernel_name: str, *, start_timeout: int, execution_timeout: int | None,
            iopub_timeout: int, coalesce_streams: bool, **_: Any,
        ) -> Any:  # fmt: skip
            """Run the notebook; papermill calls it so."""
            client = Client(
                nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, timeout=execution_timeout,
                iopub_timeout=iopub_timeout, coalesce_streams=coalesce_streams,
                kernel_manager_class=_kernel_manager(),
            )  # fmt: skip
            return client.execute(stdout=log, stderr=log)

    return LiveEngine


def _kernel_manager() -> type:
    """A manager of kernels of this interpreter that import this very package; encrypted where possible."""
    import zmq
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    spec = KernelSpec(**get_kernel_dict())
    spec.argv[0] = sys.executable
    if (CHECKOUT / "pyproject.toml").is_file():
        paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
        spec.env = {**spec.env, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        @default("transport_encryption")
        def _encryption(self) -> str:
            return "auto" if zmq.has("curve") else "disabled"

    return ThisPython


def export_html(executed: str | Path, html: str | Path, /) -> Path:
    """An executed notebook as one HTML file: text and outputs, no code; a picture's text becomes its alt."""
    try:
        import nbformat
        from nbconvert import HTMLExporter
    except ImportError as error:
        raise MendkitError(f"{error}; {_INSTALL}") from error
    notebook = nbformat.read(executed, as_version=4)
    for output in (o for cell in notebook.cells for o in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            width = output.metadata.get("image/png", {}).get("width", "")
            source = f"data:image/png;base64,{''.join(output.data['image/png'].split())}"
            alt = escape(output.data.get("text/plain", "figure"))
            output.data = {"text/html": f'<img alt="{alt}" width="{width}" src="{source}">'}
    exporter = HTMLExporter(
        exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    text, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": Path(executed).stem}})
    Path(html).write_text(text, encoding="utf-8")
    return Path(html)
