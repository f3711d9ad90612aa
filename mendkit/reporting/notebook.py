"""One notebook: its parameters, its run in a kernel of its own, its page in HTML.

papermill inspects and runs it. The kernel is the Python that runs this process: jupyter_client
puts it in the place of `python` in the kernel's command.
"""

import ast
import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from ..errors import MendkitError
from .page import TEMPLATES

START_SECONDS = 120
IOPUB_SECONDS = 60  # a busy machine may be late with a cell's last output
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

# how a value of each kind is read from JSON, and what is expected in words
PARAMETER_KINDS: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"),
    "int": (PositiveInt, "an integer of at least 1"),
    "limit": (NonNegativeInt, "an integer of at least 0"),  # 0: no limit
    "float": (FiniteFloat, "a finite number"),
    "list": (list, "a JSON list"),
    "str": (str, "non-empty text"),  # taken as it is; blank text is no JSON
}


@dataclass(frozen=True)
class Parameter:
    """A name that a notebook's cell tagged `parameters` assigns, with its annotation."""

    name: str
    kind: str  # of PARAMETER_KINDS
    optional: bool  # may be null
    default: Any

    def parse(self, text: str) -> Any:
        """The value that `text` means. Raises MendkitError for text that means none."""
        if self.optional and text in ("null", "None", "~", ""):
            return None
        if self.kind == "str" and text.strip():
            return text
        annotation, expected = PARAMETER_KINDS[self.kind]
        try:
            return TypeAdapter(annotation).validate_json(text, strict=True)
        except ValidationError:
            raise MendkitError(f"{self.name} must be {expected}, got {text!r}") from None


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, by name.

    Raises MendkitError if it is no notebook, or has no cell tagged `parameters`.
    """
    if not path.is_file():
        raise MendkitError(f"{path}: no such notebook; run in a checkout of mendkit")
    try:
        import papermill
    except ImportError as error:
        install = 'pip install -c constraints.txt -e ".[notebooks]"'
        raise MendkitError(f"{error}; notebooks need `{install}`") from None
    try:
        inspected = papermill.inspect_notebook(_braced(path))
        found = {name: _parameter(**about) for name, about in inspected.items()}
    except Exception as error:  # papermill has no error of its own for what is no notebook
        raise MendkitError(f"{path}: not a notebook with Python parameters: {error!r}") from None
    if not found:
        raise MendkitError(f"{path}: no cell tagged `parameters` that assigns one")
    return found


def _parameter(*, name: str, inferred_type_name: str, default: str, help: str) -> Parameter:
    """A parameter as papermill describes it; without annotation its default tells its kind."""
    value = ast.literal_eval(default)
    kind = inferred_type_name
    if kind == "None":
        kind = type(value).__name__
    inside = kind.removeprefix("Optional[")
    plain = re.split(r"[\[\]]", inside)[0]  # list[str] is a list
    if plain == "int" and name.endswith("_limit"):
        plain = "limit"
    return Parameter(name, plain, inside != kind, value)


# ------------------------------------------------------------------------------------------ running


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
    show: Callable[[str], None] = lambda line: None,
    cell_seconds: int | None = None,
) -> Failure | None:
    """Execute a notebook in a kernel of its own; None if it ran to its end.

    It is saved as `executed` after every cell, so a failure leaves what was done by then. What
    the kernel wrote past the notebook is in a `.log` beside it. `show` gets the live line;
    `cell_seconds` limits every cell.
    """
    import papermill

    log, fault, interrupted = executed.with_suffix(".log"), "", False
    try:
        with log.open("wb") as file:
            papermill.engines.papermill_engines.register("mendkit", _engine(show, file))
            papermill.execute_notebook(
                _braced(path),
                _braced(executed),
                parameters=dict(parameters),
                engine_name="mendkit",
                kernel_name="python3",
                language="python",
                progress_bar=False,
                execution_timeout=cell_seconds,
            )
    except KeyboardInterrupt:
        fault, interrupted = "interrupted", True
    except Exception as error:  # whatever it is, the report must be finished and say so
        lines = str(error).strip().splitlines() or [""]
        fault = f"{type(error).__name__}: {lines[0]}"
        if hasattr(error, "ename") and hasattr(error, "evalue"):  # of a cell
            fault = ANSI.sub("", f"{error.ename}: {error.evalue}").strip()
    cell, source, ended = _reached(executed)
    if not fault and not ended:  # papermill takes `exit()` for an end
        fault = "it exited before its last cell"
    if not fault or not log.stat().st_size:
        log.unlink()
    return Failure(path.stem, cell, fault, source, interrupted) if fault else None


def _engine(show: Callable[[str], None], log: BinaryIO) -> type:
    """papermill's engine, which passes the live line on and keeps the kernel's last words."""
    import zmq
    from jupyter_core.utils import ensure_event_loop
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine

    class LiveClient(PapermillNotebookClient):
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            # the live line is a display that is updated, so it has an id
            content = msg["content"]
            line = content.get("data", {}).get("text/markdown")
            if line and content.get("transient", {}).get("display_id"):
                show(f"cell {cell_index + 1}/{len(self.nb.cells)}: {line.strip()}")
            return super().process_message(msg, cell, cell_index)

        def papermill_execute_cells(self) -> None:
            try:
                super().papermill_execute_cells()
            except KeyboardInterrupt:
                # The cell's tasks are still on the loop, on which the kernel is ended next. They
                # would see it dead and fail with nobody to hear of it.
                loop = ensure_event_loop()
                tasks = asyncio.all_tasks(loop)
                for task in tasks:
                    task.cancel()
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
                raise

    class LiveEngine(Engine):
        @classmethod
        def execute_managed_notebook(
            cls, nb_man: Any, kernel_name: str, *, execution_timeout: int | None, **_: Any
        ) -> Any:
            client = LiveClient(
                nb_man,
                kernel_name=kernel_name,
                timeout=execution_timeout,
                startup_timeout=START_SECONDS,
                iopub_timeout=IOPUB_SECONDS,
                coalesce_streams=True,
            )
            encryption = "auto" if zmq.has("curve") else "disabled"
            return client.execute(stdout=log, stderr=log, transport_encryption=encryption)

    return LiveEngine


def _reached(executed: Path) -> tuple[int | None, str, bool]:
    """The last code cell that began: its number, its source, and whether none is left."""
    import nbformat

    if not executed.is_file():
        return None, "", False
    cells = nbformat.read(executed, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    begun = [cell for cell in code if cell.metadata.papermill.start_time]
    source = begun[-1].source if begun else ""
    return len(begun) or None, source, len(begun) == len(code)


def _braced(path: Path) -> str:
    """papermill formats paths: braces must be doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")


def export_html(executed: Path, html: Path) -> None:
    """Write an executed notebook as one HTML file: text and outputs, no code."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_file=str(TEMPLATES / "notebook.html.j2"),
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    text, _ = exporter.from_filename(str(executed))
    html.write_text(text, encoding="utf-8")
