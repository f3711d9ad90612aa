"""Whether an edit outlives what is done to a model later: rounding of its weights, fine-tuning.

Rounding: of W + ΔW and all linear layers but the output's, to the nearest of 2^bits − 1 symmetric
levels of each `GROUP` inputs. Fine-tuning: Adam on the edited weights, a window of text a step.
Axes: i layer input, o layer output.
"""

from copy import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..mend.edit import Edit
from ..mend.losses import edit_nll, wide
from ..mend.updates import LowRankUpdate, Updates, of_matrices, side_branches
from ..models.base import BaseModel
from ..models.tokens import collate
from ..models.trunk import FrozenTrunk
from .metrics import first_token, windows
from .prepare import EvaluationSet

BITS, GROUP = (8, 4), 32
STEPS, WINDOW, RATE = 100, 64, 2e-5  # Adam steps, tokens of one, learning rate
SURVIVAL = (
    f"survival: edits that hold, with weights rounded in groups of {GROUP}, or after {STEPS} Adam "
    f"steps at {RATE:g} on the edited weights, each on {WINDOW} tokens of the text"
)


def survival(on: EvaluationSet, update: Updates, i: int) -> dict[str, float]:
    """Whether the model still writes the new answer of example `i` under its edit, by score."""
    held = {}
    for bits in BITS:
        there = copy(on)
        there.base = rounded(on.base, update, bits=bits)
        held[f"survival.quantised_int{bits}"] = float(there.holds({}, [i])[0])
    assert on.text is not None
    tuned = fine_tuned(on.trunk, update, on.text.ids)
    return held | {"survival.finetuned": float(on.holds(tuned, [i])[0])}


def nearest(weight: Float[Tensor, "o i"], bits: int) -> Float[Tensor, "o i"]:
    """A weight rounded to `bits`; one whose inputs `GROUP` does not divide, by whole rows."""
    width = weight.shape[1]
    groups = weight.reshape(-1, width if width % GROUP else GROUP)
    step = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((groups / step.clamp(min=1e-30)).round() * step).reshape(weight.shape)


def rounded(base: BaseModel, update: Updates, *, bits: int) -> BaseModel:
    """A new model with one edit in its weights, rounded."""
    edited = Edit(base, update, ()).merged().base
    output = edited.model.get_output_embeddings()
    for module in edited.model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not output:
            weight = wide(module.weight)
            if isinstance(module, Conv1D):  # (i, o)
                weight = nearest(weight.T, bits).T.contiguous()
            else:
                weight = nearest(weight, bits)
            module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    return edited


def fine_tuned(trunk: FrozenTrunk, update: Updates, ids: list[int]) -> Updates:
    """One edit after fine-tuning the weights that it has changed on a text, in windows."""
    base = trunk.base
    texts = windows(ids, first_token(base), window=WINDOW)
    trunk.fill(texts)
    changes = {name: each.dense().requires_grad_() for name, each in update.items()}
    optimiser = torch.optim.Adam(changes.values(), lr=RATE)

    def as_updates() -> dict[str, LowRankUpdate]:
        return {name: of_matrices(change[None]) for name, change in changes.items()}

    for step in range(STEPS):
        some = [texts[step % len(texts)]]
        batch = collate(some, base.pad_id, base.device)
        with torch.enable_grad(), side_branches(base, as_updates()):
            loss = edit_nll(trunk.suffix(some, batch), batch.targets, batch.rows, 1).sum()
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        return as_updates()
