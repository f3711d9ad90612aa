"""The editor: an archive in, edits out (MEND, Algorithm 2), and edits in sequence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from pathlib import Path

import torch

from ..data.examples import EditExample
from ..errors import ArchiveError, MendkitError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.load import load_model
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk
from ..places import archives_here
from ..runs import file_sha256
from .archive import OF_EDITING, OF_EITHER, load_archive, look_at_archive
from .batches import inner_tokens, prepare_texts
from .edit import Edit, load_edits, save_edits
from .factors import as_one_loss, capture_inputs, edit_factors
from .hypernetwork import MEND
from .least_squares import Memory
from .updates import Updates, at_some_sites, capped, in_force, unedited

KEYS_BATCH = 32

# One example, several, or a prompt.
Examples = EditExample | Sequence[EditExample] | str


class MENDEditor:
    """Edits one base model with one hypernetwork. The base model itself is never written to.

    `archive` is the SHA-256 of the hypernetwork's file, if it comes from one.
    """

    def __init__(
        self, base: BaseModel, mend: MEND, *, name: str = "MEND", archive: str | None = None
    ) -> None:
        self.base, self.mend, self.name, self.archive = base, mend, name, archive
        self.memory: Memory | None = None  # earlier edits of a sequence, if it keeps them
        self.gather: tuple[str, ...] = ()  # sites whose statistics run on

    def __repr__(self) -> str:
        return f"MENDEditor({self.name} on {self.base.name}, {len(self.mend.sites)} sites)"

    @property
    def hparams(self) -> MENDHyperParams:
        """The settings of the hypernetwork."""
        return self.mend.hparams

    @classmethod
    def from_hparams(
        cls, hparams: MENDHyperParams, *, base: BaseModel | None = None
    ) -> "MENDEditor":
        """Load the base model (unless given) and the archive that `hparams` name.

        Raises ArchiveError if `archive` is null, and as `look_at_archive` and `load_archive`.
        """
        if hparams.archive is None:
            raise ArchiveError(
                "archive is null: there is nothing to edit with; train one with "
                f"`python -m mendkit train CONFIG` and set `archive:` to the path it prints"
                f"{archives_here()}"
            )
        look_at_archive(hparams)
        archive = load_archive(hparams.archive, base=base or load_model(hparams))
        trained = archive.mend.hparams
        given = {key: getattr(hparams, key) for key in OF_EDITING if key != "archive"}
        for key in OF_EITHER:
            default = type(hparams).model_fields[key].default
            if key not in hparams.model_fields_set and given[key] == default:
                given[key] = getattr(trained, key)
        archive.mend.hparams = trained.replace(**given)
        return cls(archive.base, archive.mend, archive=file_sha256(archive.path))

    def tokens(self, example: EditExample) -> Tokens:
        """The text whose loss makes the edit."""
        return inner_tokens(self.base, self.hparams, example)

    @torch.no_grad()
    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one for each text: independent ones, or all made at once."""
        h, n = self.hparams, len(texts)
        trunk = trunk or FrozenTrunk(self.base)
        memory, together = None, 1
        gather: tuple[str, ...] = ()
        if at_once:
            memory, gather, together = self.memory, self.gather, n
        # 1. The gradient of the edit's loss at the sites, as factors. With a memory it is that of
        #    the unedited model, as if the edit were made at once with those in force.
        with unedited(self.base) if memory is not None else nullcontext():
            factors = edit_factors(trunk, h, texts)
        if at_once and h.loss_reduction == "batch":
            factors = as_one_loss(factors, texts)
        # 2. The hypernetwork makes low-rank updates of them.
        if memory is not None and h.lr_scale:
            for site in self.base.sites:
                memory.held[site.name] = in_force(self.base, site) / h.lr_scale
        made = self.mend(factors, n, at_once=together, memory=memory, gather=gather)
        made = at_some_sites(made, texts, h)
        # 3. A limit on the weight change, if there is one.
        if h.max_relative_norm:
            made = capped(self.base, made, h.max_relative_norm, strength=h.lr_scale)
        return made

    def edit(self, examples: Examples, target_new: str | None = None) -> Edit:
        """One edit, of an example, of `edit("prompt", "new answer")`, or of several examples.

        An archive that was trained with `edit_on: text` also takes a sentence: `edit("sentence")`.
        Raises MendkitError if an answer is missing, or the change is not finite or zero everywhere.
        """
        # 1. Examples.
        if isinstance(examples, str):
            passages: tuple[str, ...] = ()
            if target_new is None and self.hparams.edit_on == "text":
                target_new, passages = "", (examples,)
            elif target_new is None:
                raise MendkitError(f"no new answer for {examples!r}; give edit(prompt, answer)")
            examples = EditExample(prompt=examples, target_new=target_new, passages=passages)
        elif target_new is not None:
            raise MendkitError("an EditExample has a new answer; give edit(example), or replace it")
        if isinstance(examples, EditExample):
            examples = [examples]
        several = list(examples)
        for example in several:
            if not isinstance(example, EditExample):
                raise MendkitError(f"{example!r:.60} is no EditExample(prompt, target_new)")
        if not several:
            raise MendkitError("no example to edit; give an EditExample or a non-empty list")
        # 2. The weight change, which must be one.
        updates = self.updates([self.tokens(example) for example in several], at_once=True)
        norms = torch.cat([update.norms() for update in updates.values()])
        found = ""
        if not bool(norms.isfinite().all()):
            found, remedy = "not finite", "smaller"
        elif not bool(norms.any()):
            found, remedy = "zero", "larger"
        if found:
            raise MendkitError(
                f"the weight change for {several[0].prompt!r} is {found}; train the archive anew "
                f"with a {remedy} `edit_lr`, or edit other layers (`inner_params`)"
            )
        strength = self.hparams.lr_scale
        return Edit(self.base, updates, several, strength=strength, archive=self.archive)

    # ---------------------------------------- many edits

    def session(self) -> "EditSession":
        """Edits one after another on the edited model, with a journal."""
        return EditSession(self)

    def remembering(self) -> "MENDEditor":
        """The same editor at the start of a sequence, with a memory of its edits or, with
        `lifelong_norm`, statistics that run on, apart from this one's.
        """
        editor = copy(self)
        editor.memory = Memory() if self.hparams.aggregate == "least_squares" else None
        if self.hparams.lifelong_norm:
            editor.mend = deepcopy(self.mend)
            editor.gather = tuple(site.name for site in self.mend.sites)
        return editor

    @torch.no_grad()
    def by_least_squares(
        self, examples: Sequence[EditExample], *, ridge: float = 0.003, ridge_shared: float = 0.04
    ) -> "MENDEditor":
        """The same hypernetwork with `aggregate: least_squares`; it spares the examples' keys.

        A `ridge_shared` of 1e9 leaves out what a fact's wordings share: edits hold better,
        paraphrases do not.
        """
        trunk = FrozenTrunk(self.base)
        texts: list[Tokens] = []
        for example in prepare_texts(self.base, self.hparams, examples):
            texts += example.first(1).all()
        batches = (texts[at : at + KEYS_BATCH] for at in range(0, len(texts), KEYS_BATCH))
        inputs = (capture_inputs(trunk, batch) for batch in batches)
        mend = self.mend.with_least_squares(inputs, ridge=ridge, ridge_shared=ridge_shared)
        return MENDEditor(self.base, mend, name=f"{self.name}, least squares")


class EditSession:
    """A journal of edits made in sequence, each on the model as edited so far.

    With `aggregate: least_squares` they are made as if at once with those in force.
    Edits are undone, reapplied, scaled or dropped in any order; later ones stay as they are.
    What the model computes depends on the journal alone, to the bit.
    """

    def __init__(self, editor: MENDEditor) -> None:
        self.editor = editor.remembering()
        self.journal: list[Edit] = []

    def __repr__(self) -> str:
        edits = f"{len(self.journal)} edits, {len(self.active)} in force"
        return f"EditSession({edits}, {self.editor.name} on {self.editor.base.name})"

    def __enter__(self) -> "EditSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def load(cls, path: str | Path, editor: MENDEditor) -> "EditSession":
        """The session that `save` wrote, with its edits in force; raises as `Edit.load`.

        With `aggregate: least_squares`, new edits do not spare the keys of those loaded.
        """
        session = cls(editor)
        for edit, active in load_edits(path, editor.base):
            session.journal.append(edit.apply() if active else edit)
        return session

    def edit(self, examples: Examples, target_new: str | None = None) -> Edit:
        """Make an edit on the model as it is now, apply it and write it down."""
        edit = self.editor.edit(examples, target_new)
        self.journal.append(edit.apply())
        return edit

    @property
    def active(self) -> list[Edit]:
        """The edits in force, in the journal's order."""
        return [edit for edit in self.journal if edit.active]

    def undo(self, index: int | None = None) -> Edit:
        """Undo an edit, by default the latest in force; it stays in the journal."""
        edit = self._latest() if index is None else self.journal[self._place(index)]
        edit.undo()
        return edit

    def reapply(self, index: int = -1) -> Edit:
        """Put an undone edit in force again."""
        edit = self.journal[self._place(index)].apply()
        self._in_order()
        return edit

    def scale(self, index: int, factor: float) -> Edit:
        """Make an edit of the journal `factor` times as strong."""
        return self.set_strength(index, self.journal[self._place(index)].strength * factor)

    def set_strength(self, index: int, strength: float) -> Edit:
        """Give an edit of the journal this strength, also after 0; one that is undone stays so."""
        index = self._place(index)
        edit = self.journal[index]
        self.journal[index] = edit.at(strength)
        if edit.active:
            edit.undo()
            self.journal[index].apply()
            self._in_order()
        return self.journal[index]

    def drop(self, index: int = -1) -> Edit:
        """Undo an edit, if it is in force, and take it out of the journal."""
        edit = self.journal.pop(self._place(index))
        if edit.active:
            edit.undo()
        return edit

    def combined(self) -> Edit:
        """The edits in force as one, not applied: to save as an adapter or to merge."""
        self._latest()
        return Edit.combined(self.active)

    def save(self, path: str | Path) -> Path:
        """Write the journal as one file, undone edits too."""
        return save_edits(path, self.journal)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the context no edit is in force; afterwards the same ones are again."""
        active = self.active
        for edit in active:
            edit.undo()
        try:
            yield
        finally:
            for edit in active:
                edit.apply()

    def close(self) -> None:
        """Undo everything and empty the journal: the model is bit for bit what it was."""
        while self.journal:
            self.drop()

    def _latest(self) -> Edit:
        if not self.active:
            raise MendkitError("no edit of the journal is in force; make or reapply one first")
        return self.active[-1]

    def _place(self, index: int) -> int:
        if not -len(self.journal) <= index < len(self.journal):
            raise MendkitError(f"no edit {index} in the journal; it has {len(self.journal)}")
        return index % len(self.journal)

    def _in_order(self) -> None:
        """Let the edits act in the journal's order: floating-point sums depend on it."""
        with self.suspended():
            pass
