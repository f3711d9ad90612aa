"""The playground without its widgets: an editor, its journal, and what the model says.

*Before* is the unedited model, *after* the model with the edits of the journal in force.
One edit is shown: its prompts are those that are read.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from ..data.examples import EditExample
from ..errors import DataError, MendkitError
from ..evaluation.inspection import answer_tokens, open_editor
from ..hparams import MENDHyperParams
from ..mend.edit import Edit
from ..mend.validation import next_tokens
from ..reporting import tables
from ..reporting.tables import Row

MOST_TOKENS = 200  # whose probabilities are read; a chart shows the most probable


class Playground:
    """A model, its editor (`open_editor`) and a journal (`session`).

    `statistics` are those of the stand-in where `archive` is null.
    `max_new_tokens` limits what is written after a prompt.
    """

    def __init__(
        self,
        hparams: MENDHyperParams,
        statistics: Sequence[EditExample] = (),
        *,
        max_new_tokens: int = 8,
    ) -> None:
        self.hparams, self.max_new_tokens = hparams, max_new_tokens
        self.editor = open_editor(hparams, statistics)
        self.session = self.editor.session()
        self._shown = 0
        self._unedited: dict[Hashable, Any] = {}

    @property
    def shown(self) -> int | None:
        """Which edit of the journal is shown; None while there is none."""
        last = len(self.session.journal) - 1
        return None if last < 0 else min(self._shown, last)

    def show(self, index: int) -> None:
        """Show an edit of the journal, counted from 0."""
        self._shown = index

    def apply(self, example: EditExample) -> Edit:
        """Edit the model as it is now, and show the edit. Raises DataError for a blank text."""
        for name, text in (("prompt", example.prompt), ("new answer", example.target_new)):
            if not text.strip():
                raise DataError(f"the {name} is blank; a fact needs a prompt and an answer")
        edit = self.session.edit(example)
        self.show(len(self.session.journal) - 1)
        return edit

    def journal(self) -> list[Row]:
        """A row for each edit: `edit` (in words), `strength`, `state`."""
        rows: list[Row] = []
        for edit in self.session.journal:
            words = "; ".join(f"{e.prompt} → {e.target_new}" for e in edit.examples)
            state = "in force" if edit.active else "undone"
            rows.append({"edit": words, "strength": edit.strength, "state": state})
        return rows

    # ---------------------------------------- reading

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
        """Next-token probabilities after one of the prompts, for `plots.next_token_bars`."""
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
        """Each prompt, and the answers whose probabilities are read: the edit's and the old one."""
        if self.shown is None:
            raise MendkitError("the journal is empty; apply an edit first")
        found = []
        for example in self.session.journal[self.shown].examples:
            new = self.editor.base.said(example.target_new)
            example = replace(example, target_new=new)
            probes = (*example.neighbours, *example.unrelated)
            old = {probe.prompt: probe.answer for probe in probes}
            for asked in tables.prompts_of(example, most=None):
                truth = old.get(asked[1], example.ground_truth)
                alone = EditExample(
                    asked[1], new, ground_truth=truth, target_prefix=example.target_prefix
                )
                found.append((asked, alone))
        return found
