"""Teacher-forced validation: what decides which archive is kept."""

from collections.abc import Sequence
from statistics import fmean, harmonic_mean

import torch

from ..data.examples import EditExample
from ..hparams import MENDHyperParams
from ..models.trunk import FrozenTrunk
from .batches import RIVALS, ROLES, ExampleTexts, prepare_texts, role_weights
from .editor import MENDEditor
from .factors import capture_factors
from .hypernetwork import MEND
from .losses import margin_shortfall
from .scoring import forced


@torch.no_grad()
def validate(
    trunk: FrozenTrunk,
    mend: MEND,
    examples: Sequence[ExampleTexts],
    h: MENDHyperParams,
    /,
    *,
    strength: float = 1.0,
    at_once: int = 1,
) -> dict[str, float]:
    """Teacher-forced shares over single edits, or `at_once` made as one, and the loss.

    `edit_success`, `paraphrase`: all target tokens right, the end of the answer included; `neighbourhood`, `locality`:
    share of answer positions whose argmax is as before; with `cmargin` also `ns`, neighbours whose own answer is more
    likely than the new one; `score`: the harmonic mean of those that the data have.
    """
    success: dict[str, list[float]] = {role: [] for role in (*ROLES, RIVALS)}
    losses: dict[str, list[float]] = {role: [] for role in (*ROLES, RIVALS)}
    size = h.val_batch_size if at_once == 1 else at_once
    for at in range(0, len(examples), size):
        own = examples[at : at + size]
        factors = capture_factors(
            trunk, [e.edit for e in own], tokens=h.edit_tokens, reduction=h.loss_reduction
        )
        updates = mend(factors, len(own), at_once=1 if at_once == 1 else len(own))
        updates = {name: u.scaled(strength) for name, u in updates.items()}
        targets = forced(trunk, [[e.edit, *e.paraphrases] for e in own], updates)
        keep = forced(trunk, [[*e.neighbours, *e.unrelated] for e in own], updates, compare=True)
        for example, read, kept in zip(own, targets, keep, strict=True):
            n = len(example.neighbours)
            for role, texts, values in (
                ("edit", (example.edit,), read[:1]),
                ("paraphrases", example.paraphrases, read[1:]),
            ):
                success[role] += [
                    float(v.argmax == t.targets) for t, v in zip(texts, values, strict=True)
                ]
                losses[role] += [-fmean(v.logp) for v in values]
            for role, values in (("neighbours", kept[:n]), ("unrelated", kept[n:])):
                success[role] += [fmean(v.same) for v in values]
                losses[role] += [fmean(v.kl) for v in values]
        pairs = forced(
            trunk, [[text for pair in e.rivals.items() for text in pair] for e in own], updates
        )
        for values in pairs:
            nll = torch.tensor([-fmean(v.logp) for v in values])
            success[RIVALS] += (nll[::2] < nll[1::2]).float().tolist()
            losses[RIVALS] += margin_shortfall(nll[::2], nll[1::2], margin=h.margin).tolist()
    names = dict(
        zip(success, ("edit_success", "paraphrase", "neighbourhood", "locality", "ns"), strict=True)
    )
    out = {names[role]: fmean(values) for role, values in success.items() if values}
    out |= {f"loss.{role}": fmean(values) for role, values in losses.items() if values}
    weights = role_weights(h)
    loss = sum(weights[role] * fmean(values) for role, values in losses.items() if values)
    return out | {
        "loss": loss,
        "score": harmonic_mean([out[n] for n in names.values() if n in out]),
    }


def strength_curve(
    editor: MENDEditor, examples: Sequence[EditExample], /, *, strengths: Sequence[float]
) -> list[dict[str, float]]:
    """`validate` at several strengths of the same edits (1 is the editor as trained); one row per strength."""
    h = editor.mend.hparams
    texts, trunk = prepare_texts(editor.base, h, examples), FrozenTrunk(editor.base)
    trunk.fill([text for example in texts for text in example.all()])
    return [
        {"strength": s, **validate(trunk, editor.mend, texts, h, strength=s)} for s in strengths
    ]
