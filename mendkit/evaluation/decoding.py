"""Greedy decoding of many prompts, each under its own edit, where rows that have ended leave the batch.

Answers are short, but one of a large batch runs on; without it the batch would pay for all. The rest of the batch goes
on from the same key-value cache. A model whose code takes no positions, or whose cache cannot drop rows, decodes as
`generate_ids` does. Axes: b rows, t tokens.
"""

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import ModelError
from ..mend.updates import Updates, select, side_branches
from ..models.base import BaseModel

ROWS, CACHE_BYTES = 512, 1_500_000_000
WHOLE_ROWS = 64


def write(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    updates: Updates | None,
    edits: Sequence[int],
    /,
    *,
    max_new_tokens: int,
    stop: bool,
    endless: bool = False,
) -> list[list[int]]:
    """The new ids after each prompt (token ids), as `generate_ids` gives them; prompt r under edit `edits[r]`.

    `endless`: no row may end its text, each gets all its tokens. Fastest for prompts in the order of their lengths.
    Raises ModelError for endless text from a model that `generate_ids` has to decode.
    """
    out: list[list[int]] = []
    per_token = _cache_bytes(base)
    longest = max(map(len, prompts), default=0) + max_new_tokens
    size = max(1, min(ROWS, CACHE_BYTES // (per_token * longest))) if per_token else WHOLE_ROWS
    for at in range(0, len(prompts), size):
        ids, mask = base.left_pad(prompts[at : at + size])
        own = select(updates, edits[at : at + size]) if updates else {}
        if not per_token:
            if endless:
                raise ModelError(
                    f"{base.name} cannot write on past its end of text; leave `fluency` out"
                )
            with side_branches(base, own):
                out += base.generate_ids(ids, mask, max_new_tokens=max_new_tokens, stop=stop)
            continue
        base._check_lengths(mask, max_new_tokens)
        ends = base._end_ids()
        stops = frozenset() if endless else ends | base._stop_ids() if stop else ends
        out += _write(base, ids, mask, own, max_new_tokens, ends, stops)
    return out


@torch.no_grad()
def _write(
    base: BaseModel,
    ids: Int[Tensor, "b t"],
    mask: Int[Tensor, "b t"],
    updates: Updates,
    left: int,
    ends: frozenset[int],
    stops: frozenset[int],
) -> list[list[int]]:
    """`left` tokens for every row, or up to one of `stops`; those in `ends` are not part of what is written, and not
    chosen where they do not stop."""
    written: list[list[int]] = [[] for _ in ids]
    alive, positions, cache = list(range(len(ids))), (mask.cumsum(1) - 1).clamp(min=0), None
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in _takes(base) else {}
    while alive and left:
        over = [False] * len(alive)
        with side_branches(base, select(updates, alive)):
            while left and 4 * sum(over) < len(
                over
            ):  # dropping rows copies the cache: a quarter of them at a time
                output = base.model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                    **last_only,
                )  # fmt: skip
                logits, cache, left = output.logits[:, -1:], output.past_key_values, left - 1
                if not ends & stops:
                    logits[..., sorted(ends)] = -torch.inf
                ids = logits.argmax(-1)
                mask, positions = (
                    torch.cat([mask, mask.new_ones(len(mask), 1)], 1),
                    positions[:, -1:] + 1,
                )
                for k, token in enumerate(ids[:, 0].tolist()):
                    if not over[k]:
                        written[alive[k]] += [] if token in ends else [token]
                        over[k] = token in stops
        on = [k for k, ended in enumerate(over) if not ended]
        alive = [alive[k] for k in on]
        if on and left:
            index = torch.tensor(on, device=ids.device)
            cache.batch_select_indices(index)
            ids, mask, positions = ids[index], mask[index], positions[index]
    return written


def _takes(base: BaseModel) -> frozenset[str]:
    return base.remembered(
        "takes", lambda: frozenset(inspect.signature(base.model.forward).parameters)
    )


def _cache_bytes(base: BaseModel) -> int:
    """Bytes of a token in the key-value cache; 0 if the model takes no positions, or its cache cannot drop rows."""

    @torch.no_grad()
    def compute() -> int:
        if not {"position_ids", "past_key_values", "attention_mask"} <= _takes(base):
            return 0
        ids = torch.tensor([[base.eos_id]], device=base.device)
        cache = getattr(base.model(input_ids=ids, use_cache=True), "past_key_values", None)
        if not hasattr(cache, "batch_select_indices"):
            return 0
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    return base.remembered("cache_bytes", compute)
