"""Editing for long: memory stays flat, and undoing leaves the model's bits; see `make soak`."""

import gc
import logging
import os
import sys
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from mendkit.mend.editor import MENDEditor
from mendkit.mend.hypernetwork import MEND
from mendkit.models.base import BaseModel
from mendkit.models.fingerprint import weights_sha256
from mendkit.runs import return_memory
from tests.oracles.claims import EXAMPLES, hparams, with_statistics
from tests.oracles.tiny import tiny_gpt2, tiny_llama

logger = logging.getLogger(__name__)

CYCLES = int(os.environ.get("MENDKIT_CYCLES", "300"))
EDITS = int(os.environ.get("MENDKIT_EDITS", "60"))
BLOCK = 20
BLOCKS, BYTES = 1000, 16_000_000
"""How much memory may grow after the first tenth: caches fill, a leak goes on."""


def editor(base: BaseModel) -> MENDEditor:
    return MENDEditor(base, with_statistics(base, MEND(base.sites, hparams(edit_lr=1e-3))))


def living(base: BaseModel) -> tuple[int, int]:
    """How many tensors there are, and how many hooks on the model."""
    gc.collect()
    hooks = sum(len(module._forward_hooks) for module in base.model.modules())
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()), hooks


def memory() -> tuple[int, int]:
    """Blocks that Python has allocated, and bytes of the process."""
    return_memory()
    return sys.getallocatedblocks(), psutil.Process().memory_info().rss


def soaked(base: BaseModel, times: int, act: Callable[[int], object]) -> None:
    """Act so often; after a tenth of it, tensors and hooks stay as many, and memory flat."""
    early, start = max(times // 10, 1), time.perf_counter()
    for i in range(early):
        act(i)
    before = living(base), memory()
    for i in range(early, times):
        act(i)
    after = living(base), memory()
    blocks, size = (b - a for a, b in zip(before[1], after[1], strict=True))
    took = time.perf_counter() - start
    logger.info(
        "%d times in %.0f s: %s, then %s; %+d blocks, %+d bytes", times, took, *before, blocks, size
    )
    assert after[0] == before[0]
    assert blocks < BLOCKS and size < BYTES


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_applying_and_undoing_leaves_memory_flat_and_the_bits(build):
    base = build(layers=2)
    mender = editor(base)
    edits, before = [mender.edit(EXAMPLES[0]), mender.edit(EXAMPLES[:3])], weights_sha256(base)
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


KINDS = {"sum": lambda made: made, "least squares": lambda made: made.by_least_squares(EXAMPLES)}


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_one_after_another_leave_memory_flat(kind):
    base = tiny_llama(layers=2)
    mender, before = KINDS[kind](editor(base)), weights_sha256(base)

    def block(_: int) -> None:
        with mender.session() as session:
            for k in range(BLOCK):
                session.edit(EXAMPLES[k % len(EXAMPLES)])
            session.undo()
            session.reapply()
            session.scale(3, 0.5)

    soaked(base, EDITS // BLOCK, block)
    assert weights_sha256(fresh(base)) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_session_that_is_undone_leaves_the_bits_and_nothing_else(kind):
    """Every edit is made on top of all earlier ones; the journal keeps each."""
    # Each edit adds a branch at this site.
    base = tiny_llama(layers=2).with_sites(["model.layers.1.mlp.down_proj.weight"])
    mender, before, ids = KINDS[kind](editor(base)), weights_sha256(base), torch.arange(12)[None]
    with torch.no_grad():
        logits = base.model(ids).logits
    mender.session().edit(EXAMPLES[0]).undo()
    alive = living(base)
    session = mender.session()
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
    mender, kept = editor(base), []
    with pytest.raises(AssertionError):
        soaked(base, 20, lambda i: kept.append(list(mender.edit(EXAMPLES[0]).updates.values())))
    for leak in (lambda i: list(map(float, range(100))), lambda i: b"x" * 1_000_000):
        with pytest.raises(AssertionError):
            soaked(base, 20, lambda i, leak=leak: kept.append(leak(i)))
