"""Side branches against dense weight changes; undo against the bits (CORRECTNESS rows 10, 16)."""

import pytest
import torch

from mendkit.edit import side_branches
from mendkit.editor import MENDEditor
from mendkit.errors import ArchiveError, MendkitError
from mendkit.mend import MEND
from tests.claims import EXAMPLES, scrambled, with_statistics
from tests.test_mend import hparams

PROMPT = "The capital of France is"


def editor_for(base, **changes) -> MENDEditor:
    h = hparams(edit_lr=1e-3, **changes)
    mend = MEND(base.sites, h)
    if base.dtype == torch.float64:
        mend = mend.double()
    return MENDEditor(base, scrambled(with_statistics(base, mend)))


def logits(base, prompt=PROMPT):
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        return base.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_a_side_branch_is_the_dense_weight_change(family, request):
    base = request.getfixturevalue(family)
    edit = editor_for(base).edit(list(EXAMPLES[:2]))
    with edit.applied():
        branch = logits(base)
    weights = {site.name: base.site_module(site).weight for site in base.sites}
    kept = {name: weight.clone() for name, weight in weights.items()}
    for name, change in edit.dense().items():
        weights[name].add_(change)
    dense = logits(base)
    for name, weight in kept.items():
        weights[name].copy_(weight)
    torch.testing.assert_close(branch, dense, rtol=1e-9, atol=1e-11)
    assert float((branch - logits(base)).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_undo_restores_the_bits(family, request):
    base = request.getfixturevalue(family)
    weights = {name: p.clone() for name, p in base.model.named_parameters()}
    before = logits(base)
    edit = editor_for(base).edit(EXAMPLES[0])
    for _ in range(50):
        with edit.applied():
            assert not torch.equal(logits(base), before)
    edit.apply()
    edit.undo()
    with pytest.raises(ZeroDivisionError), edit.applied():
        raise ZeroDivisionError
    assert torch.equal(logits(base), before)
    assert all(torch.equal(p, weights[name]) for name, p in base.model.named_parameters())
    assert not any(m._forward_hooks for m in base.model.modules())


def test_strength_scales_the_weight_change(llama):
    edit = editor_for(llama).edit(EXAMPLES[0])
    for factor in (0.0, 0.5, 2.0):
        scaled = edit.scale(factor)
        for name, change in edit.dense().items():
            torch.testing.assert_close(scaled.dense()[name], factor * change)
    with edit.scale(0.0).applied():
        changed = logits(llama)
    torch.testing.assert_close(changed, logits(llama))


def test_several_examples_add_up(llama):
    editor = editor_for(llama)
    both = editor.edit(list(EXAMPLES[:2])).dense()
    each = [editor.edit(example).dense() for example in EXAMPLES[:2]]
    for name, change in both.items():
        torch.testing.assert_close(change, each[0][name] + each[1][name], rtol=1e-4, atol=1e-7)


def test_rows_of_a_batch_are_each_under_their_own_edit(llama):
    editor = editor_for(llama)
    updates = editor.updates([editor.tokens(e) for e in EXAMPLES[:3]])
    ids = torch.tensor([llama.tokenizer(PROMPT)["input_ids"]] * 6)
    with torch.no_grad(), side_branches(llama, updates):
        batch = llama.model(input_ids=ids, use_cache=False).logits
    for i, example in enumerate(EXAMPLES[:3]):
        with editor.edit(example).applied():
            alone = logits(llama)[0]
        for row in (2 * i, 2 * i + 1):
            torch.testing.assert_close(batch[row], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(MendkitError, match="rows"), side_branches(llama, updates):
        llama.model(input_ids=ids[:4])


def test_session_edits_the_edited_model_and_undoes_in_order(llama):
    before = logits(llama)
    with editor_for(llama).session() as session:
        session.edit(EXAMPLES[0])
        once = logits(llama)
        second = session.edit(EXAMPLES[1])
        fresh = editor_for(llama).edit(EXAMPLES[1])  # computed while both are applied
        name = llama.sites[0].name
        assert not torch.allclose(second.dense()[name], fresh.dense()[name])
        session.scale(0, 0.5)
        session.scale(0, 2.0)
        session.undo()
        torch.testing.assert_close(logits(llama), once)
        with pytest.raises(MendkitError, match="no edit 3"):
            session.scale(3, 1.0)
    assert torch.equal(logits(llama), before)
    with pytest.raises(MendkitError, match="empty"):
        session.undo()


def test_misuse_is_named(llama):
    editor = editor_for(llama)
    edit = editor.edit(EXAMPLES[0])
    with pytest.raises(MendkitError, match="not applied"):
        edit.undo()
    with edit.applied(), pytest.raises(MendkitError, match="applied already"):
        edit.apply()
    with pytest.raises(MendkitError, match="no example"):
        editor.edit([])
    with pytest.raises(ArchiveError, match="train"):
        MENDEditor.from_hparams(hparams(), base=llama)


def test_half_precision_models_take_edits(llama_bf16):
    before = logits(llama_bf16)
    with editor_for(llama_bf16).edit(EXAMPLES[0]).applied():
        after = logits(llama_bf16)
    assert after.dtype == torch.bfloat16 and float((after - before).abs().max()) > 0
    assert torch.equal(logits(llama_bf16), before)
