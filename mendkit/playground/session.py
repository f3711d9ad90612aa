"""The playground without its widgets: an editor, its journal, and what the model says.

*Before* is the unedited model, *after* the model with all edits of the journal that are in force.
One edit is shown: its prompts are those that are read. Code may use the journal (`session`) beside
the panel of `widgets.py`.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from ..data.examples import EditExample
from ..errors import DataError, MendkitError
from ..evaluation.inspection import answer_tokens, open_editor
from ..hparams import MENDHyperParams
from ..mend.edit import Edit
from ..mend.editor import MENDEditor
from ..mend.validation import next_tokens
from ..reporting import tables
from ..reporting.findings import Row

SAME_MODEL = ("model_name", "tokenizer_name", "dtype", "device", "trust_remote_code")
MOST_TOKENS = 200  # whose probabilities are read; a chart shows the most probable


class Playground:
    """A model, its editor and a journal.

    Where `archive` is null a MEND that was never trained stands in (`open_editor`, with the
    statistics of `statistics`), and `inspection.about` says so. `max_new_tokens` limits what is
    written after a prompt.
    """

    def __init__(
        self,
        hparams: MENDHyperParams,
        statistics: Sequence[EditExample] = (),
        /,
        *,
        max_new_tokens: int = 8,
    ) -> None:
        self.statistics, self.max_new_tokens = tuple(statistics), max_new_tokens
        self._open(hparams, open_editor(hparams, self.statistics))

    def _open(self, hparams: MENDHyperParams, editor: MENDEditor) -> None:
        self.hparams, self.editor, self.session = hparams, editor, editor.session()
        self._shown, self._unedited = 0, dict[Hashable, Any]()

    def load(self, hparams: MENDHyperParams) -> None:
        """Go on with another archive or model, and an empty journal; if that fails all stays.

        A model that the settings do not change is kept; another one is in memory beside it until it
        is loaded.
        """
        same = all(getattr(hparams, key) == getattr(self.hparams, key) for key in SAME_MODEL)
        with self.session.suspended():
            editor = open_editor(hparams, self.statistics, base=self.editor.base if same else None)
        self.session.close()
        self._open(hparams, editor)

    # -------------------------------------------------------------------------------------- journal

    @property
    def shown(self) -> int | None:
        """Which edit of the journal is shown; None while there is none."""
        last = len(self.session.journal) - 1
        return None if last < 0 else min(self._shown, last)

    def show(self, index: int) -> None:
        """Show an edit of the journal. Raises MendkitError if it has no such one."""
        self._shown = self.session._place(index)

    def apply(self, example: EditExample) -> Edit:
        """Edit the model as it is now, write it down and show it.

        Raises DataError for a blank prompt or answer.
        """
        for name, text in (("prompt", example.prompt), ("new answer", example.target_new)):
            if not text.strip():
                raise DataError(
                    f"the {name} is blank; a fact needs a prompt and how it should go on"
                )
        edit = self.session.edit(example)
        self.show(-1)
        return edit

    def drop(self, index: int) -> Edit:
        """Drop an edit from the journal; the one that was shown stays so, if it is there."""
        shown, edit = self.shown, self.session.drop(index)
        self._shown = (shown or 0) - (index % (len(self.session.journal) + 1) < (shown or 0))
        return edit

    def journal(self) -> list[Row]:
        """A row for each edit: `edit` (in words), `strength`, `active`, `shown`."""
        return [
            {
                "edit": _words(edit),
                "strength": edit.strength,
                "active": edit.active,
                "shown": index == self.shown,
            }
            for index, edit in enumerate(self.session.journal)
        ]

    # -------------------------------------------------------------------------------------- reading

    def asked(self) -> list[tables.Asked]:
        """All prompts of the edit that is shown. Raises MendkitError if there is none."""
        return [asked for asked, _ in self._asked()]

    def completions(self) -> tuple[list[tables.Asked], list[str], list[str]]:
        """What the model writes after the prompts (`asked`), before and after."""
        asked = self.asked()
        prompts = tuple(prompt for _, prompt, _ in asked)

        def write() -> list[str]:
            return self.editor.base.generate_batch(prompts, max_new_tokens=self.max_new_tokens)

        return asked, self._before(prompts, write), write()

    def next_tokens(self, index: int = 0) -> Row:
        """Next-token probabilities after one of the prompts, before and after.

        A fact of `plots.next_token_bars`.
        """
        fact = answer_tokens(self.editor.base, self._asked()[index][1])
        prompt = str(fact["prompt"])
        among = tuple(token for token in (fact["new_token"], fact["old_token"]) if token)

        def read() -> dict[str, float]:
            return next_tokens(self.editor.base, prompt, k=MOST_TOKENS, among=among)

        return {**fact, "before": self._before((prompt, *among), read), "after": read()}

    def _before(self, key: Hashable, read: Callable[[], Any]) -> Any:
        """What `read` says of the unedited model, remembered by `key`."""
        if key not in self._unedited:
            with self.session.suspended():
                self._unedited[key] = read()
        return self._unedited[key]

    def _asked(self) -> list[tuple[tables.Asked, EditExample]]:
        """Each prompt, and the answers whose probabilities are read: the edit's, and its own."""
        if self.shown is None:
            raise MendkitError("the journal is empty; apply an edit first")
        out = []
        for e in self.session.journal[self.shown].examples:
            e = replace(e, target_new=self.editor.base.said(e.target_new))
            own = {probe.prompt: probe.answer for probe in (*e.neighbours, *e.unrelated)}
            for asked in tables.prompts_of(e, most=None):
                old = own.get(asked[1], e.ground_truth)
                out.append((asked, EditExample(asked[1], e.target_new, ground_truth=old)))
        return out


def _words(edit: Edit) -> str:
    first, *more = (f"{e.prompt} → {e.target_new}" for e in edit.examples)
    return f"{first} (and {len(more)} more)" if more else first
