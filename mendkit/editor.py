"""The editor: an archive in, edits out."""

from collections.abc import Sequence

import torch

from .archive import load_archive
from .data import EditExample, Tokens
from .edit import Edit, Updates
from .errors import ArchiveError, MendkitError
from .factors import as_one_loss, capture_factors
from .hparams import MENDHyperParams
from .mend import MEND
from .models import BaseModel, load_model
from .texts import edit_tokens
from .trunk import FrozenTrunk


class MENDEditor:
    """Edits one base model with one hypernetwork. The base model itself is never written to."""

    def __init__(self, base: BaseModel, mend: MEND, /, *, name: str = "MEND") -> None:
        self.base, self.mend, self.name = base, mend, name

    @property
    def hparams(self) -> MENDHyperParams:
        """The hypernetwork's own."""
        return self.mend.hparams

    @classmethod
    def from_hparams(cls, hparams: MENDHyperParams, *, base: BaseModel | None = None) -> "MENDEditor":
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
        archive.mend.hparams = archive.mend.hparams.replace(lr_scale=hparams.lr_scale)
        return cls(archive.base, archive.mend)

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
        factors = capture_factors(trunk, texts, tokens=h.edit_tokens, reduction=h.loss_reduction)
        if at_once and h.loss_reduction == "batch":
            factors = as_one_loss(factors, texts)
        return self.mend(factors, len(texts))

    def edit(self, examples: EditExample | Sequence[EditExample]) -> Edit:
        """One edit from one example, or one from several at once (their updates are summed)."""
        several = [examples] if isinstance(examples, EditExample) else list(examples)
        if not several:
            raise MendkitError("no example to edit; give an EditExample or a non-empty list")
        updates = self.updates([self.tokens(example) for example in several], at_once=True)
        return Edit(self.base, updates, several, strength=self.mend.hparams.lr_scale)

    def session(self) -> "EditSession":
        """Edits one after another on the edited model, with a journal."""
        return EditSession(self)


class EditSession:
    """A journal of edits made in sequence: each is computed on the model as edited so far."""

    def __init__(self, editor: MENDEditor) -> None:
        self.editor = editor
        self.journal: list[Edit] = []

    def edit(self, examples: EditExample | Sequence[EditExample]) -> Edit:
        """Compute an edit on the model as it is now, apply it and write it down."""
        edit = self.editor.edit(examples)
        self.journal.append(edit.apply())
        return edit

    def undo(self) -> Edit:
        """Take the last edit back."""
        if not self.journal:
            raise MendkitError("the journal is empty; nothing to undo")
        edit = self.journal.pop()
        edit.undo()
        return edit

    def scale(self, index: int, factor: float) -> None:
        """Make edit `index` of the journal `factor` times as strong (later edits are not recomputed)."""
        if not 0 <= index < len(self.journal):
            raise MendkitError(f"no edit {index} in the journal; it has {len(self.journal)}")
        self.journal[index].undo()
        self.journal[index] = self.journal[index].scale(factor).apply()

    def close(self) -> None:
        """Undo everything: the model is bit for bit what it was."""
        while self.journal:
            self.undo()

    def __enter__(self) -> "EditSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def scaled(updates: Updates, strength: float) -> Updates:
    """Updates at another strength."""
    return {name: update.scaled(strength) for name, update in updates.items()}
