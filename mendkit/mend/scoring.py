"""Teacher-forced values of texts under edits: what evaluation and validation are made of.

Every text belongs to an edit; a batch of independent edits is one suffix pass with one side branch per edit.
Axes: s scored positions (packed), v vocabulary (or a classifier's classes).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models.base import BaseModel
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from .losses import wide
from .updates import Updates, select, side_branches

POSITIONS_PER_PASS = 1024


@dataclass(frozen=True)
class Forced:
    """One text read under an edit, its given tokens as prefix. Tuples run over the text's scored positions."""

    argmax: tuple[int, ...]
    logp: tuple[float, ...]  # log P(target), nats; empty if the text has no answer
    kl: tuple[float, ...]  # KL(before ‖ after), nats; empty unless asked for
    same: tuple[bool, ...]  # argmax as before the edit; empty unless asked for


@torch.no_grad()
def forced(
    trunk: FrozenTrunk,
    texts: Sequence[Sequence[Tokens]],
    updates: Updates | None,
    /,
    *,
    compare: bool = False,
) -> list[list[Forced]]:
    """Read `texts[e]` under edit e (under none if `updates` is None). `compare` adds KL and argmax agreement."""
    out: list[list[Forced]] = []
    size = max(1, max(sum(len(t.scored) for t in own) for own in texts))
    step = max(1, POSITIONS_PER_PASS // size)
    for at in range(0, len(texts), step):
        own = texts[at : at + step]
        k = max(len(t) for t in own)
        filler = next(
            (text for t in own for text in t), None
        )  # every edit needs the same number of rows
        rows = [text for t in own for text in [*t, *[filler] * (k - len(t))]]
        here = updates and select(updates, range(at, at + len(own)))
        values = iter(_read(trunk, rows, here, compare) if rows else ())
        for t in own:
            out.append([next(values) for _ in range(k)][: len(t)])
    return out


@torch.no_grad()
def next_tokens(
    base: BaseModel, prompt: str, /, *, k: int = 8, among: Sequence[str] = ()
) -> dict[str, float]:
    """The k most probable next tokens after a prompt and those of `among`, as text with probability, best first.

    Of a sequence-to-sequence model the answer's first tokens, of a classifier the labels. The model is read as it is:
    with whatever edit is applied to it.
    """
    text = base.tokenize(prompt)
    p = wide(FrozenTrunk(base).suffix([text], collate([text], base.pad_id, base.device)))[
        0
    ].softmax(-1)
    labels = base.labels
    wanted = {
        labels.id(t) if labels else base.tokenizer.encode(t, add_special_tokens=False)[0]
        for t in among
    }
    chosen = sorted({*p.topk(min(k, len(p))).indices.tolist(), *wanted}, key=lambda i: -float(p[i]))
    return {labels.names[i] if labels else base.tokenizer.decode([i]): float(p[i]) for i in chosen}


def _read(
    trunk: FrozenTrunk, rows: Sequence[Tokens], updates: Updates | None, compare: bool
) -> list[Forced]:
    batch = collate(rows, trunk.base.pad_id, trunk.base.device)
    with side_branches(trunk.base, updates or {}):
        logits = wide(trunk.suffix(rows, batch))
    logp = logits.log_softmax(-1)
    best = logits.argmax(-1)
    target = logp.gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]
    kl = same = torch.empty(0)
    if compare:
        before = wide(trunk.before(rows, batch))
        reference = before.log_softmax(-1)
        kl = (reference.exp() * (reference - logp)).sum(-1).clamp(min=0)
        same = before.argmax(-1) == best
    counts = [len(text.scored) for text in rows]

    def by_row(values: torch.Tensor) -> list[tuple]:
        return (
            [tuple(v.tolist()) for v in values.split(counts)] if len(values) else [()] * len(rows)
        )

    columns = zip(rows, by_row(best), by_row(target), by_row(kl), by_row(same), strict=True)
    return [Forced(b, p if text.targets else (), d, q) for text, b, p, d, q in columns]
