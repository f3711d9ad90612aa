"""The playground's panel, for JupyterLab and Voilà; needs the extra `notebooks`.

A thin layer over `Playground`: fields and buttons call it, and `tables` and `plots` draw what it
returns. Errors appear in the panel, and all text of models and data is escaped. Where no kernel
runs (a notebook that papermill executed, exported HTML) a panel is blank: `snapshot()` shows the
same without widgets.
"""

import base64
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ipywidgets as w
from IPython.display import HTML

from ..data.examples import EditExample, Probe
from ..errors import MendkitError
from ..evaluation.inspection import about
from ..hparams import MENDHyperParams, parse_overrides
from ..reporting import plots, tables
from ..reporting.figures import WIDTH, Chart
from ..reporting.findings import Row
from ..runs import project_path
from .session import Playground

logger = logging.getLogger(__name__)

STRONGEST = 3.0  # on a slider, unless an edit is stronger
FIGURE = round(WIDTH * 100)  # pixels
OWN = "(a fact of your own)"
PANEL_STYLE = """<style>
.mendkit {max-width: 1120px}
.mendkit, .mendkit .widget-html-content {line-height: 1.45}
.mendkit h4 {margin: 16px 0 6px; padding-bottom: 3px; border-bottom: 1px solid #8885;
  font-size: 15px}
.mendkit table {border-collapse: collapse; font-size: 13px; margin: 4px 0}
.mendkit :is(th, td) {padding: 3px 14px 3px 0; border-bottom: 1px solid #8883;
  overflow-wrap: anywhere}
.mendkit :is(th, td):is(:first-child, :nth-child(n+5)) {white-space: nowrap; overflow-wrap: normal}
.mendkit .widget-textarea {flex-direction: column; align-items: stretch; height: auto}
.mendkit .widget-textarea label {width: auto; text-align: left}
.mendkit-row {border-left: 4px solid transparent; padding-left: 6px; align-items: center}
.mendkit-row.shown {border-left-color: #0072b2}
.mendkit-old {opacity: 0.4}
.mendkit-row.undone .widget-html {opacity: 0.55}
.mendkit-said {padding: 4px 10px; border-left: 4px solid #8888; font-size: 13px}
.mendkit-said.bad {border-left-color: #d55e00; background: #d55e0018}
</style>"""


class Panel:
    """Widgets over a `Playground`: a model, a fact, the journal, before and after.

    `display(panel.ui)` shows it.

    `facts` are there to be picked. `config`, `archive`, `overrides` and `folder` (of the adapter)
    are what the fields hold at first; relative paths are those of `project_path`.
    """

    def __init__(
        self,
        playground: Playground,
        facts: Sequence[EditExample] = (),
        /,
        *,
        config: str = "",
        archive: str = "",
        overrides: Sequence[str] = (),
        folder: str = "runs/06_playground/adapter",
    ) -> None:
        self.playground, self.facts = playground, tuple(facts)
        self._quiet, self._rows = False, list[_Row]()
        self._chart: Chart | None = None
        self.said, self.about, self.journal, self.table = w.HTML(), w.HTML(), w.VBox(), w.HTML()
        self.figure = w.Image(format="png", layout=w.Layout(width=f"{FIGURE}px"))
        self.watch = _field(w.Dropdown(), "after")
        self.watch.observe(self._on_watch, "value")
        self._results = w.VBox(
            [_heading("Probabilities of the next token"), self.watch, self.figure]
        )
        model, fact = self._model(config, archive, shlex.join(overrides)), self._fact()
        self.folder, self.save = (
            _field(w.Text(folder), "adapter folder"),
            self._button("Save adapter", self._save),
        )
        end = [_heading("Before and after"), self.table, self._results]
        journal = [_heading("Journal of edits"), self.journal, w.HBox([self.folder, self.save])]
        self.ui = w.VBox([w.HTML(PANEL_STYLE), *model, *fact, self.said, *journal, *end])
        self.ui.add_class("mendkit")
        self._say("")
        self.refresh()

    def refresh(self) -> None:
        """Draw everything anew, as after changes by code: probabilities first, then the writing."""
        self._sync()
        if self.playground.shown is None:
            self.table.value = "<i>Nothing to show yet: apply an edit.</i>"
            return
        self.table.add_class("mendkit-old")  # until what is written is read, too
        self._draw()
        self.table.value = tables.before_after(*self.playground.completions()).to_html()
        self.table.remove_class("mendkit-old")

    def snapshot(self) -> HTML:
        """What the panel shows, without widgets."""
        rows = []
        for row in self.playground.journal():
            state = "in force" if row["active"] else "undone"
            rows.append(
                {
                    "": "shown" if row["shown"] else "",
                    "edit": row["edit"],
                    "strength": row["strength"],
                    "state": state,
                }
            )
        journal = tables.table(rows).to_html()
        parts = [
            self.about.value,
            "<h4>Journal of edits</h4>",
            journal,
            "<h4>Before and after</h4>",
            self.table.value,
        ]
        if self.playground.shown is not None and self._chart is not None:
            picture = base64.b64encode(self.figure.value).decode()
            alt = tables.escape(self._chart.finding)
            parts.append(
                f'<img alt="{alt}" width="{FIGURE}" src="data:image/png;base64,{picture}">'
            )
        return HTML(f'{PANEL_STYLE}<div class="mendkit">{"".join(parts)}</div>')

    # ---------------------------------------------------------------------------------------- parts

    def _model(self, config: str, archive: str, overrides: str) -> list[w.Widget]:
        configs = sorted(
            {config, *(str(path) for path in project_path("configs").glob("*.yaml"))} - {""}
        )
        archives = sorted(
            {archive, *(str(p) for p in project_path("runs").glob("*/archive.safetensors"))} - {""}
        )
        self.config = _field(w.Dropdown(options=configs, value=config or None), "model config")
        self.archive = _field(w.Combobox(value=archive, options=archives), "archive")
        self.archive.placeholder = "a path; empty: a stand-in that was never trained"
        self.overrides = _field(w.Text(overrides), "overrides")
        self.overrides.placeholder = "key=value …, such as device=cpu model_name=FOLDER"
        self.load = self._button("Load", self._load)
        first, second = w.HBox([self.config, self.overrides]), w.HBox([self.archive, self.load])
        return [_heading("Model and archive"), first, second, self.about]

    def _fact(self) -> list[w.Widget]:
        picks = [(f"{e.prompt} → {e.target_new}", index) for index, e in enumerate(self.facts)]
        self.pick = _field(
            w.Dropdown(options=[(OWN, None), *picks], value=0 if picks else None), "fact"
        )
        self.prompt, self.answer = _field(w.Text(), "prompt", 2), _field(w.Text(), "new answer")
        self.apply = self._button("Apply edit", self._apply, "primary")
        kinds = {
            "paraphrases": "Paraphrases, one a line: should follow",
            "neighbours": "Neighbours (other subjects): should stay",
            "unrelated": "Unrelated prompts: should stay",
        }
        self.lines = {
            kind: _field(w.Textarea(rows=4), label, width="initial")
            for kind, label in kinds.items()
        }
        self.pick.observe(self._on_pick, "value")
        self._on_pick()
        edit = w.HBox([self.prompt, self.answer, self.apply])
        return [_heading("Fact"), self.pick, edit, w.HBox([*self.lines.values()])]

    def _button(self, label: str, action: Callable[[], str], style: str = "") -> w.Button:
        button = w.Button(
            description=label, button_style=style, layout=w.Layout(width="110px", flex="none")
        )
        button.on_click(lambda _: self._do(f"{label} …", action))
        return button

    # -------------------------------------------------------------------------------------- actions

    def _do(
        self, doing: str, action: Callable[[], str], draw: Callable[[], None] | None = None
    ) -> None:
        """Act, then draw (default: everything); what `action` returns is said. Errors are shown."""
        self._say(doing)
        buttons = (self.load, self.apply, self.save)
        for button in buttons:
            button.disabled = True  # a second click would do the same again
        try:
            said = action()
            (draw or self.refresh)()
            self._say(said)
        except MendkitError as error:
            self._say(str(error), bad=True)
        except Exception as error:
            logger.exception("%s", doing)
            self._say(f"{type(error).__name__}: {error}", bad=True)
        finally:
            self._sync()
            for button in buttons:
                button.disabled = False

    def _load(self) -> str:
        overrides = parse_overrides(shlex.split(self.overrides.value))
        archive = self.archive.value.strip()
        hparams = MENDHyperParams.from_hparams(project_path(self.config.value), **overrides)
        self.playground.load(
            hparams.replace(archive=str(project_path(archive)) if archive else None)
        )
        return "Loaded; the journal is empty."

    def _apply(self) -> str:
        prompt, answer = self.prompt.value.strip(), self.answer.value.strip()
        e = EditExample(prompt, answer)
        if self.pick.value is not None and self.facts[self.pick.value].prompt.strip() == prompt:
            e = replace(self.facts[self.pick.value], target_new=answer)
        lines = {kind: _lines(area.value) for kind, area in self.lines.items()}
        known = {probe.prompt: probe for probe in (*e.neighbours, *e.unrelated)}
        neighbours, unrelated = (
            tuple(known.get(x, Probe(x)) for x in lines[k]) for k in ("neighbours", "unrelated")
        )
        self.playground.apply(
            replace(
                e,
                paraphrases=tuple(lines["paraphrases"]),
                neighbours=neighbours,
                unrelated=unrelated,
            )
        )
        return "Applied."

    def _toggle(self, index: int) -> str:
        session = self.playground.session
        active = session.journal[index].active
        (session.undo if active else session.reapply)(index)
        return "Undone: it stays in the journal." if active else "In force again."

    def _strength(self, index: int, strength: float) -> str:
        self.playground.session.set_strength(index, strength)
        self.playground.show(index)
        return ""

    def _show(self, index: int) -> str:
        self.playground.show(index)
        return ""

    def _drop(self, index: int) -> str:
        self.playground.drop(index)
        return "Dropped."

    def _save(self) -> str:
        folder = self.folder.value.strip()
        if not folder:
            raise MendkitError("the adapter's folder is blank; name one")
        edit = self.playground.session.combined()
        rank = max(site.rank for site in edit.save_adapter(project_path(folder)))
        saved = f"{len(edit.examples)} fact(s) in force saved in {folder}"
        return f"{saved}, a LoRA adapter of rank {rank} for PEFT."

    # -------------------------------------------------------------------------------------- drawing

    def _say(self, text: str, *, bad: bool = False) -> None:
        kind, role = ("bad", "alert") if bad else ("", "status")
        shown = tables.escape(text) or "&nbsp;"
        self.said.value = f'<div class="mendkit-said {kind}" role="{role}">{shown}</div>'

    def _sync(self) -> None:
        """Let model, journal and choices show what the playground holds, without acting on it."""
        editor, journal = self.playground.editor, self.playground.journal()
        untrained = editor.name == "untrained"
        text = " · ".join(f"{what}: {value}" for what, value in about(editor).items())
        text += f" ({self.playground.hparams.archive})" * (not untrained)
        text += ". Train one with notebook 01 and give its path as archive." * untrained
        self.about.value = (
            f'<div class="mendkit-said {"bad" * untrained}">{tables.escape(text)}</div>'
        )
        self._quiet = True
        try:
            while len(self._rows) < len(journal):
                self._rows.append(_Row(self, len(self._rows)))
            for row, edit in zip(self._rows, journal, strict=False):
                row.draw(edit)
            self.journal.children = [row.box for row in self._rows[: len(journal)]] or [
                w.HTML("<i>Empty.</i>")
            ]
            self._results.layout.display = "" if journal else "none"
            asked = self.playground.asked() if journal else []
            options = [
                (f"{role}: {prompt}", index) for index, (role, prompt, _) in enumerate(asked)
            ]
            if list(self.watch.options) != options:
                self.watch.options = options
                self.watch.index = 0 if options else None
        finally:
            self._quiet = False

    def _draw(self) -> None:
        chart = plots.next_token_bars([self.playground.next_tokens(self.watch.value or 0)])
        self._chart, self.figure.value = chart, chart.png()

    def _on_watch(self, change: Row) -> None:
        if not self._quiet:
            self._do("Reading …", lambda: "", self._draw)

    def _on_pick(self, change: Row | None = None) -> None:
        """Fill the fields with the fact picked; for one's own, leave the unrelated prompts."""
        e = None if self.pick.value is None else self.facts[self.pick.value]
        self.prompt.value, self.answer.value = (e.prompt, e.target_new) if e else ("", "")
        self.lines["paraphrases"].value = "\n".join(e.paraphrases) if e else ""
        self.lines["neighbours"].value = (
            "\n".join(probe.prompt for probe in e.neighbours) if e else ""
        )
        if e:
            self.lines["unrelated"].value = "\n".join(probe.prompt for probe in e.unrelated)


class _Row:
    """One edit of the journal, by its place."""

    def __init__(self, panel: Panel, index: int) -> None:
        def button(label: str, action: Callable[[int], str]) -> w.Button:
            made = w.Button(description=label, layout=w.Layout(width="84px", flex="none"))
            made.on_click(lambda _: panel._do(f"{made.description} …", partial(action, index)))
            return made

        def strengthen(change: Row) -> None:
            if not panel._quiet:
                panel._do("Redrawing …", partial(panel._strength, index, change["new"]))

        self.text = w.HTML(layout=w.Layout(flex="1 1 0", min_width="0"))
        self.slider = w.FloatSlider(
            min=0.0, max=STRONGEST, step=0.1, description="strength", continuous_update=False
        )
        self.slider.layout = w.Layout(width="330px", flex="none")
        self.slider.observe(strengthen, "value")
        self.toggle = button("Undo", panel._toggle)
        buttons = [self.toggle, button("Show", panel._show), button("Drop", panel._drop)]
        self.box = w.HBox([self.text, self.slider, *buttons])
        self.box.add_class("mendkit-row")

    def draw(self, edit: Row) -> None:
        """Show a row of `Playground.journal`."""
        self.text.value = tables.escape(edit["edit"])
        self.slider.max = max(STRONGEST, edit["strength"])
        self.slider.value = edit["strength"]
        self.toggle.description = "Undo" if edit["active"] else "Re-apply"
        for name, there in (("shown", edit["shown"]), ("undone", not edit["active"])):
            (self.box.add_class if there else self.box.remove_class)(name)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _heading(text: str) -> w.HTML:
    return w.HTML(f"<h4>{text}</h4>")


def _field(widget: Any, label: str, share: int = 1, *, width: str = "96px") -> Any:
    """A field with its label (`width`), as wide as its share of the row."""
    widget.description, widget.style.description_width = label, width
    widget.layout = w.Layout(flex=f"{share} 1 0", width="auto", min_width="0")
    return widget
