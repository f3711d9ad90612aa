"""Editing for long: memory stays flat, and taking everything back leaves the model's bits. `make soak` does it all."""

import gc
import logging
import os
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from mendkit.editor import MENDEditor
from mendkit.mend import MEND
from mendkit.models import BaseModel, weights_sha256
from mendkit.runs import return_memory
from tests.claims import EXAMPLES, with_statistics
from tests.test_mend import hparams
from tests.tiny import tiny_gpt2, tiny_llama

logger = logging.getLogger(__name__)

CYCLES = int(os.environ.get("MENDKIT_CYCLES", "300"))
EDITS = int(os.environ.get("MENDKIT_EDITS", "60"))
BLOCK = 20
GROWTH = 4_000_000
"""Bytes that the process may grow by from a tenth of the way to its end: allocators round up, a leak goes on."""


def editor(base: BaseModel) -> MENDEditor:
    return MENDEditor(base, with_statistics(base, MEND(base.sites, hparams(edit_lr=1e-3))))


def living(base: BaseModel) -> tuple[int, int]:
    """How many tensors there are, and how many hooks on the model."""
    gc.collect()
    hooks = sum(len(module._forward_hooks) for module in base.model.modules())
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()), hooks


def soaked(base: BaseModel, times: int, act: Callable[[int], object]) -> None:
    """Act so often; from a tenth of the way on, tensors, hooks and resident memory must not grow."""
    early, start = max(times // 10, 1), time.perf_counter()
    for i in range(times):
        act(i)
        if i + 1 in (early, times):
            counts, resident = living(base), (return_memory(), psutil.Process().memory_info().rss)[1]
            if i + 1 == early:
                before = counts, resident
    took = time.perf_counter() - start
    growth = resident - before[1]
    logger.info("%d times in %.0f s: %s to %s, %+d bytes of %d", times, took, before[0], counts, growth, resident)
    assert counts == before[0]
    assert growth < GROWTH


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_applying_and_undoing_leaves_memory_flat_and_the_bits(build):
    base = build(layers=2)
    own = editor(base)
    edits, before = [own.edit(EXAMPLES[0]), own.edit(EXAMPLES[:3])], weights_sha256(base)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = base.model(ids).logits

    def cycle(i: int) -> None:
        edit = edits[i % 2]
        if i % 4 < 2:
            edit.apply().undo()
        else:
            with edit.scale(0.5).applied(), torch.no_grad():
                base.model(ids)

    soaked(base, CYCLES, cycle)
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, logits)
    assert weights_sha256(fresh(base)) == before


def fresh(base: BaseModel) -> BaseModel:
    """The same weights, with nothing remembered of their hash."""
    return BaseModel(base.model, base.tokenizer, name=base.name)


KINDS = {"sum": lambda own: own, "least squares": lambda own: own.by_least_squares(EXAMPLES)}


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_one_after_another_leave_memory_flat(kind):
    base = tiny_llama(layers=2)
    own, before = KINDS[kind](editor(base)), weights_sha256(base)

    def block(_: int) -> None:
        with own.session() as session:
            for k in range(BLOCK):
                session.edit(EXAMPLES[k % len(EXAMPLES)])
            session.undo()
            session.reapply()
            session.scale(3, 0.5)

    soaked(base, EDITS // BLOCK, block)
    assert weights_sha256(fresh(base)) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_session_that_is_undone_leaves_the_bits_and_nothing_else(kind):
    """Every edit is made on top of all earlier ones; the journal keeps each, and with it they are gone."""
    base = tiny_llama(layers=2).with_sites(["model.layers.1.mlp.down_proj.weight"])  # where each edit adds a branch
    own, before, ids = KINDS[kind](editor(base)), weights_sha256(base), torch.arange(12)[None]
    with torch.no_grad():
        logits = base.model(ids).logits
    own.session().edit(EXAMPLES[0]).undo()
    alive = living(base)
    session = own.session()
    for k in range(EDITS):
        session.edit(EXAMPLES[k % len(EXAMPLES)])
    assert len(session.active) == EDITS
    while session.active:
        session.undo()
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, logits)
    session.close()
    del session
    assert living(base) == alive and weights_sha256(fresh(base)) == before


def test_a_leak_of_one_list_an_edit_is_noticed():
    base = tiny_llama(layers=2)
    own, kept = editor(base), []
    with pytest.raises(AssertionError):
        soaked(base, 20, lambda i: kept.append([u.delta for u in own.edit(EXAMPLES[0]).updates.values()]))
    with pytest.raises(AssertionError):
        soaked(base, 20, lambda i: kept.append(torch.ones(100_000).tolist()))
