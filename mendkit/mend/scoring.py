"""Texts read under edits with their answers given (teacher forcing), to validate and evaluate.

Every text belongs to an edit. A batch of edits is one suffix pass with one side branch an edit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.base import BaseModel
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from .losses import wide
from .updates import Updates, select, side_branches

POSITIONS_PER_PASS = 1024


@dataclass(frozen=True)
class Forced:
    """One text read under an edit. Tuples run over the text's scored positions."""

    argmax: tuple[int, ...]
    logp: tuple[float, ...]  # log P(target), nats; empty if the text has no answer
    kl: tuple[float, ...]  # KL(before ‖ after), nats; empty unless asked for
    same: tuple[bool, ...]  # argmax as before the edit; empty unless asked for


@torch.no_grad()
def forced(
    trunk: FrozenTrunk,
    texts: Sequence[Sequence[Tokens]],
    updates: Updates | None,
    *,
    compare: bool = False,
) -> list[list[Forced]]:
    """Read `texts[e]` under edit e (under none if `updates` is None).

    `compare` adds KL and argmax agreement with the unedited model.
    """
    values: list[list[Forced]] = []
    most_positions = max(sum(len(text.scored) for text in each) for each in texts)
    step = max(1, POSITIONS_PER_PASS // max(1, most_positions))
    for at in range(0, len(texts), step):
        edits = texts[at : at + step]
        given = [text for each in edits for text in each]
        # every edit of a pass needs the same number of rows: any text fills up
        most = max(len(each) for each in edits)
        rows = []
        for each in edits:
            rows += [*each, *given[:1] * (most - len(each))]
        chosen = select(updates or {}, range(at, at + len(edits)))
        read = _read(trunk, rows, chosen, compare) if rows else []
        for e, each in enumerate(edits):
            values.append(read[e * most : e * most + len(each)])
    return values


def _read(
    trunk: FrozenTrunk, texts: Sequence[Tokens], updates: Updates, compare: bool
) -> list[Forced]:
    """Each text under its edit's update."""
    batch = collate(texts, trunk.base.pad_id, trunk.base.device)
    with side_branches(trunk.base, updates):
        logits = wide(trunk.suffix(texts, batch))
    logp, best = logits.log_softmax(-1), logits.argmax(-1)
    target = logp.gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]
    kl = same = best[:0]
    if compare:
        before = wide(trunk.before(texts, batch))
        reference = before.log_softmax(-1)
        kl = (reference.exp() * (reference - logp)).sum(-1).clamp(min=0)
        same = before.argmax(-1) == best
    columns = (_by_text(column, texts) for column in (best, target, kl, same))
    values = []
    for text, argmax, likelihood, divergence, agrees in zip(texts, *columns, strict=True):
        values.append(Forced(argmax, likelihood if text.targets else (), divergence, agrees))
    return values


def _by_text(column: Tensor, texts: Sequence[Tokens]) -> list[tuple]:
    """Packed values as one tuple a text; empty tuples if there are none."""
    if not len(column):
        return [()] * len(texts)
    parts = column.split([len(text.scored) for text in texts])
    return [tuple(part.tolist()) for part in parts]


@torch.no_grad()
def next_tokens(
    base: BaseModel, prompt: str, *, k: int = 8, among: Sequence[str] = ()
) -> dict[str, float]:
    """The k most probable next tokens and those of `among`, with probability, best first.

    Of a sequence-to-sequence model the answer's first tokens, of a classifier the labels.
    The model is read as it is, with whatever edit is applied to it.
    """
    text, labels, tokenizer = base.tokenize(prompt), base.labels, base.tokenizer
    batch = collate([text], base.pad_id, base.device)
    p = wide(FrozenTrunk(base).suffix([text], batch))[0].softmax(-1)
    chosen = set(p.topk(min(k, len(p))).indices.tolist())
    for token in among:
        if labels:
            chosen.add(labels.id(token))
        else:
            chosen.add(tokenizer.encode(token, add_special_tokens=False)[0])
    ranked = sorted(chosen, key=lambda i: -float(p[i]))
    return {labels.names[i] if labels else str(tokenizer.decode([i])): float(p[i]) for i in ranked}
