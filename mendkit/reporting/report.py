"""The report: notebooks run in order, each in a kernel of its own, and a page over what they leave.

`plan_report` checks everything that can be checked before a kernel starts and writes nothing; `run_report`
does the work. Its folder afterwards (an earlier report is replaced, a folder of anything else refused):

    run.json                    "kind": "report", what ran, versions; the mark by which the folder is known
    <notebook>.ipynb, .html     as executed, up to the cell that failed if one did
    <notebook>.log              what its kernel wrote past it, such as the last words of one that died
    <notebook>/                 what the notebook wrote itself: results.json, figures/, ...
    archive.safetensors         the archive that was trained or used
    results.json                flat numbers of all notebooks, "failed": "<notebook>" if one did
    index.html                  the page over it all
"""

from __future__ import annotations

import difflib
import gc
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cost.plan import check_memory
from ..data.files import read_examples
from ..errors import MendkitError
from ..hparams import ALIASES, NO_EFFECT, MENDHyperParams, parse_overrides
from ..mend.archive import inspect_archive, load_archive
from ..mend.files import make_folder
from ..mend.loggers import check_logger
from ..models.load import load_model
from ..runs import Progress, clock, locked, provenance, write_json
from .notebook import CHECKOUT, Failure, Parameter, export_html, read_parameters, run_notebook
from .page import write_page

logger = logging.getLogger(__name__)

CONFIG = Path("configs/smollm2-135m.yaml")
TRAIN, EDIT = "01_train_without_archive", "02_edit_with_archive"
ARCHIVE = "archive.safetensors"
OURS = ("config", "overrides", "archive", "out")  # notebook parameters that the report sets itself
SUFFIXES = ("", ".ipynb", ".html", ".log")  # of a notebook's stem
FILES = ("run.json", "results.json", "index.html", ARCHIVE)
PEAKS = ("train.peak_memory_gb", "peak_memory_gb")


def default_config() -> Path:
    """The default model's configuration: below the working directory, else in this package's checkout."""
    return CONFIG if CONFIG.is_file() or not (CHECKOUT / CONFIG).is_file() else CHECKOUT / CONFIG


def default_notebooks() -> Path:
    """The folder of the notebooks: below the working directory, else in the checkout of this package."""
    here = Path("notebooks")
    return here if (here / f"{EDIT}.ipynb").is_file() else CHECKOUT / "notebooks"


@dataclass(frozen=True)
class Plan:
    """A report that may run: checked, nothing written yet."""

    config: Path
    settings: tuple[str, ...]  # hyperparameters, as "key=value"
    given: Mapping[str, Any]  # notebook parameters by name
    hparams: MENDHyperParams
    notebooks: Mapping[str, Path]  # by stem, in order
    out: Path


@dataclass(frozen=True)
class Report:
    """A finished report, or one that stopped at `failure`."""

    index: Path
    results: Mapping[str, Any]
    failure: Failure | None


# --------------------------------------------------------------------------------------------------- checking


def plan_report(
    config: str | Path,
    settings: Sequence[str] = (),
    /,
    *,
    out: str | Path,
    notebooks_dir: str | Path | None = None,
    ignore_memory: bool = False,
) -> Plan:
    """Check a report: `settings` are hyperparameters and notebook parameters, each "key=value".

    Loads the model once (a first use fetches it here) and, if `archive` is set, holds the archive against it.
    Raises the kit's errors for unknown names, mistyped values, missing or bad files, an archive of another
    model, a folder that holds something else than a report, too little memory to train (unless `ignore_memory`).
    """
    plan = draft_report(config, settings, out=out, notebooks_dir=notebooks_dir)
    data = [read_examples(source, limit=limit) for source, limit in data_of(plan)]
    _check_folder(plan, [Path(source) for source, _ in data_of(plan)])
    if TRAIN in plan.notebooks and not ignore_memory:
        check_memory(plan.hparams, *data[:2], keep_trunk=True)
    _check_model(plan.hparams)
    return plan


def draft_report(
    config: str | Path,
    settings: Sequence[str] = (),
    /,
    *,
    out: str | Path,
    notebooks_dir: str | Path | None = None,
) -> Plan:
    """The report that would run: names and values are checked; no data, archive, model or folder is looked at yet."""
    folder = Path(notebooks_dir) if notebooks_dir is not None else default_notebooks()
    paths = {stem: folder / f"{stem}.ipynb" for stem in (TRAIN, EDIT)}
    known = {stem: read_parameters(path) for stem, path in paths.items()}
    given, overrides = _split(settings, known)
    hparams = MENDHyperParams.from_hparams(config, **parse_overrides(overrides))
    stems = (TRAIN, EDIT) if hparams.archive is None else (EDIT,)
    for name in given:
        if not any(name in known[stem] for stem in stems):
            raise MendkitError(
                f"{name} is a parameter of {TRAIN}, which runs only with `archive=null`; leave it out"
            )
    return Plan(
        Path(config),
        tuple(overrides),
        given,
        hparams,
        {stem: paths[stem] for stem in stems},
        Path(out),
    )


def _split(
    settings: Iterable[str], known: Mapping[str, Mapping[str, Parameter]]
) -> tuple[dict[str, Any], list[str]]:
    """Notebook parameters with their values, and hyperparameters as given."""
    names = {name: p for own in known.values() for name, p in own.items() if name not in OURS}
    others = {*MENDHyperParams.model_fields, *ALIASES, *NO_EFFECT}
    given: dict[str, Any] = {}
    overrides: list[str] = []
    for text in settings:
        key, equals, value = (part.strip() for part in text.partition("="))
        if equals and key in names:
            if key in given:
                raise MendkitError(f"{text!r}: {key} is given twice")
            given[key] = names[key].parse(value)
            continue
        close = difflib.get_close_matches(key.lower(), sorted({*names, *others}), 1, 0.5)
        if equals and key not in others and close and close[0] in names:
            raise MendkitError(
                f"unknown name {key!r} in {text!r}; the nearest is the notebook parameter {close[0]!r}"
            )
        overrides.append(text)
    return given, overrides


def data_of(plan: Plan) -> list[tuple[str, int | None]]:
    """Every data set that the notebooks will read: its file, or facts:…, and how many of its first examples. Those for
    training and its validation come first."""
    found = []
    for path in plan.notebooks.values():
        own = {name: plan.given.get(name, p.default) for name, p in read_parameters(path).items()}
        for name in (name for name in own if name.endswith("_data")):
            found.append((str(own[name]), own.get(f"{name.removesuffix('_data')}_limit") or None))
    return found


def _check_model(hparams: MENDHyperParams) -> None:
    check_logger(hparams.logger)
    if hparams.archive is not None:
        inspect_archive(hparams.archive)
    base = load_model(
        hparams.replace(device="cpu")
    )  # in the main memory: the kernels need the other one
    if hparams.archive is not None:
        load_archive(hparams.archive, base=base)
    del base
    gc.collect()


def _check_folder(plan: Plan, inputs: Iterable[Path]) -> None:
    if plan.out.exists() and not plan.out.is_dir():
        raise MendkitError(f"{plan.out} is a file; name a folder with --out")
    replaced = _earlier(plan.out)
    if replaced is None:
        raise MendkitError(
            f"{plan.out} holds files but no report; nothing was touched: give --out a new or empty folder"
        )
    archive = [Path(plan.hparams.archive)] if plan.hparams.archive else []
    for path in (plan.config, *inputs, *archive):
        keep = path in archive and _same(path, plan.out / ARCHIVE)
        if not keep and any(path.resolve().is_relative_to(old.resolve()) for old in replaced):
            raise MendkitError(
                f"{path} belongs to the earlier report in {plan.out}, which this one would replace; "
                f"use another folder (--out), or the archive as {plan.out / ARCHIVE}"
            )


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _earlier(out: Path) -> list[Path] | None:
    """What an earlier report left in the folder; empty for a new folder, None if it holds something else."""
    if not out.exists() or not any(out.iterdir()):
        return []
    try:
        ours = json.loads((out / "run.json").read_text(encoding="utf-8"))["kind"] == "report"
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        return None
    names = [*FILES, *(f"{stem}{suffix}" for stem in (TRAIN, EDIT) for suffix in SUFFIXES)]
    return [out / name for name in names if (out / name).exists()]


# ---------------------------------------------------------------------------------------------------- running


def run_report(plan: Plan, /, *, command: str = "", cell_seconds: int | None = None) -> Report:
    """Run a plan. A notebook that fails keeps what it did, later ones do not run; the page is written anyway.

    `command` is the command line that the page shows; `cell_seconds` limits every cell. Raises MendkitError
    if the folder cannot be written to, or another process writes to it.
    """
    with locked(make_folder(plan.out)):
        return _run(plan, command, cell_seconds)


def _run(plan: Plan, command: str, cell_seconds: int | None) -> Report:
    start = time.perf_counter()
    run = _open(plan, command)
    results: dict[str, Any] = {}
    failure, archive = None, plan.hparams.archive
    if archive is not None:
        _link(Path(archive), plan.out / ARCHIVE)
    for number, stem in enumerate(plan.notebooks, 1):
        head, began = f"[{number}/{len(plan.notebooks)}] {stem}", time.perf_counter()
        logger.info("%s: running", head)
        failure = _run_one(plan, stem, archive, cell_seconds)
        took = clock(time.perf_counter() - began)
        logger.info("%s: %s after %s", head, "failed" if failure else "done", took)
        results |= _read_results(plan.out / stem) or {}
        if failure:
            break
        if stem == TRAIN:
            archive = str(plan.out / stem / ARCHIVE)
            _link(Path(archive), plan.out / ARCHIVE)
    peaks = [results[name] for name in PEAKS if isinstance(results.get(name), int | float)]
    results |= {"report.seconds": time.perf_counter() - start}
    results |= {"report.peak_memory_gb": max(peaks)} if peaks else {}
    results |= {"failed": failure.notebook} if failure else {}
    run |= {
        "status": "failed" if failure else "done",
        "failure": asdict(failure) if failure else None,
    }
    write_json(plan.out / "run.json", run)
    write_json(plan.out / "results.json", results)
    return Report(write_page(plan.out, run, results), results, failure)


def _open(plan: Plan, command: str) -> dict[str, Any]:
    """Remove the earlier report, mark the folder as a report; what run.json holds."""
    run = {
        "kind": "report",
        "status": "running",
        "command": command,
        "config": str(plan.config),
        "settings": [*plan.settings, *(f"{name}={value}" for name, value in plan.given.items())],
        "notebooks": list(plan.notebooks),
        "hparams": plan.hparams.to_dict(),
        **provenance(),
    }
    try:
        old = _earlier(plan.out) or []
        marker = write_json(
            plan.out / "run.json", run
        )  # first, so that the folder is known at all times
        for path in old:
            if path == marker or (plan.hparams.archive and _same(path, Path(plan.hparams.archive))):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise MendkitError(
            f"cannot write the report to {plan.out}: {error}; name another folder with --out"
        ) from None
    return run


def _run_one(
    plan: Plan, stem: str, archive: str | None, cell_seconds: int | None
) -> Failure | None:
    """Run a notebook and export it; it must end by itself and leave what is expected of it."""
    folder, executed = plan.out / stem, plan.out / f"{stem}.ipynb"
    folder.mkdir()
    progress = Progress(stem[:2])
    failure = run_notebook(
        plan.notebooks[stem],
        executed,
        _parameters(plan, stem, archive),
        show=lambda line: progress.show(_fitted(line)),
        cell_seconds=cell_seconds,
    )
    progress.close()
    if failure is None and _read_results(folder) is None:
        failure = Failure(stem, None, f"it ended without writing {folder / 'results.json'}")
    if failure is None and stem == TRAIN and not (folder / ARCHIVE).is_file():
        failure = Failure(stem, None, f"it ended without writing {folder / ARCHIVE}")
    return export(executed, executed.with_suffix(".html"), failure)


def export(executed: Path, page: Path, failure: Failure | None, /) -> Failure | None:
    """Write the page of an executed notebook, if there is one; `failure`, or why that failed."""
    if executed.is_file():
        try:
            export_html(executed, page)
        except Exception as error:  # the rest of the report is still worth having
            failure = failure or Failure(
                executed.stem, None, f"export to HTML: {type(error).__name__}: {error}"
            )
    return failure


def _fitted(line: str) -> str:
    """A line that a terminal can rewrite in place: cut in the middle, for its ends say where it is and how long yet."""
    room = shutil.get_terminal_size().columns - 6
    if not sys.stderr.isatty() or len(line) <= room:
        return line
    return f"{line[: room // 2]} … {line[3 + room // 2 - room :]}"


def _parameters(plan: Plan, stem: str, archive: str | None) -> dict[str, Any]:
    """What the notebook gets: the report's own four, and those given that it knows."""
    known = read_parameters(plan.notebooks[stem])
    own = {"config": str(plan.config), "out": str(plan.out / stem), "archive": archive}
    own["overrides"] = [
        text
        for text in plan.settings
        if stem == TRAIN or text.partition("=")[0].strip() != "archive"
    ]
    return {name: value for name, value in {**plan.given, **own}.items() if name in known}


def _read_results(folder: Path) -> dict[str, Any] | None:
    """A notebook's flat results; None if it left none that can be read."""
    try:
        values = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _link(archive: Path, target: Path) -> None:
    """The archive under the report's own name: a hard link, or a copy where links cannot be made."""
    if _same(archive, target):
        return
    try:
        os.link(archive, target)
    except OSError:
        shutil.copy2(archive, target)
