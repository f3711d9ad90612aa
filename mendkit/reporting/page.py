"""The report's page: one HTML file without scripts or outside assets, over what the notebooks left.

It is built by `tag`, which escapes whatever is not markup already. A share stands beside its 95 % interval
and n; a value that the run did not produce is a dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..hparams import MENDHyperParams
from ..runs import clock, write_text

HEADLINE = (
    ("edit_success.free_exact", "Edit success", "writes the new answer itself, exactly"),
    ("paraphrase.free_exact", "Paraphrase", "writes it after a paraphrase of the prompt"),
    (
        "neighbourhood.argmax_agreement",
        "Neighbourhood",
        "same next token as before: other subjects, same relation",
    ),
    ("locality.argmax_agreement", "Locality", "same next token as before: unrelated prompts"),
    ("score.headline", "Score", "harmonic mean of the four"),
)
EDITORS = (
    ("single.before.", "before"),
    ("identity.single.", "identity control"),
    ("single.", "trained editor"),
)
SPREAD = (".n", ".low", ".high")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #62686f; --line: #dfe2e6; --paper: #fff;
  --card: #f6f7f9; --blue: #0072b2; --red: #b3261e; --wash: #fdecea }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa2ab; --line: #343a41;
  --paper: #15181b; --card: #1e2226; --blue: #5db4ea; --red: #ff8a80; --wash: #3a1d1b } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .4rem }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem }
a { color: var(--blue) }
.soft, figcaption, dt { color: var(--soft) }
code, pre { font-size: .86rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .55rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top }
thead th { color: var(--soft); font-weight: 500; font-size: .9rem }
tbody th { font-weight: 600 }
small { display: block; color: var(--soft); font-weight: 400; font-size: .8rem }
.bar { height: 5px; margin: .3rem 0 .2rem; background: var(--line); border-radius: 3px; overflow: hidden;
  max-width: 11rem }
.bar i { display: block; height: 100%; background: var(--soft) }
.trained b { color: var(--blue) }
.trained .bar i { background: var(--blue) }
.failed { border: 1px solid var(--red); border-left-width: 6px; background: var(--wash); border-radius: 6px;
  padding: .9rem 1.1rem; margin: 1.4rem 0 }
.failed b { color: var(--red) }
pre { margin: .6rem 0; overflow-x: auto; white-space: pre-wrap }
.figures { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit,minmax(min(100%,26rem),1fr)) }
figure { margin: 0; padding: .7rem; background: var(--card); border-radius: 8px }
figure img { width: 100%; height: auto; background: #fff; border-radius: 4px; display: block }
figcaption { font-size: .85rem; margin-top: .45rem }
.scroll { overflow-x: auto }
details { margin: .5rem 0 } details table { font-size: .86rem } summary { cursor: pointer }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; margin: 0 }
dd { margin: 0; overflow-wrap: anywhere }
"""


class Html(str):
    """Markup: text that needs no escaping any more."""


def tag(name: str, /, *children: str | Iterable[str], **attributes: str) -> Html:
    """An element. What is not Html is escaped; a trailing _ of an attribute's name is dropped."""
    inner = "".join(_html(child) for child in children)
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Html(
        f"<{name}{given}>" if name in ("img", "meta") else f"<{name}{given}>{inner}</{name}>"
    )


def _html(child: str | Iterable[str]) -> str:
    if isinstance(child, str):
        return child if isinstance(child, Html) else escape(child)
    return "".join(map(_html, child))


def _joined(children: Iterable[str], separator: str = " · ") -> Html:
    """The non-empty children, separated."""
    return Html(escape(separator).join(_html(child) for child in children if child))


def cells_table(
    heads: Iterable[str], rows: Iterable[tuple[str | Iterable[str], Iterable[Html]]]
) -> Html:
    """A table from column heads, and rows of a head and its cells (made by `tag("td", ...)`)."""
    top = tag("thead", tag("tr", [tag("th", head, scope="col") for head in heads]))
    body = [tag("tr", tag("th", head, scope="row"), cells) for head, cells in rows]
    return tag("div", tag("table", top, tag("tbody", body)), class_="scroll")


def write_page(folder: Path, run: Mapping[str, Any], results: Mapping[str, Any], /) -> Path:
    """Write `index.html` over what lies in the folder; `run` is run.json, `results` the flat results."""
    body = [
        tag("p", _subtitle(run, results), class_="soft"),
        _failure(run.get("failure")),
        _headline(results),
        *(_figures(folder, stem) for stem in reversed(run["notebooks"])),
        _files(folder, run["notebooks"]),
        _provenance(run, results),
        _numbers(results),
    ]
    return write_text(folder / "index.html", whole_page(_title(run, results), body))


def whole_page(title: str, body: Iterable[Html], /) -> str:
    """An HTML file of its own."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_STYLE)),
    ]
    inner = _joined([tag("h1", title), *body], "\n")
    return f"<!doctype html>\n{tag('html', tag('head', head), Html(chr(10)), tag('body', inner), lang='en')}\n"


def _number(results: Mapping[str, Any], name: str) -> float | None:
    """A result that is a finite number, or None."""
    value = results.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _title(run: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The finding; before there is one, what was to be found."""
    model, name = Path(run["hparams"]["model_name"]).name, HEADLINE[0][0]
    trained, control = (
        _number(results, f"single.{name}"),
        _number(results, f"identity.single.{name}"),
    )
    if trained is None:
        return f"Editing {model} with MEND"
    beside = "" if control is None else f"; the untrained control, {100 * control:.0f} %"
    return f"MEND makes {model} write {100 * trained:.0f} % of the new answers{beside}"


def _subtitle(run: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    seconds, peak = _number(results, "report.seconds"), _number(results, "report.peak_memory_gb")
    parts = [run["started"], "" if seconds is None else f"{clock(seconds)} wall time"]
    return " · ".join(filter(None, [*parts, "" if peak is None else f"{peak:.1f} GB peak memory"]))


def _failure(failure: Mapping[str, Any] | None) -> Html:
    if not failure:
        return Html()
    where = f"code cell {failure['cell']}" if failure["cell"] else "outside of its cells"
    source = tag("pre", failure["source"]) if failure["source"] else ""
    note = "What was done until then is below; notebooks after it did not run."
    bold = tag("b", f"{failure['notebook']} failed, {where}.")
    return tag(
        "div",
        bold,
        f" {failure['error']}",
        source,
        tag("small", note),
        class_="failed",
        role="alert",
    )


def _headline(results: Mapping[str, Any]) -> Html:
    """The table of the four headline shares and their harmonic mean, for all three editors."""
    if all(
        _number(results, prefix + name) is None for prefix, _ in EDITORS for name, *_ in HEADLINE
    ):
        return Html()
    rows = []
    for name, label, meaning in HEADLINE:
        cells = [
            tag("td", _share(results, prefix, name), class_=editor.split()[0])
            for prefix, editor in EDITORS
        ]
        rows.append(([label, tag("small", meaning)], cells))
    note = "Shares of edits with their 95 % bootstrap intervals over edits; decoding is greedy and free. "
    note += "The identity control is MEND without training, at its own best step size."
    table = cells_table(["", *(editor for _, editor in EDITORS)], rows)
    return Html(
        tag("h2", "Single edits, each on a fresh model") + table + tag("p", note, class_="soft")
    )


def _share(results: Mapping[str, Any], prefix: str, name: str) -> list[str]:
    value = _number(results, prefix + name)
    if value is None:
        itself = prefix.endswith("before.") and name.endswith("argmax_agreement")
        return ["1", tag("small", "by definition")] if itself else ["–"]
    bar = tag("div", tag("i", style=f"width:{min(max(value, 0.0), 1.0):.1%}"), class_="bar")
    return [tag("b", f"{value:.3f}"), bar, _spread(results, prefix + name, "{:.3f}")]


def _spread(results: Mapping[str, Any], name: str, form: str) -> Html:
    n, low, high = (_number(results, name + suffix) for suffix in SPREAD)
    if n is None or low is None or high is None:
        return Html()
    return tag("small", f"[{form.format(low)}, {form.format(high)}], n = {n:.0f}")


def _link(folder: Path, path: str, label: str) -> Html:
    """A link to a file of the folder; nothing if it is not there."""
    return tag("a", label, href=quote(path)) if (folder / path).is_file() else Html()


def _figures(folder: Path, stem: str) -> Html:
    """A notebook's figures in the order in which it drew them, but the headline first."""
    figures = []
    paths = {path: path.stat().st_mtime_ns for path in (folder / stem / "figures").glob("*.png")}
    for path in sorted(paths, key=lambda path: (path.stem != "headline", paths[path], path.name)):
        local, name = f"{stem}/figures/{path.name}", path.stem.replace("_", " ")
        image = tag("img", src=quote(local), alt=_finding(path) or name, loading="lazy")
        data = _link(folder, f"{stem}/figures/{path.stem}.csv", "data (CSV)")
        caption = tag("figcaption", _joined([name, data]))
        figures.append(tag("figure", tag("a", image, href=quote(local)), caption))
    return (
        Html(tag("h2", _words(stem)) + tag("div", figures, class_="figures")) if figures else Html()
    )


def _finding(path: Path) -> str:
    """What a figure shows, if it says so itself (`plots` writes the finding into the file as its title)."""
    try:
        from PIL import Image

        with Image.open(path) as image:
            return str(image.info.get("Title", ""))
    except (ImportError, OSError):
        return ""


def _words(stem: str) -> str:
    """A notebook's name for people: `02_edit_with_archive` is "Edit with archive"."""
    return stem.lstrip("0123456789_").replace("_", " ").capitalize() or stem


def _list(items: Iterable[tuple[str, str]]) -> Html:
    return tag("dl", [Html(tag("dt", name) + tag("dd", value)) for name, value in items])


def _files(folder: Path, stems: Iterable[str]) -> Html:
    items = []
    for stem in stems:
        paths = {
            f"{stem}.html": "read",
            f"{stem}.ipynb": "notebook with code",
            f"{stem}/results.json": "results.json",
        }
        paths[f"{stem}.log"] = "kernel log"
        links = _joined(_link(folder, path, label) for path, label in paths.items())
        items.append((_words(stem), links or "did not run"))
    names = ("results.json", "run.json", "archive.safetensors")
    items.append(("All together", _joined(_link(folder, name, name) for name in names)))
    return Html(tag("h2", "Notebooks and files") + _list(items))


def _provenance(run: Mapping[str, Any], results: Mapping[str, Any]) -> Html:
    defaults = {name: field.default for name, field in MENDHyperParams.model_fields.items()} | {
        "model_name": run["hparams"]["model_name"]
    }
    changed = [tag("code", f"{k}: {v}") for k, v in run["hparams"].items() if v != defaults[k]]
    machine = run["machine"]
    items = {
        "Command": tag("code", run["command"] or "–"),
        "Model": run["hparams"]["model_name"],
        "Settings": tag("code", " ".join([run["config"], *run["settings"]])),
        "Not at their default": _joined(changed, ", ") or "nothing",
        "Time and memory": _subtitle(run, results),
        "Versions": ", ".join(
            f"{name} {version or '(not installed)'}" for name, version in run["versions"].items()
        ),
        "Machine": f"{machine['cores']} cores, {machine['threads']} threads, {machine['processor']}",
    }
    return Html(tag("h2", "How it was made") + _list(items.items()))


def _numbers(results: Mapping[str, Any]) -> Html:
    """Every mean side by side, and every other number, folded away."""
    means, prefixes = (
        [name.removesuffix(".n") for name in results if name.endswith(".n")],
        [p for p, _ in EDITORS],
    )
    names = sorted(
        {name.removeprefix(p) for name in means for p in prefixes[1:] if name.startswith(p)}
    )
    names = [name for name in names if not name.startswith("before.")]
    rows = [
        (name, [tag("td", _mean(results, prefix + name)) for prefix in prefixes]) for name in names
    ]
    shown = {
        prefix + name + suffix for prefix in prefixes for name in names for suffix in ("", *SPREAD)
    }
    rest = [
        (name, [tag("td", _plain(value))]) for name, value in results.items() if name not in shown
    ]
    tables = [
        ("All scores", ["", *(editor for _, editor in EDITORS)], rows),
        ("All other numbers", ["", ""], rest),
    ]
    folded = [
        tag("details", tag("summary", name), cells_table(heads, body))
        for name, heads, body in tables
        if body
    ]
    return Html(tag("h2", "Everything") + "".join(folded))


def _mean(results: Mapping[str, Any], name: str) -> list[str]:
    value = _number(results, name)
    return ["–"] if value is None else [f"{value:.4g}", _spread(results, name, "{:.4g}")]


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
