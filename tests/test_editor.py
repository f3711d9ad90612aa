"""The journal: edits undone, put back, scaled, dropped in any order; the model depends on what is in force alone."""

import hashlib
from contextlib import ExitStack
from random import Random

import pytest
import torch

from mendkit.archive import save_archive
from mendkit.edit import Edit, side_branches
from mendkit.editor import EditSession, MENDEditor
from mendkit.errors import ArchiveError, MendkitError
from tests.claims import EXAMPLES
from tests.test_edit import editor_for, logits
from tests.test_mend import hparams
from tests.tiny import tiny_llama


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


def test_any_order_of_changes_gives_the_bits_of_what_is_in_force(llama):
    before, twin, draws = logits(llama), tiny_llama(), Random(0)
    weights = {name: p.clone() for name, p in llama.model.named_parameters()}
    with editor_for(llama).session() as session:
        for example in EXAMPLES[:4]:
            session.edit(example)
        wanted = [[edit, 1.0, True] for edit in session.journal]  # an edit, its strength, whether it is in force
        for step in range(24):
            index = draws.randrange(len(wanted))
            if step == 12:
                session.drop(index)
                del wanted[index]
            elif draws.random() < 0.4:
                factor = draws.choice([0.5, 2.0])
                session.scale(index - len(wanted), factor)
                wanted[index][1] *= factor
            else:
                (session.undo if wanted[index][2] else session.reapply)(index)
                wanted[index][2] = not wanted[index][2]
            assert [edit.active for edit in session.journal] == [active for _, _, active in wanted]
            with ExitStack() as naive:
                for edit, strength, active in wanted:
                    if active:
                        naive.enter_context(side_branches(twin, edit.scale(strength).updates))
                assert torch.equal(logits(llama), logits(twin))
    assert torch.equal(logits(llama), before)
    assert all(torch.equal(p, weights[name]) for name, p in llama.model.named_parameters())
    assert not any(m._forward_hooks for m in llama.model.modules())


def test_undo_goes_back_one_edit_at_a_time_and_keeps_them(llama):
    before = logits(llama)
    with editor_for(llama).session() as session:
        session.edit(EXAMPLES[0])
        once = logits(llama)
        session.edit(EXAMPLES[1])
        twice = logits(llama)
        assert session.undo() is session.journal[1] and torch.equal(logits(llama), once)
        assert session.undo() is session.journal[0] and torch.equal(logits(llama), before)
        with pytest.raises(MendkitError, match="in force"):
            session.undo()
        with pytest.raises(MendkitError, match="in force"):
            session.combined()
        session.scale(0, 3.0)
        assert torch.equal(logits(llama), before)  # undone edits stay so
        session.scale(0, 1 / 3)
        session.reapply()
        session.reapply(0)
        assert torch.equal(logits(llama), twice)
        with pytest.raises(MendkitError, match="applied already"):
            session.reapply(0)
        session.undo(0)
        with pytest.raises(MendkitError, match="not applied"):
            session.undo(0)
        for call in (session.drop, session.reapply, session.undo):
            with pytest.raises(MendkitError, match="no edit -3 in the journal; it has 2"):
                call(-3)


@pytest.mark.parametrize("family", ["llama64", "gpt264"])
def test_a_journal_combined_is_the_sum_of_its_edits_in_force(family, request):
    base = request.getfixturevalue(family)
    with editor_for(base).session() as session:
        for example in EXAMPLES[:3]:
            session.edit(example)
        session.undo(0)
        session.scale(1, -0.5)
        wanted, combined = logits(base), session.combined()
        changes = [edit.dense() for edit in session.active]
    for name, change in combined.dense().items():
        torch.testing.assert_close(change, sum(each[name] for each in changes))
    assert combined.examples == EXAMPLES[1:3]
    with combined.applied():
        torch.testing.assert_close(logits(base), wanted, rtol=1e-9, atol=1e-11)


def test_a_saved_journal_goes_on_as_it_was(llama, tmp_path):
    editor = editor_for(llama)
    with editor.session() as session:
        for example in EXAMPLES[:3]:
            session.edit(example)
        session.scale(0, 0.7)
        session.undo(1)
        wanted, path = logits(llama), session.save(tmp_path / "journal.safetensors")
        session.reapply(1)
        whole = logits(llama)
    with pytest.raises(ArchiveError, match="a journal of 3 edits"):
        Edit.load(path, llama)
    with EditSession.load(path, editor) as session:
        assert torch.equal(logits(llama), wanted)
        assert [edit.examples[0] for edit in session.journal] == list(EXAMPLES[:3])
        session.reapply(1)
        assert torch.equal(logits(llama), whole)
    with pytest.raises(MendkitError, match="expected one edit"):
        editor.session().save(tmp_path / "empty")


def test_an_edit_knows_its_archive(llama, tmp_path):
    path = save_archive(tmp_path / "archive.safetensors", llama, editor_for(llama).mend)
    editor = MENDEditor.from_hparams(hparams(archive=str(path)), base=llama)
    edit = editor.edit(EXAMPLES[0]).scale(2.0)
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert edit.archive == wanted and Edit.combined([edit]).archive == wanted
    assert Edit.load(edit.save(tmp_path / "edit"), llama).archive == wanted
    assert editor_for(llama).edit(EXAMPLES[0]).archive is None
