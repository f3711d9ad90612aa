"""Greedy decoding of many prompts, each under its edit, where rows that have ended leave the batch.

Answers are short, but one of a large batch runs on: without this the whole batch would pay for it.
The rest goes on from the same key-value cache. A model whose code takes no positions, whose cache
cannot drop rows, or that is not causal, decodes with `generate`. Axes: b rows, t tokens.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import ModelError
from ..mend.updates import Updates, select, side_branches
from ..models.base import BaseModel
from ..models.families import CAUSAL
from ..models.tokens import Tokens

ROWS, CACHE_BYTES = 512, 1_500_000_000
WHOLE_ROWS = 64


def write(
    base: BaseModel,
    prompts: Sequence[Tokens],
    updates: Updates | None,
    edits: Sequence[int],
    *,
    max_new_tokens: int,
    endless: bool = False,
) -> list[list[int]]:
    """The new ids after each prompt, as `BaseModel.write` gives them; prompt r under `edits[r]`.

    `endless`: no row may end its text, each gets all its tokens. Raises ModelError for endless
    text from a model that decodes with `generate`.
    """
    per_token = _cache_bytes(base)
    if endless and not per_token:
        raise ModelError(f"{base.name} cannot write past its end of text; leave `fluency` out")
    longest = max((len(prompt.ids) for prompt in prompts), default=0) + max_new_tokens
    size = min(ROWS, CACHE_BYTES // (per_token * longest)) if per_token else WHOLE_ROWS
    # Prompts of like lengths need little padding.
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k].ids))
    out: list[list[int]] = [[] for _ in prompts]
    for at in range(0, len(order), max(1, size)):
        chosen = order[at : at + max(1, size)]
        rows = [prompts[k] for k in chosen]
        under = select(updates, [edits[k] for k in chosen]) if updates else {}
        if per_token:
            new = _write_causal(base, rows, under, max_new_tokens=max_new_tokens, endless=endless)
        else:
            with side_branches(base, under):
                new = base.write(rows, max_new_tokens=max_new_tokens, stop=True)
        for k, row in zip(chosen, new, strict=True):
            out[k] = row
    return out


@torch.no_grad()
def _write_causal(
    base: BaseModel,
    prompts: Sequence[Tokens],
    updates: Updates,
    *,
    max_new_tokens: int,
    endless: bool,
) -> list[list[int]]:
    """One batch. Ids in `ends` are left out of the text; endless text never chooses them."""
    ids, mask = base.left_pad([prompt.ids for prompt in prompts])
    base.check_lengths(mask, max_new_tokens)
    ends = base.end_ids()
    stops = frozenset() if endless else ends | base.stop_ids()
    written: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    positions, left = (mask.cumsum(1) - 1).clamp(min=0), max_new_tokens
    cache: Any = None
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(base) else {}
    while alive and left:
        over = [False] * len(alive)
        with side_branches(base, select(updates, alive)):
            # Dropping rows copies the cache, so it waits until a quarter of them are over.
            while left and 4 * sum(over) < len(over):
                # 1. One step of all rows.
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
                output = base.model(**inputs, past_key_values=cache, use_cache=True, **last_only)
                logits, cache, left = output.logits[:, -1:], output.past_key_values, left - 1
                # 2. The most probable token.
                if endless:
                    logits[..., sorted(ends)] = -torch.inf
                ids = logits.argmax(-1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                positions = positions[:, -1:] + 1
                # 3. Rows that are over wait.
                for k, token in enumerate(ids[:, 0].tolist()):
                    if not over[k]:
                        over[k] = token in stops
                        if token not in ends:
                            written[alive[k]].append(token)
        # 4. Rows that are over leave.
        going = [k for k, ended in enumerate(over) if not ended]
        alive = [alive[k] for k in going]
        if going and left:
            index = torch.tensor(going, device=ids.device)
            cache.batch_select_indices(index)
            ids, mask, positions = ids[index], mask[index], positions[index]
    return written


def _parameters(base: BaseModel) -> frozenset[str]:
    """What the model's forward takes."""
    return base.remembered(
        "takes", lambda: frozenset(inspect.signature(base.model.forward).parameters)
    )


def _cache_bytes(base: BaseModel) -> int:
    """Bytes of a token in the key-value cache; 0 if the model decodes with `generate`."""

    @torch.no_grad()
    def compute() -> int:
        if base.family != CAUSAL or not (
            {"position_ids", "past_key_values", "attention_mask"} <= _parameters(base)
        ):
            return 0
        ids: Int[Tensor, "b t"] = torch.tensor([[base.eos_id]], device=base.device)
        cache: Any = getattr(base.model(input_ids=ids, use_cache=True), "past_key_values", None)
        if not hasattr(cache, "batch_select_indices"):
            return 0
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    return base.remembered("cache_bytes", compute)
