"""The report: notebooks run in order, each in a kernel of its own, and a page over what they leave.

`plan_report` and `check_report` write nothing and load no model; `run_report` does the work.
"""

import difflib
import json
import logging
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..data.files import Examples, read_examples
from ..data.sampling import CANDIDATES
from ..errors import MendkitError
from ..evaluation.results import HEADLINE, Summary
from ..hparams import MENDHyperParams, parse_overrides
from ..places import ARCHIVE_FILE, archive_file
from ..runs import Progress, kit_file, locked, provenance, user_path, write_json, write_text
from .notebook import Failure, Parameter, read_parameters, run_notebook
from .tables import paired, won

logger = logging.getLogger(__name__)

TRAINING, EDITING = "01_train_without_archive", "02_edit_with_archive"

TEMPLATES = Path(__file__).parent / "templates"
SET_HERE = ("config", "overrides", "archive", "out")  # notebook parameters that the report sets

# The editors of a report, and how the names of their results begin.
EDITORS = {
    "trained editor": "single.",
    "identity control": "identity.single.",
    "before": "single.before.",
}
BY_KNOWLEDGE = {"all facts": "single.", "known": "single.known.", "unknown": "single.unknown."}


def default_notebook(stem: str) -> Path:
    """A notebook of the kit: below the working directory, in the checkout, else as installed."""
    return kit_file(Path("notebooks", f"{stem}.ipynb"))


@dataclass(frozen=True)
class ReportPlan:
    """A report that would run; its names and values are checked."""

    config: Path
    settings: Sequence[str]  # hyperparameters, as "key=value"
    given: Mapping[str, Any]  # notebook parameters by name
    hparams: MENDHyperParams
    notebooks: Mapping[str, Mapping[str, Parameter]]  # parameters of those that run, in order
    out: Path

    @property
    def archive(self) -> Path | None:
        """The file of the archive to edit with."""
        return archive_file(self.hparams.archive) if self.hparams.archive else None

    def data(self) -> list[tuple[str, int | None]]:
        """The data sets that are read, of training first: source, and number of examples."""
        found = []
        for known in self.notebooks.values():
            values = {name: self.given.get(name, p.default) for name, p in known.items()}
            for name in known:
                if name.endswith("_data"):
                    limit = values.get(name.replace("_data", "_limit")) or 0
                    drawn_from = CANDIDATES if name == "test_data" else 1
                    found.append((values[name], drawn_from * limit or None))
        return found


@dataclass(frozen=True)
class FinishedReport:
    """A finished report, or one that stopped at `failure`."""

    index: Path
    results: Mapping[str, Any]
    failure: Failure | None


# ----------------------------------------------------------------------------------------- checking


def plan_report(config: str | Path, settings: Sequence[str] = (), *, out: str | Path) -> ReportPlan:
    """The report that would run; `settings` ("key=value") are hyperparameters or of notebooks.

    Raises MendkitError for unknown names and mistyped values; looks at no data, archive or folder.
    """
    known = {stem: read_parameters(default_notebook(stem)) for stem in (TRAINING, EDITING)}
    parameters = known[TRAINING] | known[EDITING]
    for name in SET_HERE:
        parameters.pop(name, None)
    given: dict[str, Any] = {}
    overrides = []
    for text in settings:
        key, _, value = (part.strip() for part in text.partition("="))
        if key in given:
            raise MendkitError(f"{text!r}: {key} is given twice")
        if key in parameters:
            given[key] = parameters[key].read(value)
            continue
        overrides.append(text)
        near = difflib.get_close_matches(key, [*parameters, *MENDHyperParams.model_fields], 1)
        if near and near[0] != key and near[0] in parameters:
            raise MendkitError(
                f"unknown name {key!r}; the nearest notebook parameter is {near[0]!r}"
            )
    hparams = MENDHyperParams.from_hparams(config, **parse_overrides(overrides))
    if hparams.archive is not None:
        del known[TRAINING]
        for name in set(given) - set(known[EDITING]):
            raise MendkitError(f"{name} is of {TRAINING}, which runs only with `archive=null`")
    return ReportPlan(user_path(config), overrides, given, hparams, known, user_path(out))


def check_report(plan: ReportPlan) -> list[Examples]:
    """Look at the folder and read all data; the data sets in the order of `plan.data()`.

    Raises MendkitError for a folder in use or of something else than a report, and for an input
    inside of it, which the new report might remove; DataError for data that cannot be read.
    """
    with locked(plan.out):
        _earlier_report(plan.out)
    inputs = [plan.config, *(user_path(source) for source, _ in plan.data())]
    if plan.archive and not _same(plan.archive, plan.out / ARCHIVE_FILE):
        inputs.append(plan.archive)
    for path in inputs:
        if path.resolve().is_relative_to(plan.out.resolve()):
            raise MendkitError(
                f"{path} is in {plan.out}, whose report would be replaced; use another --out"
            )
    read = partial(read_examples, columns=plan.hparams.columns)
    return [read(source, limit=limit) for source, limit in plan.data()]


def _same(a: str | Path, b: str | Path) -> bool:
    return Path(a).resolve() == Path(b).resolve()


def _earlier_report(out: Path) -> list[Path]:
    """What an earlier report left in the folder. Raises MendkitError if it holds something else."""
    if out.is_file():
        raise MendkitError(f"{out} is a file; name a folder with --out")
    if not out.exists() or not any(out.iterdir()):
        return []
    if read_json(out / "run.json").get("kind") != "report":
        raise MendkitError(
            f"{out} holds files but no report; nothing was touched: give --out a new folder"
        )
    names = ["run.json", "results.json", "index.html", ARCHIVE_FILE]
    for stem in (TRAINING, EDITING):
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


def run_report(
    plan: ReportPlan, *, command: str = "", cell_seconds: int | None = None
) -> FinishedReport:
    """Run a plan; `command` is the command line that the page shows.

    A notebook that fails keeps what it did, later ones do not run, and the page is written anyway.
    `cell_seconds` limits every cell. Raises MendkitError if another process writes to the folder.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out):
        run = _begin(plan, command)
        start, failure, archive = time.perf_counter(), None, plan.hparams.archive
        results: dict[str, Any] = {}
        for stem in plan.notebooks:
            if archive and not _same(archive_file(archive), plan.out / ARCHIVE_FILE):
                shutil.copy2(archive_file(archive), plan.out / ARCHIVE_FILE)
            logger.info("%s: running", stem)
            failure = _run_one(plan, stem, archive, cell_seconds)
            results |= read_json(plan.out / stem / "results.json")
            run["data"] |= read_json(plan.out / stem / "run.json").get("data", {})
            if failure:
                results["failed"] = stem
                break
            archive = archive or str(plan.out / stem / ARCHIVE_FILE)
        peaks = [results.get(name, 0.0) for name in ("train.peak_memory_gb", "peak_memory_gb")]
        results["report.seconds"] = time.perf_counter() - start
        results["report.peak_memory_gb"] = max(peaks)
        run["status"] = "failed" if failure else "done"
        run["failure"] = asdict(failure) if failure else None
        write_json(plan.out / "run.json", run)
        write_json(plan.out / "results.json", results)
        return FinishedReport(write_index(plan.out, run, results), results, failure)


def _begin(plan: ReportPlan, command: str) -> dict[str, Any]:
    """Remove the earlier report, mark the folder as a report; what run.json holds."""
    given = [f"{name}={value}" for name, value in plan.given.items()]
    run: dict[str, Any] = {
        "kind": "report",
        "status": "running",
        "command": command,
        "config": str(plan.config),
        "settings": [*plan.settings, *given],
        "data": {},
        "notebooks": list(plan.notebooks),
        "hparams": plan.hparams.to_dict(),
        **provenance(),
    }
    old = _earlier_report(plan.out)
    # The mark is written before anything is removed, so that the folder is known at all times.
    keep = [write_json(plan.out / "run.json", run), plan.archive or Path()]
    for path in old:
        if any(_same(path, kept) for kept in keep):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return run


def _run_one(
    plan: ReportPlan, stem: str, archive: str | None, cell_seconds: int | None
) -> Failure | None:
    """Run a notebook and export it; it must end by itself and leave what is expected of it."""
    folder, executed = plan.out / stem, plan.out / f"{stem}.ipynb"
    folder.mkdir()
    values = {"config": str(plan.config), "overrides": [*plan.settings], **plan.given}
    values |= {"archive": archive, "out": str(folder)}
    progress = Progress(stem[:2])
    failure = run_notebook(
        default_notebook(stem),
        executed,
        {name: value for name, value in values.items() if name in plan.notebooks[stem]},
        page=executed.with_suffix(".html"),
        show=progress.show,
        cell_seconds=cell_seconds,
    )
    progress.close()
    for name in ("results.json", ARCHIVE_FILE) if stem == TRAINING else ("results.json",):
        if failure is None and not (folder / name).is_file():
            failure = Failure(stem, None, f"it ended without writing {folder / name}")
    return failure


# --------------------------------------------------------------------------------------------- page


def render(template: str, **values: Any) -> str:
    """A template filled in. What is not markup in `values` is escaped."""
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["quote"] = shlex.quote
    return environment.get_template(template).render(**values)


def write_index(folder: Path, run: Mapping[str, Any], results: Mapping[str, Any]) -> Path:
    """Write `index.html` over a report's folder; `run` is run.json, `results` the flat results."""
    summaries, others = {}, dict(results)  # what no table of scores holds
    for name, start in (EDITORS | BY_KNOWLEDGE).items():
        summaries[name] = Summary.from_dict(results, start)
        for metric, interval in summaries[name].items():
            for told in interval.to_dict(start + metric):
                others.pop(told, None)
    text = render(
        "report.html.j2",
        run=run,
        results=results,
        headline=won(results, Path(run["hparams"]["model_name"]).name),
        paired=paired(results),
        example=_known_edit(folder / EDITING / "rows.jsonl"),
        archive=folder / ARCHIVE_FILE,
        roles=HEADLINE,
        editors=EDITORS,
        by_knowledge=BY_KNOWLEDGE,
        summaries=summaries,
        figures={stem: _figures(folder / stem / "figures") for stem in run["notebooks"]},
        changed=changed(run["hparams"]),
        others=others,
        exists=lambda path: (folder / path).is_file(),
    )
    return write_text(folder / "index.html", text)


def changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters among `settings` that are not at their default."""
    defaults = MENDHyperParams(model_name=settings["model_name"]).to_dict()
    return {key: value for key, value in settings.items() if value != defaults[key]}


def _known_edit(path: Path) -> dict[str, Any] | None:
    """The first row of a fact that the unedited model knew, else the first; None without rows."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return next((row for row in rows if row.get("known")), rows[0] if rows else None)


def _figures(folder: Path) -> dict[str, str]:
    """What each figure of a notebook finds, by its name: as they were drawn, headline first."""
    paths = sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    found = {}
    for path in sorted(paths, key=lambda path: path.stem != "headline"):
        found[path.stem] = path.stem.replace("_", " ")
        with suppress(OSError), Image.open(path) as image:
            found[path.stem] = image.info.get("Title", found[path.stem])
    return found
