"""Many edits of one model: made at once, or one after another, each on the model as edited so far.

Edits that a model holds together are one low-rank update a site with b = 1, which serves any number
of texts. Its tokens add up: beyond twice the smaller width it is written as ΔW times a unit matrix,
so a thousand edits cost about as much to apply as the layer itself. Edits of a sequence are scored
in blocks: each text is read under what was there before the block and under the block's edits up to
its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ..hparams import MENDHyperParams
from ..mend.updates import LowRankUpdate, Updates, scaled, side_branches, side_by_side, summed
from ..models.base import BaseModel
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk


@runtime_checkable
class Editor(Protocol):
    """What makes edits: MEND, or a baseline with the same interface."""

    base: BaseModel
    name: str

    @property
    def hparams(self) -> MENDHyperParams:
        """How texts are made (`add_eos`, limits) and how strong edits are (`lr_scale`)."""

    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None, at_once: bool
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or all made at once."""


def in_sequence(editor: Editor) -> Editor:
    """The editor as it starts a sequence: one that remembers its edits gets an empty memory."""
    return editor.remembering() if hasattr(editor, "remembering") else editor


@dataclass(frozen=True)
class OnTop(LowRankUpdate):
    """ΔW of b edits, each on top of `below` (b = 1), which they share."""

    below: LowRankUpdate

    def branch(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """What both add to the layer's output."""
        return self.below.branch(x) + LowRankUpdate.branch(self, x)


def together(*updates: Updates) -> Updates:
    """The sum of all edits in all `updates` as one edit (b = 1)."""
    held = [update for update in updates if update]
    names = held[0] if held else ()
    return {name: _sum_of([update[name] for update in held]) for name in names}


def _sum_of(parts: Sequence[LowRankUpdate]) -> LowRankUpdate:
    whole = side_by_side([summed(part) for part in parts])
    d_in, d_out = whole.u.shape[2], whole.delta.shape[2]
    if whole.u.shape[1] <= 2 * min(d_in, d_out):
        return whole
    # Too many tokens: ΔW itself is smaller.
    change = whole.dense()[None]
    one = torch.eye(min(d_in, d_out), dtype=change.dtype, device=change.device)[None]
    if d_in <= d_out:
        return LowRankUpdate(one, change.mT, 1.0)
    return LowRankUpdate(change, one, 1.0)


def one_below_another(parts: Sequence[LowRankUpdate]) -> LowRankUpdate:
    """The edits of several updates of a site as one, in order: b adds up."""
    plain = [side_by_side([part]) for part in parts]  # coefficient 1
    longest = max(part.u.shape[1] for part in plain)
    u = [pad(part.u, (0, 0, 0, longest - part.u.shape[1])) for part in plain]
    delta = [pad(part.delta, (0, 0, 0, longest - part.delta.shape[1])) for part in plain]
    return LowRankUpdate(torch.cat(u), torch.cat(delta), 1.0)


def one_after_another(
    editor: Editor,
    texts: Sequence[Tokens],
    *,
    before: Updates,
    trunk: FrozenTrunk,
    strength: float,
) -> list[Updates]:
    """Updates of edits in sequence: each is made on the model as edited by all before it."""
    steps: list[Updates] = []
    for text in texts:
        with side_branches(editor.base, before), side_branches(editor.base, together(*steps)):
            made = editor.updates([text], trunk=trunk, at_once=True)
        steps.append(scaled(made, strength))
    return steps


def so_far(steps: Sequence[Updates], before: Updates) -> Updates:
    """For each step an edit that holds `before`, the steps up to it, and itself."""
    out: dict[str, LowRankUpdate] = {}
    order = torch.arange(len(steps))
    for name in steps[0]:
        whole = side_by_side([step[name] for step in steps])
        counts = torch.tensor([step[name].u.shape[1] for step in steps])
        step_of_token = order.repeat_interleave(counts)
        made = (step_of_token[None, :] <= order[:, None]).to(whole.delta)
        u, delta = whole.u.expand(len(steps), -1, -1), whole.delta * made[:, :, None]
        if name in before:
            out[name] = OnTop(u, delta, 1.0, before[name])
        else:
            out[name] = LowRankUpdate(u, delta, 1.0)
    return out
