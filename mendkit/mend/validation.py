"""Teacher-forced validation: what decides which archive is kept."""

from collections.abc import Iterator, Sequence
from itertools import chain
from statistics import fmean

import torch

from ..data.examples import EditExample, headline_mean
from ..hparams import MENDHyperParams
from ..models.trunk import FrozenTrunk
from .batches import RIVALS, ExampleTexts, prepare_texts, role_weights
from .editor import MENDEditor
from .factors import capture_factors
from .hypernetwork import MEND
from .losses import margin_shortfall
from .scoring import forced
from .updates import Updates

# The name of each role's share.
SHARE_NAMES = {
    "edit": "edit_success",
    "paraphrases": "paraphrase",
    "neighbours": "neighbourhood",
    "unrelated": "locality",
    RIVALS: "ns",
}


@torch.no_grad()
def validate(
    trunk: FrozenTrunk,
    mend: MEND,
    examples: Sequence[ExampleTexts],
    h: MENDHyperParams,
    *,
    strength: float = 1.0,
    at_once: int = 1,
) -> dict[str, float]:
    """Teacher-forced shares over single edits, or `at_once` made as one, and the loss.

    `edit_success`, `paraphrase`: all target tokens right, the end of the answer included.
    `neighbourhood`, `locality`: share of answer positions whose argmax is as before. With `cmargin`
    also `ns`: neighbours whose own answer is more likely than the new one. `score`: the harmonic
    mean of those that the data have.
    """
    shares: dict[str, list[float]] = {role: [] for role in SHARE_NAMES}
    losses: dict[str, list[float]] = {role: [] for role in SHARE_NAMES}
    size = h.val_batch_size if at_once == 1 else at_once
    for at in range(0, len(examples), size):
        group = examples[at : at + size]
        edits = [texts.edit for texts in group]
        factors = capture_factors(trunk, edits, tokens=h.edit_tokens, reduction=h.loss_reduction)
        updates = mend(factors, len(group), at_once=min(at_once, len(group)))
        updates = {name: update.scaled(strength) for name, update in updates.items()}
        for role, share, loss in _read_under(trunk, group, updates, h.margin):
            shares[role].append(share)
            losses[role].append(loss)
    found = {SHARE_NAMES[role]: fmean(values) for role, values in shares.items() if values}
    means = {role: fmean(values) for role, values in losses.items() if values}
    weights = role_weights(h)
    return {
        **found,
        **{f"loss.{role}": mean for role, mean in means.items()},
        "loss": sum(weights[role] * mean for role, mean in means.items()),
        "score": headline_mean(found.values()),
    }


def _read_under(
    trunk: FrozenTrunk, group: Sequence[ExampleTexts], updates: Updates, margin: float
) -> Iterator[tuple[str, float, float]]:
    """Role, share and loss of every text of some edits, read under its edit's update."""
    targets = forced(trunk, [[texts.edit, *texts.paraphrases] for texts in group], updates)
    for texts, values in zip(group, targets, strict=True):
        roles = ["edit"] + ["paraphrases"] * len(texts.paraphrases)
        wanted = [text.targets for text in (texts.edit, *texts.paraphrases)]
        for role, target, value in zip(roles, wanted, values, strict=True):
            yield role, float(value.argmax == target), -fmean(value.logp)
    to_keep = [[*texts.neighbours, *texts.unrelated] for texts in group]
    preserved = forced(trunk, to_keep, updates, compare=True)
    for texts, values in zip(group, preserved, strict=True):
        roles = ["neighbours"] * len(texts.neighbours) + ["unrelated"] * len(texts.unrelated)
        for role, value in zip(roles, values, strict=True):
            yield role, fmean(value.same), fmean(value.kl)
    pairs = [list(chain.from_iterable(texts.rivals.items())) for texts in group]
    for values in forced(trunk, pairs, updates):
        nll = torch.tensor([-fmean(value.logp) for value in values])
        right, rival = nll[::2], nll[1::2]
        shortfall = margin_shortfall(right, rival, margin=margin)
        for share, loss in zip((right < rival).tolist(), shortfall.tolist(), strict=True):
            yield RIVALS, float(share), loss


def strength_curve(
    editor: MENDEditor, examples: Sequence[EditExample], *, strengths: Sequence[float]
) -> list[dict[str, float]]:
    """`validate` at several strengths of the same edits (1: as trained); one row per strength."""
    h = editor.mend.hparams
    prepared, trunk = prepare_texts(editor.base, h, examples), FrozenTrunk(editor.base)
    trunk.fill([text for texts in prepared for text in texts.all()])
    rows = []
    for strength in strengths:
        scores = validate(trunk, editor.mend, prepared, h, strength=strength)
        rows.append({"strength": strength, **scores})
    return rows
