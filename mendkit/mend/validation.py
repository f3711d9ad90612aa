"""Teacher forcing: texts read under edits with their answers given, to validate and to evaluate.

Every text belongs to an edit. A batch of edits is one suffix pass with one side branch an edit.
`validate` decides which archive is kept.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from statistics import fmean

import torch

from ..data.examples import EditExample, headline_mean
from ..errors import HyperParamError
from ..hparams import MENDHyperParams
from ..models.base import BaseModel
from ..models.tokens import Tokens, collate
from ..models.trunk import FrozenTrunk
from .batches import RIVALS, ExampleTexts, all_texts, prepare_texts, role_weights
from .editor import MENDEditor
from .factors import edit_factors
from .hypernetwork import MEND
from .losses import margin_shortfall, wide
from .updates import Updates, at_some_sites, scaled, select, side_branches, unedited

POSITIONS_PER_PASS = 1024

# The name of each role's share.
SHARE_NAMES = {
    "edit": "edit_success",
    "paraphrases": "paraphrase",
    "neighbours": "neighbourhood",
    "unrelated": "locality",
    RIVALS: "ns",
    "consequences": "consequence",
    "negations": "negation",
}

# ---------------------------------------- reading


@dataclass(frozen=True)
class Forced:
    """One text read under an edit. Tuples run over the text's scored positions."""

    argmax: tuple[int, ...]
    logp: tuple[float, ...]  # log P(target), nats; empty if the text has no answer
    kl: tuple[float, ...] = ()  # KL(before ‖ after), nats; empty unless asked for
    same: tuple[bool, ...] = ()  # argmax as before the edit; empty unless asked for


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
    found: list[list[Forced]] = []
    most_positions = max(sum(len(text.scored) for text in each) for each in texts)
    step = max(1, POSITIONS_PER_PASS // max(1, most_positions))
    for at in range(0, len(texts), step):
        edits = texts[at : at + step]
        chosen = select(updates or {}, range(at, at + len(edits)))
        read = iter(_read(trunk, edits, chosen, compare) if any(edits) else [])
        found += [[*islice(read, len(each))] for each in edits]
    return found


def _read(
    trunk: FrozenTrunk, edits: Sequence[Sequence[Tokens]], updates: Updates, compare: bool
) -> list[Forced]:
    texts = [*chain.from_iterable(edits)]
    batch = collate(texts, trunk.base.pad_id, trunk.base.device)
    with side_branches(trunk.base, updates):
        logits = wide(trunk.suffix_of(edits))
    logp, argmax = logits.log_softmax(-1), logits.argmax(-1)
    columns = [argmax, logp.gather(1, batch.targets.clamp(min=0)[:, None])[:, 0]]
    if compare:
        with unedited(trunk.base):
            before = wide(trunk.before(texts, batch))
        reference = before.log_softmax(-1)
        columns.append((reference.exp() * (reference - logp)).sum(-1).clamp(min=0))
        columns.append(before.argmax(-1) == argmax)
    lengths = [len(text.scored) for text in texts]
    found = []
    for text, *parts in zip(texts, *(column.split(lengths) for column in columns), strict=True):
        guess, likelihood, *compared = (tuple(part.tolist()) for part in parts)
        found.append(Forced(guess, likelihood if text.targets else (), *compared))
    return found


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
            chosen.add(base.encode(token)[0])
    ranked = sorted(chosen, key=lambda i: -float(p[i]))
    return {labels.names[i] if labels else str(tokenizer.decode([i])): float(p[i]) for i in ranked}


# ---------------------------------------- validation


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

    `edit_success`, `paraphrase`, `consequence`: all target tokens right, the end of the answer
    included. `neighbourhood`, `locality`: share of answer positions whose argmax is as before.
    `ns`: neighbours whose own answer is more likely than the new one. `negation`: negated forms
    after which not all of the new answer is written. `score`: the harmonic mean of those there are.
    """
    return _read_edits(trunk, _make_edits(trunk, mend, examples, h, at_once), h, strength)


def _make_edits(
    trunk: FrozenTrunk,
    mend: MEND,
    examples: Sequence[ExampleTexts],
    h: MENDHyperParams,
    at_once: int,
) -> Iterator[tuple[Sequence[ExampleTexts], Updates]]:
    size = h.val_batch_size if at_once == 1 else at_once
    for at in range(0, len(examples), size):
        group = examples[at : at + size]
        edits = [texts.inner for texts in group]
        factors = edit_factors(trunk, h, edits)
        updates = mend(factors, len(group), at_once=min(at_once, len(group)))
        yield group, at_some_sites(updates, edits, h)


def _read_edits(
    trunk: FrozenTrunk,
    edits: Iterable[tuple[Sequence[ExampleTexts], Updates]],
    h: MENDHyperParams,
    strength: float,
) -> dict[str, float]:
    shares: dict[str, list[float]] = {role: [] for role in SHARE_NAMES}
    losses: dict[str, list[float]] = {role: [] for role in SHARE_NAMES}
    for group, updates in edits:
        for role, share, loss in _read_group(trunk, group, scaled(updates, strength), h.margin):
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


def _forced(
    trunk: FrozenTrunk,
    drawn: Sequence[Sequence[tuple[str, Tokens]]],
    updates: Updates,
    *,
    compare: bool = False,
) -> Iterator[tuple[str, Tokens, Forced]]:
    """`forced` of texts with their roles."""
    texts = [[text for _, text in each] for each in drawn]
    found = forced(trunk, texts, updates, compare=compare)
    for (role, text), read in zip(chain(*drawn), chain(*found), strict=True):
        yield role, text, read


def _read_group(
    trunk: FrozenTrunk, group: Sequence[ExampleTexts], updates: Updates, margin: float
) -> Iterator[tuple[str, float, float]]:
    """Role, share and loss of every text of some edits, read under its edit's update."""
    # 1. What is to change: is every target token the most likely one?
    to_change = [texts.of("edit", "paraphrases", "consequences") for texts in group]
    for role, text, read in _forced(trunk, to_change, updates):
        yield role, float(read.argmax == text.targets), -fmean(read.logp)
    # 2. What is to stay: is the most likely token the one from before? After a negated form it need
    #    not be, if the new answer is not written.
    to_keep = [texts.of("neighbours", "unrelated", "negations") for texts in group]
    for role, text, read in _forced(trunk, to_keep, updates, compare=True):
        share = fmean(read.same)
        if role == "negations":
            share = float(read.argmax != text.targets)
        yield role, share, fmean(read.kl)
    # 3. With `cmargin`: is a neighbour's answer more likely than the edit's?
    pairs = [[*chain.from_iterable(texts.rivals.items())] for texts in group]
    for values in forced(trunk, pairs, updates):
        nll = torch.tensor([-fmean(value.logp) for value in values])
        right, rival = nll[::2], nll[1::2]
        shortfall = margin_shortfall(right, rival, margin=margin)
        for share, loss in zip((right < rival).tolist(), shortfall.tolist(), strict=True):
            yield RIVALS, float(share), loss


@torch.no_grad()
def strength_curve(
    editor: MENDEditor,
    examples: Sequence[EditExample],
    *,
    strengths: Sequence[float],
    trunk: FrozenTrunk | None = None,
) -> list[dict[str, float]]:
    """`validate` at several strengths of the same edits (1: as trained); one row per strength."""
    mend, h = editor.mend, editor.mend.hparams
    prepared, trunk = prepare_texts(editor.base, h, examples), trunk or FrozenTrunk(editor.base)
    trunk.fill(all_texts(prepared))
    edits = list(_make_edits(trunk, mend, prepared, h, at_once=1))
    return [{"strength": s, **_read_edits(trunk, edits, h, s)} for s in strengths]


# Training edits on which `edit_lr: auto` is measured.
AUTO_EDITS = 40
# α = 2^(power / 2) for powers within these, from 6e-8 to a million.
LEAST_POWER, MOST_POWER = -48, 40


@torch.no_grad()
def best_edit_lr(
    trunk: FrozenTrunk,
    untrained: MEND,
    examples: Sequence[ExampleTexts],
    h: MENDHyperParams,
    *,
    at_once: int = 1,
) -> float:
    """The step size at which an untrained hypernetwork, whose α is 1, has the least loss.

    It is that of the first `AUTO_EDITS`, with one text of each role. Raises HyperParamError if no
    step lowers the loss.
    """
    some = [texts.first(1) for texts in examples[:AUTO_EDITS]]
    trunk.fill(all_texts(some))
    edits = list(_make_edits(trunk, untrained, some, h, at_once))
    losses: dict[int, float] = {}

    def loss_at(power: int) -> float:
        if power not in losses:
            loss = _read_edits(trunk, edits, h, 2 ** (power / 2))["loss"]
            losses[power] = loss if math.isfinite(loss) else math.inf
        return losses[power]

    # 1. By factors of 16, until a step is clearly worse than the best.
    best = LEAST_POWER
    for power in range(LEAST_POWER, MOST_POWER, 8):
        if loss_at(power) > 1.05 * losses[best]:
            break
        best = min(best, power, key=loss_at)
    # 2. By factors of 4, 2 and √2, on both sides of the best.
    for step in (4, 2, 1):
        best = min(best, best - step, best + step, key=loss_at)
    if not losses[LEAST_POWER] - losses[best] > 1e-4:  # nats; the least step changes nothing
        raise HyperParamError(
            "edit_lr: auto found no step that lowers the loss of untrained edits; give a number"
        )
    return 2 ** (best / 2)
