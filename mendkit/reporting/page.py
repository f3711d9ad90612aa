"""HTML pages: single files without scripts or outside assets, from the templates beside this file.

A share stands beside its 95 % interval and n; a value that the run did not produce is a dash.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..evaluation.results import HEADLINE, Summary
from ..hparams import MENDHyperParams
from ..runs import clock, write_text

TEMPLATES = Path(__file__).parent / "templates"
EDITORS = {
    "before": "single.before.",
    "identity control": "identity.single.",
    "trained editor": "single.",
}
"""The editors of a report, and how the names of their results begin."""


def render(template: str, **values: Any) -> str:
    """A template filled in. What is not markup in `values` is escaped."""
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["clock"] = clock
    return environment.get_template(template).render(**values)


def write_index(folder: Path, run: Mapping[str, Any], results: Mapping[str, Any]) -> Path:
    """Write `index.html` over a report's folder; `run` is run.json, `results` the flat results."""
    model = run["hparams"]["model_name"]
    defaults = MENDHyperParams(model_name=model).to_dict()
    text = render(
        "report.html.j2",
        run=run,
        results=results,
        model=Path(model).name,
        roles=HEADLINE,
        summaries={name: Summary.from_dict(results, start) for name, start in EDITORS.items()},
        scores=[results.get(f"{start}score.headline") for start in EDITORS.values()],
        figures={stem: _figures(folder / stem / "figures") for stem in run["notebooks"]},
        changed={key: value for key, value in run["hparams"].items() if value != defaults[key]},
        exists=lambda path: (folder / path).is_file(),
    )
    return write_text(folder / "index.html", text)


def _figures(folder: Path) -> dict[str, str]:
    """By a figure's stem what it shows, in the order in which they were drawn, headline first."""
    from PIL import Image  # which the notebooks need, and the package alone does not

    found = {}
    paths = sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    for path in sorted(paths, key=lambda path: path.stem != "headline"):
        with Image.open(path) as image:  # `plots` writes the finding into the file as its title
            found[path.stem] = str(image.info.get("Title", path.stem))
    return found
