"""The training loss of a batch of edits (MEND, equations 4 and 5, the locality term split in two)

    c_edit · NLL(edit) + c_para · NLL(paraphrases) + c_neigh · KL(neighbours) + c_loc · KL(unrelated)

and c_margin · shortfall(rivals): what a neighbour's own answer lacks of being `margin` nats a token
more likely than the edit's. Each term is a mean over the batch's texts.
"""

import torch
from torch import Tensor

from ..hparams import MENDHyperParams
from ..models.tokens import collate
from ..models.trunk import FrozenTrunk
from .batches import RIVALS, role_weights
from .factors import Factors
from .hypernetwork import MEND
from .least_squares import Memory
from .losses import edit_nll, locality_kl, margin_shortfall
from .sampler import Rows
from .updates import Updates, side_branches

MEASURES = {"edit": "nll", "paraphrases": "nll", "neighbours": "kl", "unrelated": "kl"}

IGNORED = -100
"""A target that cross entropy leaves out, at less cost than choosing rows of logits."""


def batch_losses(
    trunk: FrozenTrunk,
    mend: MEND,
    factors: Factors,
    rows: Rows,
    *,
    at_once: int = 1,
    before: Updates | None = None,
    memory: Memory | None = None,
) -> dict[str, Tensor]:
    """The mean loss of each role, each text read under its own edit's update.

    The edits are independent, or `at_once` in a row are made as one. They come on top of the edits
    `before`, which `memory` holds (least squares).
    """
    texts = [text for drawn in rows for _, text in drawn]
    places: dict[str, list[int]] = {}
    for place, role in enumerate(role for drawn in rows for role, _ in drawn):
        places.setdefault(role, []).append(place)
    rivals, pad_id = places.get(RIVALS, []), trunk.base.pad_id

    # 1. The hypernetwork turns the factors into updates.
    if before and memory is not None:
        memory.held = {name: update.dense() for name, update in before.items()}
    updates = mend(factors, len(rows), at_once=at_once, memory=memory)

    # 2. One suffix pass reads every text with its edit's update as a side branch.
    batch = collate(texts, pad_id, trunk.base.device)
    with side_branches(trunk.base, before or {}), side_branches(trunk.base, updates):
        logits = trunk.suffix(texts, batch)

    # 3. NLL of the answers to give, of rivals, and of the neighbours right before these.
    keep = torch.zeros(len(texts), dtype=torch.bool, device=logits.device)
    keep[places.get("neighbours", []) + places.get("unrelated", [])] = True
    silent = keep.clone()
    silent[[place - 1 for place in rivals]] = False
    targets = batch.targets.masked_fill(silent[batch.rows], IGNORED)
    values = {"nll": edit_nll(logits, targets, batch.rows, len(texts))}

    # 4. KL from the unedited model at the texts to preserve.
    kept = [text for text, is_kept in zip(texts, keep.tolist(), strict=True) if is_kept]
    if kept:
        unedited = trunk.before(kept, collate(kept, pad_id, trunk.base.device))
        at = keep[batch.rows]
        values["kl"] = locality_kl(unedited, logits[at], batch.rows[at], len(texts))

    losses = {}
    for role, name in MEASURES.items():
        if role in places:
            losses[role] = values[name][places[role]].mean()
    if rivals:
        beside = values["nll"][[place - 1 for place in rivals]]
        shortfall = margin_shortfall(beside, values["nll"][rivals], margin=mend.hparams.margin)
        losses[RIVALS] = shortfall.mean()
    return losses


def total_loss(losses: dict[str, Tensor], h: MENDHyperParams) -> Tensor:
    """The weighted sum of the role losses."""
    weights = role_weights(h)
    return sum((weights[role] * loss for role, loss in losses.items()), torch.zeros(()))
