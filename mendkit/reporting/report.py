"""The report: notebooks run in order, each in a kernel of its own, and a page over what they leave.

`plan_report` and `check_report` look at all that can be known without loading a model, and write
nothing. `run_report` does the work. Its folder holds run.json ("kind": "report"), the executed
notebooks with their HTML, a folder of each notebook's own files, the archive, results.json and
index.html. A log stands beside a failed notebook if its kernel wrote one, such as its last words.
"""

from __future__ import annotations

import difflib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.files import Examples, read_examples
from ..errors import MendkitError
from ..hparams import ALIASES, NO_EFFECT, MENDHyperParams, parse_overrides
from ..runs import Progress, clock, locked, provenance, write_json
from .notebook import Failure, Parameter, export_html, read_parameters, run_notebook
from .page import write_page

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = Path("configs/smollm2-135m.yaml")
TRAIN, EDIT = "01_train_without_archive", "02_edit_with_archive"
ARCHIVE = "archive.safetensors"
SET_HERE = ("config", "overrides", "archive", "out")  # notebook parameters that the report sets


def default_config() -> Path:
    """The default model's configuration: below the working directory, else in the checkout."""
    return CHECKOUT / CONFIG if (CHECKOUT / CONFIG).is_file() and not CONFIG.is_file() else CONFIG


def default_notebook(stem: str) -> Path:
    """A notebook of the kit: below the working directory, else in the checkout."""
    here = Path("notebooks", f"{stem}.ipynb")
    return here if here.is_file() else CHECKOUT / here


@dataclass(frozen=True)
class ReportPlan:
    """A report that would run; its names and values are checked."""

    config: Path
    settings: tuple[str, ...]  # hyperparameters, as "key=value"
    given: Mapping[str, Any]  # notebook parameters by name
    hparams: MENDHyperParams
    notebooks: Mapping[str, Mapping[str, Parameter]]  # parameters of those that run, in order
    out: Path

    def data(self) -> list[tuple[str, int | None]]:
        """Every data set that is read: a file or facts:…, and how many of its first examples.

        Those for training and its validation come first.
        """
        found = []
        for known in self.notebooks.values():
            values = {name: self.given.get(name, p.default) for name, p in known.items()}
            for name in values:
                role, _, rest = name.rpartition("_")
                if rest == "data":
                    found.append((values[name], values.get(f"{role}_limit") or None))
        return found


@dataclass(frozen=True)
class Report:
    """A finished report, or one that stopped at `failure`."""

    index: Path
    results: Mapping[str, Any]
    failure: Failure | None


# ----------------------------------------------------------------------------------------- checking


def plan_report(config: str | Path, settings: Sequence[str] = (), *, out: str | Path) -> ReportPlan:
    """The report that would run; `settings` are texts "key=value".

    Keys are hyperparameters and parameters of notebooks. No data, archive, model or folder is
    looked at. Raises MendkitError or HyperParamError for unknown names and mistyped values.
    """
    known = {stem: read_parameters(default_notebook(stem)) for stem in (TRAIN, EDIT)}
    given, overrides = _sorted_settings(settings, known[TRAIN] | known[EDIT])
    hparams = MENDHyperParams.from_hparams(config, **parse_overrides(overrides))
    if hparams.archive is not None:
        del known[TRAIN]
        for name in given:
            if name not in known[EDIT]:
                raise MendkitError(
                    f"{name} is a parameter of {TRAIN}, which runs only with `archive=null`"
                )
    return ReportPlan(Path(config), tuple(overrides), given, hparams, known, Path(out))


def _sorted_settings(
    settings: Sequence[str], known: Mapping[str, Parameter]
) -> tuple[dict[str, Any], list[str]]:
    """Notebook parameters with their values, and hyperparameters as given."""
    parameters = {name: p for name, p in known.items() if name not in SET_HERE}
    names = {*parameters, *MENDHyperParams.model_fields, *ALIASES, *NO_EFFECT}
    given: dict[str, Any] = {}
    overrides: list[str] = []
    for text in settings:
        key, equals, value = (part.strip() for part in text.partition("="))
        near = difflib.get_close_matches(key, sorted(names), 1, 0.5)
        if key in given:
            raise MendkitError(f"{text!r}: {key} is given twice")
        if equals and key in parameters:
            given[key] = parameters[key].parse(value)
        elif equals and key not in names and near and near[0] in parameters:
            raise MendkitError(
                f"unknown name {key!r}; the nearest is the notebook parameter {near[0]!r}"
            )
        else:
            overrides.append(text)
    return given, overrides


def check_report(plan: ReportPlan) -> list[Examples]:
    """Look at the folder and read all data; the data sets in the order of `plan.data()`.

    Raises MendkitError for a folder in use or of something else than a report, and for an input
    inside of it, which the new report might remove; DataError for data that cannot be read.
    """
    if plan.out.exists() and not plan.out.is_dir():
        raise MendkitError(f"{plan.out} is a file; name a folder with --out")
    with locked(plan.out):
        _earlier_report(plan.out)
    inputs = [plan.config, *(Path(source) for source, _ in plan.data())]
    if plan.hparams.archive and not _same(plan.hparams.archive, plan.out / ARCHIVE):
        inputs.append(Path(plan.hparams.archive))
    for path in inputs:
        if path.resolve().is_relative_to(plan.out.resolve()):
            raise MendkitError(
                f"{path} is in {plan.out}, whose report would be replaced; use another folder "
                f"(--out), or the archive as {plan.out / ARCHIVE}"
            )
    return [read_examples(source, limit=limit) for source, limit in plan.data()]


def _same(a: str | Path, b: str | Path) -> bool:
    return Path(a).resolve() == Path(b).resolve()


def _earlier_report(out: Path) -> list[Path]:
    """What an earlier report left in the folder. Raises MendkitError if it holds something else."""
    if not out.exists() or not any(out.iterdir()):
        return []
    if read_json(out / "run.json").get("kind") != "report":
        raise MendkitError(
            f"{out} holds files but no report; nothing was touched: give --out a new folder"
        )
    names = ["run.json", "results.json", "index.html", ARCHIVE]
    for stem in (TRAIN, EDIT):
        names += [stem, f"{stem}.ipynb", f"{stem}.html", f"{stem}.log"]
    return [out / name for name in names if (out / name).exists()]


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


# ------------------------------------------------------------------------------------------ running


def run_report(plan: ReportPlan, *, command: str = "", cell_seconds: int | None = None) -> Report:
    """Run a plan; `command` is the command line that the page shows.

    A notebook that fails keeps what it did, later ones do not run, and the page is written anyway.
    `cell_seconds` limits every cell. Raises MendkitError if another process writes to the folder,
    or nobody can.
    """
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        with locked(plan.out):
            run = _begin(plan, command)
            return _run_all(plan, run, cell_seconds)
    except OSError as error:
        raise MendkitError(
            f"cannot write the report to {plan.out}: {error}; name another folder with --out"
        ) from None


def _begin(plan: ReportPlan, command: str) -> dict[str, Any]:
    """Remove the earlier report, mark the folder as a report; what run.json holds."""
    given = [f"{name}={value}" for name, value in plan.given.items()]
    run = {"kind": "report", "status": "running", "command": command, "config": str(plan.config)}
    run |= {"settings": [*plan.settings, *given], "notebooks": list(plan.notebooks)}
    run |= {"hparams": plan.hparams.to_dict(), **provenance()}
    old = _earlier_report(plan.out)
    # The mark is written before anything is removed, so that the folder is known at all times.
    keep = [write_json(plan.out / "run.json", run), Path(plan.hparams.archive or "")]
    for path in old:
        if any(_same(path, kept) for kept in keep):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return run


def _run_all(plan: ReportPlan, run: dict[str, Any], cell_seconds: int | None) -> Report:
    """Run the notebooks until one fails; write run.json, results.json and the page."""
    start, failure, archive = time.perf_counter(), None, plan.hparams.archive
    results: dict[str, Any] = {}
    for stem in plan.notebooks:
        if archive and not _same(archive, plan.out / ARCHIVE):
            shutil.copy2(archive, plan.out / ARCHIVE)
        logger.info("%s: running", stem)
        failure = _run_one(plan, stem, archive, cell_seconds)
        ended = f"failed, {failure.where}" if failure else "done"
        logger.info("%s: %s at %s", stem, ended, clock(time.perf_counter() - start))
        results |= read_json(plan.out / stem / "results.json")
        if failure:
            results["failed"] = stem
            break
        archive = archive or str(plan.out / stem / ARCHIVE)
    peaks = [results.get(name, 0.0) for name in ("train.peak_memory_gb", "peak_memory_gb")]
    results |= {"report.seconds": time.perf_counter() - start, "report.peak_memory_gb": max(peaks)}
    run["status"] = "failed" if failure else "done"
    run["failure"] = asdict(failure) if failure else None
    write_json(plan.out / "run.json", run)
    write_json(plan.out / "results.json", results)
    return Report(write_page(plan.out, run, results), results, failure)


def _run_one(
    plan: ReportPlan, stem: str, archive: str | None, cell_seconds: int | None
) -> Failure | None:
    """Run a notebook and export it; it must end by itself and leave what is expected of it."""
    folder, executed = plan.out / stem, plan.out / f"{stem}.ipynb"
    folder.mkdir()
    values = {"config": str(plan.config), "archive": archive, "out": str(folder), **plan.given}
    values["overrides"] = [*plan.settings]
    if stem == EDIT:  # which has `archive` as a parameter
        values["overrides"] = [
            text for text in plan.settings if text.partition("=")[0].strip() != "archive"
        ]
    progress = Progress(stem[:2])
    failure = run_notebook(
        default_notebook(stem),
        executed,
        {name: value for name, value in values.items() if name in plan.notebooks[stem]},
        show=progress.show,
        cell_seconds=cell_seconds,
    )
    progress.close()
    for name in ("results.json", ARCHIVE) if stem == TRAIN else ("results.json",):
        if failure is None and not (folder / name).is_file():
            failure = Failure(stem, None, f"it ended without writing {folder / name}")
    return export_page(executed, executed.with_suffix(".html"), failure)


def export_page(executed: Path, page: Path, failure: Failure | None) -> Failure | None:
    """Write the page of an executed notebook, if there is one; `failure`, or why that failed."""
    try:
        if executed.is_file():
            export_html(executed, page)
    except Exception as error:  # the rest of the report is still worth having
        words = f"export to HTML: {type(error).__name__}: {error}"
        failure = failure or Failure(executed.stem, None, words)
    return failure
