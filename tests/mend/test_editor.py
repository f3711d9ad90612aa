"""The journal: in whatever order it is changed, the model depends on what is in force alone."""

import hashlib
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from random import Random
from statistics import median

import pytest
import torch

from mendkit.errors import ArchiveError, MendkitError
from mendkit.mend.archive import save_archive
from mendkit.mend.edit import Edit
from mendkit.mend.editor import EditSession, MENDEditor
from mendkit.mend.factors import capture_factors
from mendkit.mend.hypernetwork import stats_name
from mendkit.mend.normaliser import RunningMoments
from mendkit.mend.updates import side_branches
from mendkit.models.trunk import FrozenTrunk
from tests.oracles.claims import EXAMPLES, editor_for, hparams, logits
from tests.oracles.tiny import tiny_llama


def test_session_edits_the_edited_model_and_undoes_in_order(llama):
    before, editor = logits(llama), editor_for(llama)
    alone = editor.edit(EXAMPLES[1]).dense()
    with editor.session() as session:
        session.edit(EXAMPLES[0])
        once = logits(llama)
        second = session.edit(EXAMPLES[1]).dense()
        assert not any(torch.allclose(second[name], change) for name, change in alone.items())
        twice = logits(llama)
        assert session.undo() is session.journal[1] and torch.equal(logits(llama), once)
        assert session.undo() is session.journal[0] and torch.equal(logits(llama), before)
        for call in (session.undo, session.combined):
            with pytest.raises(MendkitError, match="in force"):
                call()
        session.scale(0, 4.0)
        assert torch.equal(logits(llama), before)  # undone edits stay so
        session.scale(0, 1 / 4)
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
    assert torch.equal(logits(llama), before)


def capped_change(total, change, limit):
    """c change with the largest c in [0, 1] for ‖total + c change‖ ≤ limit, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (total + middle * change).norm() <= limit else (low, middle)
    return high * change


@pytest.mark.parametrize(("aggregate", "strength"), [("sum", 2.0), ("least_squares", 1.0)])
def test_the_weight_change_of_all_edits_in_force_stays_under_the_cap(llama64, aggregate, strength):
    free = editor_for(llama64, edit_tokens="scored", lr_scale=strength)
    free = free if aggregate == "sum" else free.by_least_squares(EXAMPLES, ridge=0.01)
    limit = 0.99 * median(free.edit(EXAMPLES[:2]).relative_norm().values())
    mend = deepcopy(free.mend)
    mend.hparams = mend.hparams.replace(max_relative_norm=limit, lr_scale=strength)
    free.mend.hparams = free.mend.hparams.replace(lr_scale=strength)
    before = logits(llama64)
    norms = {site.name: float(llama64.site_weight(site).norm()) for site in llama64.sites}
    total = {name: torch.zeros(()) for name in norms}
    scales = set()
    with MENDEditor(llama64, mend).session() as session:
        for examples in (EXAMPLES[:2], EXAMPLES[2], EXAMPLES[3], EXAMPLES[4]):
            free.memory = deepcopy(session.editor.memory)
            wanted, found = free.edit(examples).dense(), session.edit(examples).dense()
            for name, norm in norms.items():
                expected = capped_change(total[name], wanted[name], limit * norm)
                torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-12)
                total[name] = total[name] + found[name]
                scales.add(torch.allclose(found[name], wanted[name]))
            assert max(session.combined().relative_norm().values()) <= limit * (1 + 1e-9)
        assert scales == {True, False}  # some changes had room, some had not
    assert torch.equal(logits(llama64), before)


def test_lifelong_statistics_are_those_of_all_factors_seen_so_far(llama64):
    editor = editor_for(llama64, lifelong_norm=True)
    kept, trunk = {n: v.clone() for n, v in editor.mend.state_dict().items()}, FrozenTrunk(llama64)
    texts = [editor.tokens(example) for example in EXAMPLES]
    seen = [capture_factors(trunk, texts)]
    with editor.session() as session:
        for example, text in zip(EXAMPLES, texts, strict=True):
            seen.append(capture_factors(trunk, [text]))  # of the model as edited so far
            made, plain = session.edit(example), deepcopy(editor.mend)
            for site in llama64.sites:
                key = stats_name(site, editor.hparams)
                for part in ("u", "delta"):
                    rows = torch.cat([getattr(f[site.name], part) for f in seen])
                    plain.moments[key][part] = RunningMoments(rows.shape[1])
                    plain.moments[key][part].add(rows)
                    found = session.editor.mend.moments[key][part]
                    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-9, atol=1e-12)
                    torch.testing.assert_close(
                        found.plain_std(), rows.std(0), rtol=1e-7, atol=1e-12
                    )
            for name, update in plain(seen[-1], 1).items():
                change = made.updates[name].dense()
                torch.testing.assert_close(change, update.dense(), rtol=1e-6, atol=1e-12)
    assert all(torch.equal(kept[name], value) for name, value in editor.mend.state_dict().items())


def test_any_order_of_changes_gives_the_bits_of_what_is_in_force(llama):
    before, twin, draws = logits(llama), tiny_llama(), Random(0)
    weights = {name: p.clone() for name, p in llama.model.named_parameters()}
    with editor_for(llama).session() as session:
        for example in EXAMPLES[:4]:
            session.edit(example)
        # An edit, its strength, whether it is in force.
        wanted = [[edit, 1.0, True] for edit in session.journal]
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


def test_a_journal_combined_is_the_sum_of_its_edits_in_force(base64):
    with editor_for(base64).session() as session:
        for example in EXAMPLES[:3]:
            session.edit(example)
        session.undo(0)
        session.scale(1, -0.5)
        wanted, combined = logits(base64), session.combined()
        changes = [edit.dense() for edit in session.active]
    for name, change in combined.dense().items():
        torch.testing.assert_close(change, sum(each[name] for each in changes))
    assert combined.examples == EXAMPLES[1:3]
    with combined.applied():
        torch.testing.assert_close(logits(base64), wanted, rtol=1e-9, atol=1e-11)


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


def test_a_prompt_and_its_answer_make_the_edit_of_their_example(llama):
    editor, example = editor_for(llama), EXAMPLES[0]
    edit, wanted = editor.edit(example.prompt, example.target_new), editor.edit(example).dense()
    assert all(torch.equal(change, wanted[name]) for name, change in edit.dense().items())


def test_what_one_works_with_is_shown_in_one_line(llama):
    editor, long = editor_for(llama), replace(EXAMPLES[0], prompt="Line one.\n" * 40)
    with editor.session() as session:
        things = [session.edit(long), session, editor, llama]
        for thing in things:
            line = repr(thing)
            assert line.startswith(type(thing).__name__) and len(line) < 250 and "\n" not in line
        assert repr(session.journal[0]).endswith("strength 1, applied)")
    edit = editor.edit(EXAMPLES[0])
    told = f"{EXAMPLES[0].prompt!r} → {EXAMPLES[0].target_new!r}"
    assert repr(edit) == f"Edit({told}; {len(llama.sites)} sites, strength 1, not applied)"


def test_an_edit_knows_its_archive(llama, tmp_path):
    path = save_archive(tmp_path / "archive.safetensors", llama, editor_for(llama).mend)
    editor = MENDEditor.from_hparams(hparams(archive=str(path)), base=llama)
    edit = editor.edit(EXAMPLES[0]).scale(2.0)
    wanted = hashlib.sha256(path.read_bytes()).hexdigest()
    assert edit.archive == wanted and Edit.combined([edit]).archive == wanted
    assert Edit.load(edit.save(tmp_path / "edit"), llama).archive == wanted
    assert editor_for(llama).edit(EXAMPLES[0]).archive is None
