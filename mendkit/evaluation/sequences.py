"""Many edits of one model, never reset: made one after another, or a group at a time.

Axes: b edits, t tokens of an edit, i layer input, o layer output.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ..hparams import MENDHyperParams
from ..mend.least_squares import Memory
from ..mend.updates import (
    LowRankUpdate,
    Updates,
    scaled,
    side_branches,
    side_by_side,
)
from ..models.base import BaseModel
from ..models.tokens import Tokens
from ..models.trunk import FrozenTrunk
from ..runs import atomically

SAVE_SECONDS = 60.0  # between two states of a sequence that are written to a file
STATE = ("total", "done", "seconds")


@runtime_checkable
class Editor(Protocol):
    """What makes edits: MEND, or a baseline. `hparams` says how texts are made."""

    base: BaseModel
    name: str

    @property
    def hparams(self) -> MENDHyperParams: ...

    def updates(
        self, texts: Sequence[Tokens], *, trunk: FrozenTrunk | None, at_once: bool
    ) -> Updates:
        """Updates of edits, one per text: independent ones, or all made at once."""


def in_sequence(editor: Editor) -> Editor:
    """The editor as it starts a sequence: one that remembers its edits gets an empty memory."""
    return editor.remembering() if hasattr(editor, "remembering") else editor


def one_after_another(
    editor: Editor, texts: Sequence[Tokens], *, trunk: FrozenTrunk, strength: float = 1.0
) -> list[Updates]:
    """Updates of edits in sequence: each is made on the model as edited by all before it."""
    steps: list[Updates] = []
    for text in texts:
        with side_branches(editor.base, together(*steps)):
            made = editor.updates([text], trunk=trunk, at_once=True)
        steps.append(scaled(made, strength))
    return steps


def so_far(steps: Sequence[Updates]) -> Updates:
    """For each step an edit that holds it and all steps before it."""
    out, order = {}, torch.arange(len(steps))
    for name in steps[0]:
        whole = side_by_side([step[name] for step in steps])
        counts = torch.tensor([step[name].u.shape[1] for step in steps])
        step_of_token = order.repeat_interleave(counts)
        made = (step_of_token[None, :] <= order[:, None]).to(whole.delta)
        u = whole.u.expand(len(steps), -1, -1)
        out[name] = LowRankUpdate(u, whole.delta * made[:, :, None], 1.0)
    return out


def together(*updates: Updates) -> Updates:
    """The sum of all edits in all `updates` as one edit (b = 1), which serves any texts.

    A site's tokens add up. Beyond twice its smaller width its update is written as ΔW times a
    unit matrix, so that a thousand edits cost about as much as the layer itself.
    """
    out: Updates = {}
    held = [update for update in updates if update]
    for name in held[0] if held else ():
        out[name] = whole = side_by_side([update[name].merged() for update in held])
        width = min(whole.u.shape[2], whole.delta.shape[2])
        if whole.u.shape[1] > 2 * width:
            change = whole.dense()[None]
            one = torch.eye(width, dtype=change.dtype, device=change.device)[None]
            pair = (one, change.mT) if whole.u.shape[2] == width else (change, one)
            out[name] = LowRankUpdate(*pair, 1.0)
    return out


@dataclass
class Growing:
    """A model that holds more and more edits: the sum of the first `done`, `k` made at once.

    With a `path` its state is kept there, what the editor remembers too, and it goes on from it.
    """

    editor: Any
    texts: Sequence[Tokens]
    trunk: FrozenTrunk
    k: int = 1
    strength: float = 1.0
    path: Path | None = None
    total: Updates = field(default_factory=dict)
    done: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.editor = in_sequence(self.editor)
        if self.path is None or not self.path.exists():
            return
        with torch.serialization.safe_globals([LowRankUpdate, Memory, Tokens]):
            state = torch.load(self.path, self.editor.base.device, weights_only=True)
        self.total, self.done, self.seconds = (state[name] for name in STATE)
        if state["memory"] is not None:
            self.editor.memory = state["memory"]
        if state["mend"] is not None:
            self.editor.mend.load_state_dict(state["mend"])

    def go_on(self, count: int) -> None:
        """Make edits until there are `count`, each group on the model as edited by all before."""
        saved = time.perf_counter()
        while self.done < count:
            start = time.perf_counter()
            texts = self.texts[self.done : min(self.done + self.k, count)]
            with side_branches(self.editor.base, self.total):
                made = self.editor.updates(texts, trunk=self.trunk, at_once=True)
            self.total = together(self.total, scaled(made, self.strength))
            self.done += len(texts)
            self.seconds += time.perf_counter() - start
            if self.done == count or time.perf_counter() - saved > SAVE_SECONDS:
                self._save()
                saved = time.perf_counter()

    def _save(self) -> None:
        if self.path is None:
            return
        state = {name: getattr(self, name) for name in STATE}
        state["memory"] = getattr(self.editor, "memory", None)
        gathers = getattr(self.editor, "gather", ())  # the statistics run on
        state["mend"] = self.editor.mend.state_dict() if gathers else None
        atomically(self.path, partial(torch.save, state))
