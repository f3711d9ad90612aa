"""Controls: editors that an editor must beat to have learned something."""

from collections.abc import Sequence

from .data import EditExample
from .editor import MENDEditor
from .mend import MEND
from .models import BaseModel
from .texts import prepare_texts
from .trunk import FrozenTrunk
from .validation import validate

IDENTITY_EDIT_LRS = (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)


def identity_editor(base: BaseModel, mend: MEND, /, *, edit_lr: float) -> MENDEditor:
    """MEND at identity initialisation: the normalised gradient with one step size, `mend`'s statistics, no training."""
    fresh = MEND(mend.sites, mend.hparams.replace(edit_lr=edit_lr, init="id_xavier")).to(base.device)
    fresh.moments.load_state_dict(mend.moments.state_dict())
    return MENDEditor(base, fresh, name="identity")


def tune_identity(
    base: BaseModel,
    mend: MEND,
    examples: Sequence[EditExample],
    /,
    *,
    edit_lrs: Sequence[float] = IDENTITY_EDIT_LRS,
) -> tuple[MENDEditor, tuple[dict[str, float], ...]]:
    """The identity control at the step size with the best validation score on `examples`, and one row per step size.

    Rows hold `edit_lr` and the values of `validate`.
    """
    texts, trunk = prepare_texts(base, mend.hparams, examples), FrozenTrunk(base)
    trunk.fill([text for example in texts for text in example.all()])
    unit = identity_editor(base, mend, edit_lr=1.0).mend
    rows = tuple(
        {"edit_lr": edit_lr, **validate(trunk, unit, texts, mend.hparams, strength=edit_lr)} for edit_lr in edit_lrs
    )
    best = max(rows, key=lambda row: row["score"])
    return identity_editor(base, mend, edit_lr=best["edit_lr"]), rows
