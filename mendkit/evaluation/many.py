"""Many edits of one model: made at once, or one after another, each on the model as edited so far.

Edits that a model holds together are one low-rank update per site with b = 1, which serves any number of texts. Its
tokens add up, so that beyond twice the smaller width it is written as ΔW times a unit matrix: a thousand edits cost
about as much to apply as the layer itself. Edits of a sequence are scored in blocks: each text is read under what was
there before the block and under the block's own edits up to its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ..hparams import MENDHyperParams
from ..mend.updates import LowRankUpdate, Updates, side_branches, side_by_side, summed
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
        self, texts: Sequence[Tokens], /, *, trunk: FrozenTrunk | None, at_once: bool
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or all made at once."""


def in_sequence(editor: Editor, /) -> Editor:
    """The editor as it starts a sequence: one that keeps what it edits is given an empty memory."""
    return editor.remembering() if isinstance(editor, _Remembers) else editor


def most_together(editor: Editor, most: int, /) -> int:
    """How many independent edits to ask an editor for at once: `most`, or fewer if its own are large."""
    return min(most, getattr(editor, "most_together", most))


@runtime_checkable
class _Remembers(Protocol):
    def remembering(self) -> Editor: ...


@dataclass(frozen=True)
class OnTop(LowRankUpdate):
    """ΔW of b edits, each on top of `below` (b = 1), which they share."""

    below: LowRankUpdate

    def branch(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """What both add to the layer's output."""
        return self.below.branch(x) + LowRankUpdate.branch(self, x)


def together(*updates: Updates) -> Updates:
    """The sum of all edits in all `updates` as one edit (b = 1), in place of which nothing grows beyond bounds."""
    names = updates[0] if updates else ()
    return {name: _compact([u[name] for u in updates]) for name in names}


def apart(several: Sequence[Updates], /, *, texts: int) -> Updates:
    """Each of `several` (b = 1) for so many edits' texts: b = len(several) · texts, none under another's update."""
    out = {name: one_below_another([updates[name] for updates in several]) for name in several[0]}
    return {
        name: replace(
            u, u=u.u.repeat_interleave(texts, 0), delta=u.delta.repeat_interleave(texts, 0)
        )
        for name, u in out.items()
    }


def one_below_another(parts: Sequence[LowRankUpdate], /) -> LowRankUpdate:
    """The edits of several updates of a site as one, in order: b adds up."""
    own = [side_by_side([part]) for part in parts]  # coefficient 1
    longest = max(part.u.shape[1] for part in own)
    u, delta = (
        torch.cat([pad(x, (0, 0, 0, longest - x.shape[1])) for x in some])
        for some in ([part.u for part in own], [part.delta for part in own])
    )
    return LowRankUpdate(u, delta, 1.0)


def _compact(parts: Sequence[LowRankUpdate]) -> LowRankUpdate:
    whole = side_by_side([summed(part) for part in parts])
    i, o = whole.u.shape[2], whole.delta.shape[2]
    if whole.u.shape[1] <= 2 * min(i, o):
        return whole
    change, one = (
        whole.dense()[None],
        torch.eye(min(i, o), dtype=whole.u.dtype, device=whole.u.device)[None],
    )
    return LowRankUpdate(one, change.mT, 1.0) if i <= o else LowRankUpdate(change, one, 1.0)


def one_after_another(
    editor: Editor,
    texts: Sequence[Tokens],
    /,
    *,
    before: Updates,
    trunk: FrozenTrunk,
    strength: float,
) -> list[Updates]:
    """Updates of edits in sequence: each from gradients of the model as edited by `before` and by the earlier ones."""
    steps: list[Updates] = []
    for text in texts:
        with side_branches(editor.base, before), side_branches(editor.base, together(*steps)):
            made = editor.updates([text], trunk=trunk, at_once=True)
        steps.append({name: update.scaled(strength) for name, update in made.items()})
    return steps


def so_far(steps: Sequence[Updates], before: Updates) -> Updates:
    """For each step an edit that holds `before`, the steps up to it, and itself."""
    out: dict[str, LowRankUpdate] = {}
    for name in steps[0]:
        counts = torch.tensor([step[name].u.shape[1] for step in steps])
        whole = side_by_side([step[name] for step in steps])
        made = torch.arange(len(steps)).repeat_interleave(counts)  # the step of each token
        there = made[None, :] <= torch.arange(len(steps))[:, None]
        u, delta = (
            whole.u.expand(len(steps), -1, -1),
            whole.delta * there[:, :, None].to(whole.delta),
        )
        below = before.get(name)
        out[name] = (
            OnTop(u, delta, 1.0, below) if below is not None else LowRankUpdate(u, delta, 1.0)
        )
    return out
