"""The playground without its widgets: an editor, its journal, and what the model says.

*Before* is the unedited model, *after* the model with the edits of the journal in force.
One edit is shown: its prompts are those that are read.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from ..data.examples import EditExample
from ..errors import MendkitError
from ..evaluation.inspection import answer_tokens, open_editor
from ..hparams import MENDHyperParams
from ..mend.edit import Edit
from ..mend.validation import next_tokens
from ..reporting import tables
from ..reporting.tables import Row

MOST_TOKENS = 200  # whose probabilities are read; a chart shows the most probable


class Playground:
    """A model, its editor (`open_editor`, with `statistics`) and a journal (`session`)."""

    def __init__(
        self,
        hparams: MENDHyperParams,
        statistics: Sequence[EditExample] = (),
        *,
        max_new_tokens: int = 8,
    ) -> None:
        self.hparams, self.max_new_tokens = hparams, max_new_tokens
        self.statistics = statistics
        self.editor = open_editor(hparams, statistics)
        self.session = self.editor.session()
        self._shown = 0
        self._unedited: dict[Hashable, Any] = {}

    def load(self, archive: str | None) -> None:
        """Go on with another archive (None: the untrained control) and an empty journal.

        Raises ArchiveError or HyperParamError; then nothing is changed.
        """
        hparams = self.hparams.replace(archive=archive)
        with self.session.suspended():
            editor = open_editor(hparams, self.statistics, base=self.editor.base)
        self.session.close()
        self.hparams, self.editor, self.session = hparams, editor, editor.session()

    @property
    def shown(self) -> int | None:
        """Which edit of the journal is shown; None while there is none."""
        journal = self.session.journal  # which code may shorten
        return min(self._shown, len(journal) - 1) if journal else None

    def place(self) -> int:
        """`shown`. Raises MendkitError while there is no edit."""
        if self.shown is None:
            raise MendkitError("the journal is empty; apply an edit first")
        return self.shown

    def show(self, index: int) -> None:
        """Show an edit of the journal, counted from 0."""
        self._shown = index

    def apply(self, example: EditExample) -> Edit:
        """Edit the model as it is now, and show the edit."""
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

    def completions(self) -> tuple[list[tables.Asked], list[str], list[str]]:
        """The prompts of the edit that is shown, and what is written before and after it."""
        asked: list[tables.Asked] = []
        for example in self._examples():
            asked += tables.prompts_of(example, most=None)
        _, prompts, _ = zip(*asked, strict=True)
        answers = [[wanted] if wanted else [] for _, _, wanted in asked]

        def write() -> list[str]:
            limit, base = self.max_new_tokens, self.editor.base
            return base.generate_batch(prompts, max_new_tokens=limit, answers=answers)

        return asked, self._before(tuple(asked), write), write()

    def next_tokens(self) -> Row:
        """Next-token probabilities after the edit's prompt, for `plots.next_token_bars`."""
        fact = answer_tokens(self.editor.base, self._examples()[0])
        prompt = str(fact["prompt"])
        among = tuple(token for token in (fact["new_token"], fact["old_token"]) if token)

        def read() -> dict[str, float]:
            return next_tokens(self.editor.base, prompt, k=MOST_TOKENS, among=among)

        return {**fact, "before": self._before((prompt, *among), read), "after": read()}

    def _before(self, key: Hashable, read: Callable[[], Any]) -> Any:
        if key not in self._unedited:
            with self.session.suspended():
                self._unedited[key] = read()
        return self._unedited[key]

    def _examples(self) -> list[EditExample]:
        """The examples of the edit that is shown, with the answers as the model says them."""
        examples, said = self.session.journal[self.place()].examples, self.editor.base.said
        return [replace(example, target_new=said(example.target_new)) for example in examples]
