"""The playground's panel, for JupyterLab and Voilà; needs the extra `notebooks`.

Its fields and buttons call a `Playground`; `tables` and `plots` draw what that returns.
Errors appear in the panel. All text of models and data is escaped.
Without a kernel (exported HTML) a panel is blank: `snapshot()` shows the same without widgets.
"""

import base64
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as w
from IPython.display import HTML

from ..data.examples import EditExample, Probe
from ..data.sampling import typed_example
from ..errors import MendkitError
from ..evaluation.inspection import about
from ..places import archives_of_runs, in_the_box, project_path
from ..reporting import plots, tables
from .session import Playground

logger = logging.getLogger(__name__)

STRONGEST = 3.0  # on the slider, unless an edit is stronger
PANEL_STYLE = """<style>
.mendkit {max-width: 1120px}
.mendkit table {border-collapse: collapse; font-size: 13px; line-height: 1.45}
.mendkit-said {padding: 4px 10px; border-left: 4px solid #8888; line-height: 1.45}
.mendkit-said.bad {border-left-color: #d55e00; background: #d55e0018}
</style>"""
# Within the panel: exported HTML has none, so it shows the snapshot.
HIDE_SNAPSHOT = "<style>.mendkit-snapshot {display: none}</style>"


class Panel:
    """Widgets over a `Playground`: a fact, the journal, before and after.

    `display(panel.ui)` shows it. `facts` are there to be picked.
    `folder` is the adapter's at first, as `project_path` reads it.
    """

    def __init__(
        self,
        playground: Playground,
        facts: Sequence[EditExample] = (),
        *,
        folder: str = "runs/06_playground/adapter",
    ) -> None:
        self.playground, self.facts = playground, (EditExample("", ""), *facts)
        self._filling = False  # fields are set by code, which is no wish of the user
        self.about, self.said, self.results = w.HTML(), w.HTML(), w.HTML()
        # 0. The archive.
        first = playground.hparams.archive or ""
        found = dict.fromkeys([first, *in_the_box(), *archives_of_runs(), ""])
        names = [(name or "none: the untrained control", name) for name in found]
        self.archive = _field(w.Dropdown(options=names), "archive")
        self.load = self._button("Load", self._load)
        # 1. A fact.
        picks = [("(a fact that you type)", 0)]
        for place, fact in enumerate(facts, 1):
            picks.append((f"{fact.prompt} → {fact.target_new}", place))
        self.pick = _field(w.Dropdown(options=picks, value=min(1, len(facts))), "fact")
        self.prompt, self.answer = _field(w.Text(), "prompt"), _field(w.Text(), "new answer")
        self.others = _field(w.Textarea(rows=3), "other prompts")
        self.others.placeholder = "one a line: they should go on as before"
        self.apply = self._button("Apply edit", self._apply)
        # 2. The journal.
        self.journal = _field(w.Select(rows=5), "edits")
        self.strength = w.FloatSlider(max=STRONGEST, step=0.1, continuous_update=False)
        self.strength.description = "strength"
        self.toggle = self._button("Undo", self._toggle)
        self.drop = self._button("Drop", self._drop)
        self.folder = _field(w.Text(folder), "adapter folder")
        self.save = self._button("Save adapter", self._save)
        # 3. All together.
        for field, action in (
            (self.pick, self._on_pick),
            (self.prompt, self._on_prompt),
            (self.journal, self._on_journal),
            (self.strength, self._on_strength),
        ):
            field.observe(action, "value")
        archive_row = w.HBox([self.archive, self.load])
        fact_row = w.HBox([self.prompt, self.answer, self.apply])
        journal_row = w.HBox([self.strength, self.toggle, self.drop, self.folder, self.save])
        rows = [
            w.HTML(PANEL_STYLE + HIDE_SNAPSHOT),
            self.about,
            archive_row,
            self.said,
            self.pick,
            fact_row,
        ]
        self.ui = w.VBox([*rows, self.others, self.journal, journal_row, self.results])
        self.ui.add_class("mendkit")
        self._on_pick()
        self._say("")
        self.refresh()

    def refresh(self) -> None:
        """Draw everything anew, as after changes by code."""
        self.about.value = tables.listed(about(self.playground.editor)).to_html()
        self._fill()
        parts = ["<h4>Before and after</h4>"]
        if self.playground.shown is None:
            parts.append("<i>Nothing to show yet: apply an edit.</i>")
        else:
            parts.append(tables.before_after(*self.playground.completions()).to_html())
            chart = plots.next_token_bars([self.playground.next_tokens()])
            alt = tables.escape(chart.finding)
            source = f"data:image/png;base64,{base64.b64encode(chart.png()).decode()}"
            parts.append(f'<img alt="{alt}" style="width: 100%" src="{source}">')
        self.results.value = "".join(parts)

    def snapshot(self) -> HTML:
        """What the panel shows, without widgets; hidden where the panel is alive."""
        journal = tables.table(self.playground.journal()).to_html()
        shown = f"{self.about.value}<h4>Journal of edits</h4>{journal}{self.results.value}"
        return HTML(f'{PANEL_STYLE}<div class="mendkit mendkit-snapshot">{shown}</div>')

    def _button(self, label: str, action: Callable[[], object]) -> w.Button:
        button = w.Button(description=label, layout=w.Layout(width="110px", flex="none"))
        button.on_click(lambda _: self._do(action))
        return button

    # ---------------------------------------- actions

    def _do(self, action: Callable[[], object]) -> None:
        """Act and draw; a text that `action` returns is said, and errors are."""
        self._say("…")
        buttons = (self.apply, self.toggle, self.drop, self.save, self.load)
        for button in buttons:
            button.disabled = True  # a second click would do the same again
        try:
            said = action()
            self.refresh()
            self._say(said if isinstance(said, str) else "")
        except MendkitError as error:
            self._say(str(error), bad=True)
        except Exception as error:
            logger.exception("in the panel")
            self._say(f"{type(error).__name__}: {error}", bad=True)
        finally:
            self._fill()
            for button in buttons:
                button.disabled = False

    def _load(self) -> str:
        self.playground.load(self.archive.value)
        return "Loaded; the journal is empty."

    def _apply(self) -> str:
        prompt, answer = self.prompt.value.strip(), self.answer.value.strip()
        example = replace(self.facts[self.pick.value], target_new=answer)
        if not self.pick.value:
            example = typed_example(prompt, answer, most=4)
        lines = map(str.strip, self.others.value.splitlines())
        others = tuple(map(Probe, filter(None, lines)))
        self.playground.apply(replace(example, unrelated=example.unrelated + others))
        return "Applied."

    def _toggle(self) -> str:
        session, place = self.playground.session, self.playground.place()
        if session.journal[place].active:
            session.undo(place)
            return "Undone: it stays in the journal."
        session.reapply(place)
        return "In force again."

    def _drop(self) -> str:
        self.playground.session.drop(self.playground.place())
        return "Dropped."

    def _save(self) -> str:
        folder = self.folder.value.strip()
        edit = self.playground.session.combined()
        rank = max(site.rank for site in edit.save_adapter(project_path(folder)))
        saved = f"{len(edit.examples)} fact(s) in force saved in {folder}"
        return f"{saved}, a LoRA adapter of rank {rank} for PEFT."

    def _on_pick(self, _: Any = None) -> None:
        fact = self.facts[self.pick.value]
        if not self._filling:
            self.prompt.value, self.answer.value = fact.prompt, fact.target_new

    def _on_prompt(self, change: Any) -> None:
        if change["new"].strip() != self.facts[self.pick.value].prompt.strip():
            self._filling, self.pick.value = True, 0  # a fact that the user types
            self._filling = False

    def _on_journal(self, change: Any) -> None:
        if not self._filling:
            self.playground.show(change["new"])
            self._do(str)

    def _on_strength(self, change: Any) -> None:
        if not self._filling:
            place, strength = self.playground.place(), change["new"]
            self._do(lambda: self.playground.session.set_strength(place, strength))

    # ---------------------------------------- drawing

    def _say(self, text: str, *, bad: bool = False) -> None:
        kind, role = ("bad", "alert") if bad else ("", "status")
        shown = tables.escape(text) or "&nbsp;"
        self.said.value = f'<div class="mendkit-said {kind}" role="{role}">{shown}</div>'

    def _fill(self) -> None:
        rows, shown = self.playground.journal(), self.playground.shown
        self._filling = True
        try:
            edits = []
            for place, row in enumerate(rows):
                edits.append((f"{row['edit']} ({row['state']})", place))
            self.journal.options, self.journal.value = edits, shown
            if shown is not None:
                self.strength.max = max(STRONGEST, rows[shown]["strength"])
                self.strength.value = rows[shown]["strength"]
                in_force = self.playground.session.journal[shown].active
                self.toggle.description = "Undo" if in_force else "Re-apply"
        finally:
            self._filling = False


def _field(widget: Any, label: str) -> Any:
    """A field with its label."""
    widget.description, widget.style.description_width = label, "96px"
    widget.layout = w.Layout(flex="1 1 0", width="auto", min_width="0")
    return widget
