"""The editor: an archive in, edits out."""

import logging
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
from .archive import load_archive
from .batches import edit_tokens, prepare_texts
from .edit import Edit, load_edits, save_edits
from .factors import as_one_loss, capture_factors, capture_inputs
from .hypernetwork import MEND
from .least_squares import Memory
from .updates import Updates, capped, in_force, unedited

logger = logging.getLogger(__name__)

KEYS_BATCH = 32


class MENDEditor:
    """Edits one base model with one hypernetwork. The base model itself is never written to."""

    def __init__(
        self, base: BaseModel, mend: MEND, /, *, name: str = "MEND", archive: str | None = None
    ) -> None:
        self.base, self.mend, self.name = base, mend, name
        self.memory: Memory | None = None  # keys of earlier edits, if it keeps them
        self.gather: tuple[str, ...] = ()  # sites whose statistics run on
        self.archive = archive  # the SHA-256 of the hypernetwork's file, if it comes from one

    @property
    def hparams(self) -> MENDHyperParams:
        """The hypernetwork's own."""
        return self.mend.hparams

    @classmethod
    def from_hparams(
        cls, hparams: MENDHyperParams, *, base: BaseModel | None = None
    ) -> "MENDEditor":
        """Load the base model (unless given) and the archive that `hparams` name.

        Raises ArchiveError if `archive` is null or belongs to another model.
        """
        if hparams.archive is None:
            raise ArchiveError(
                "archive is null: there is nothing to edit with; train one with `python -m mendkit train CONFIG` "
                "and set `archive:` to the path it prints"
            )
        base = base or load_model(hparams)
        archive = load_archive(hparams.archive, base=base)
        own = archive.mend.hparams
        archive.mend.hparams = own.replace(
            lr_scale=hparams.lr_scale,
            max_relative_norm=hparams.max_relative_norm or own.max_relative_norm,
            lifelong_norm=hparams.lifelong_norm or own.lifelong_norm,
        )
        return cls(archive.base, archive.mend, archive=archive.sha256())

    def remembering(self) -> "MENDEditor":
        """The same editor at the start of a sequence: with `aggregate: least_squares` it keeps what it edits, and what
        the edits in force and a new one come to is what they would have come to at once; with `lifelong_norm` it has
        statistics of its own."""
        editor = copy(self)
        editor.memory = {} if self.hparams.aggregate == "least_squares" else None
        if self.hparams.lifelong_norm:
            editor.mend, editor.gather = (
                deepcopy(self.mend),
                tuple(site.name for site in self.mend.sites),
            )
        return editor

    @torch.no_grad()
    def by_least_squares(
        self,
        examples: Sequence[EditExample],
        /,
        *,
        ridge: float = 0.003,
        ridge_shared: float = 0.04,
    ) -> "MENDEditor":
        """The same hypernetwork, whose updates least squares put together, as it was not trained for. The keys to spare
        are those of the examples' texts. A `ridge_shared` of 1e9 leaves out what a fact's wordings share: then edits
        hold better, and paraphrases do not."""
        trunk = FrozenTrunk(self.base)
        texts = [
            text
            for own in prepare_texts(self.base, self.hparams, examples)
            for text in own.first(1).all()
        ]
        inputs = (
            capture_inputs(trunk, texts[at : at + KEYS_BATCH])
            for at in range(0, len(texts), KEYS_BATCH)
        )
        mend = self.mend.with_least_squares(inputs, ridge=ridge, ridge_shared=ridge_shared)
        return MENDEditor(self.base, mend, name=f"{self.name}, least squares")

    def tokens(self, example: EditExample) -> Tokens:
        """The edit prompt with its new answer, as trained."""
        return edit_tokens(self.base, self.mend.hparams, example)

    @torch.no_grad()
    def updates(
        self, texts: Sequence[Tokens], /, *, trunk: FrozenTrunk | None = None, at_once: bool = False
    ) -> Updates:
        """Updates of edits, one per text (from `EditExample` by `tokens`): independent ones, or all made at once."""
        h = self.mend.hparams
        trunk = trunk or FrozenTrunk(self.base)
        together = (
            at_once and self.memory is not None
        )  # with the edits in force, as if made at once with them
        with unedited(self.base) if together else nullcontext():
            factors = capture_factors(
                trunk, texts, tokens=h.edit_tokens, reduction=h.loss_reduction
            )
        if at_once and h.loss_reduction == "batch":
            factors = as_one_loss(factors, texts)
        if at_once:
            own = {"gather": self.gather, "at_once": len(texts), "memory": self.memory}
            if together and h.lr_scale:
                own["held"] = {
                    site.name: in_force(self.base, site) / h.lr_scale for site in self.base.sites
                }
            made = self.mend(factors, len(texts), **own)
        else:
            made = self.mend(factors, len(texts))
        return (
            capped(self.base, made, h.max_relative_norm, strength=h.lr_scale)
            if h.max_relative_norm
            else made
        )

    def edit(self, examples: EditExample | Sequence[EditExample]) -> Edit:
        """One edit from one example, or one from several at once (`aggregate` says how).

        Raises MendkitError if the weight change is not finite, or zero at every site.
        """
        several = [examples] if isinstance(examples, EditExample) else list(examples)
        if not several:
            raise MendkitError("no example to edit; give an EditExample or a non-empty list")
        updates = self.updates([self.tokens(example) for example in several], at_once=True)
        _warn_of_contradictions(several)
        norms = torch.cat([update.norms() for update in updates.values()])
        if not bool(norms.isfinite().all()) or not bool(norms.any()):
            found = "zero" if bool(norms.isfinite().all()) else "not finite"
            raise MendkitError(
                f"the weight change for {several[0].prompt!r} is {found}; train the archive anew with a "
                f"{'larger' if found == 'zero' else 'smaller'} `edit_lr`, or edit other layers (`inner_params`)"
            )
        return Edit(
            self.base, updates, several, strength=self.mend.hparams.lr_scale, archive=self.archive
        )

    def session(self) -> "EditSession":
        """Edits one after another on the edited model, with a journal."""
        return EditSession(self)


def _warn_of_contradictions(examples: Sequence[EditExample]) -> None:
    told: dict[str, dict[str, None]] = {}
    for example in examples:
        told.setdefault(example.prompt, {})[example.target_new] = None
    for prompt, answers in told.items():
        if len(answers) > 1:
            listed = ", ".join(map(repr, answers))
            logger.warning(
                "%r is given %d answers: %s; it can have one", prompt, len(answers), listed
            )


class EditSession:
    """A journal of edits made in sequence: each is computed on the model as edited so far; with
    `aggregate: least_squares` on the unedited model, as if made at once with those in force.

    Any of them can be taken back, put in force again, scaled or dropped, in any order; later ones are not recomputed.
    What the model then computes depends on the journal alone, to the bit, and not on how it came about. Indices count
    from the end if negative.
    """

    def __init__(self, editor: MENDEditor) -> None:
        self.editor = editor.remembering()
        self.journal: list[Edit] = []

    @classmethod
    def load(cls, path: str | Path, editor: MENDEditor) -> "EditSession":
        """The session that `save` wrote, with the edits in force that were; raises ArchiveError as `Edit.load`. With
        `aggregate: least_squares` edits made from now on do not spare the keys of those loaded."""
        session = cls(editor)
        for edit, active in load_edits(path, editor.base):
            session.journal.append(edit.apply() if active else edit)
        return session

    def edit(self, examples: EditExample | Sequence[EditExample]) -> Edit:
        """Compute an edit on the model as it is now, apply it and write it down."""
        edit = self.editor.edit(examples)
        self.journal.append(edit.apply())
        return edit

    @property
    def active(self) -> list[Edit]:
        """The edits in force, in the journal's order."""
        return [edit for edit in self.journal if edit.active]

    def undo(self, index: int | None = None) -> Edit:
        """Take an edit back, by default the latest in force; it stays in the journal."""
        if not self.journal:
            raise MendkitError("the journal is empty; nothing to undo")
        if index is None and not self.active:
            raise MendkitError("no edit of the journal is in force; nothing to undo")
        edit = self.active[-1] if index is None else self.journal[self._place(index)]
        edit.undo()
        return edit

    def reapply(self, index: int = -1) -> Edit:
        """Put an undone edit in force again."""
        edit = self.journal[self._place(index)].apply()
        self._in_order()
        return edit

    def scale(self, index: int, factor: float) -> Edit:
        """Make an edit of the journal `factor` times as strong; one that is undone stays so."""
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
        """Take an edit back, if it is in force, and out of the journal."""
        edit = self.journal.pop(self._place(index))
        if edit.active:
            edit.undo()
        return edit

    def combined(self) -> Edit:
        """The edits in force as one, not applied: to save as an adapter or to merge."""
        if not self.active:
            raise MendkitError("no edit of the journal is in force; make or reapply one first")
        return Edit.combined(self.active)

    def save(self, path: str | Path) -> Path:
        """Write the journal as one file, undone edits too."""
        return save_edits(path, self.journal)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the context the model is unedited; afterwards the edits that were in force are so again."""
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

    def _place(self, index: int) -> int:
        """An index of the journal, from its start."""
        if not -len(self.journal) <= index < len(self.journal):
            raise MendkitError(f"no edit {index} in the journal; it has {len(self.journal)}")
        return index % len(self.journal)

    def _in_order(self) -> None:
        """Let the edits in force act in the journal's order: sums in floating point depend on it."""
        with self.suspended():
            pass

    def __enter__(self) -> "EditSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
