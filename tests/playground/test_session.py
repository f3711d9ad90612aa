"""The playground without a browser: what it reads, and its panel by pressing buttons."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mendkit import places
from mendkit.data.examples import EditExample, Probe
from mendkit.data.sampling import typed_example
from mendkit.errors import MendkitError
from mendkit.evaluation.inspection import about
from mendkit.hparams import MENDHyperParams
from mendkit.mend.archive import save_archive
from mendkit.mend.validation import next_tokens
from mendkit.playground import widgets
from mendkit.playground.session import Playground
from mendkit.reporting import tables
from tests.oracles.claims import EXAMPLES, editor_for, logits
from tests.oracles.tiny import save_tiny, tiny_llama

NEIGHBOUR = Probe("The capital of <i>Peru</i> is", "Lima")
MARKUP = EditExample("The capital of Chad is", "<b>$x$</b>", neighbours=(NEIGHBOUR,))


@pytest.fixture(scope="module")
def hparams(tmp_path_factory) -> MENDHyperParams:
    """Of a tiny model with an archive, both on disk."""
    folder, base = tmp_path_factory.mktemp("playground"), tiny_llama()
    archive = save_archive(folder / "archive.safetensors", base, editor_for(base).mend)
    return MENDHyperParams(model_name=str(save_tiny(folder / "model", base)), archive=str(archive))


@pytest.fixture
def playground(hparams) -> Playground:
    return Playground(hparams, EXAMPLES[:4], max_new_tokens=4)


@pytest.fixture
def panel(playground, tmp_path) -> widgets.Panel:
    return widgets.Panel(playground, EXAMPLES[:3], folder=str(tmp_path / "adapter"))


# ---------------------------------------- plain Python


def test_before_is_the_unedited_model_and_after_all_edits_in_force(playground):
    base, prompt = playground.editor.base, EXAMPLES[0].prompt
    asked = tables.prompts_of(EXAMPLES[0], most=None)
    prompts = [prompt for _, prompt, _ in asked]
    before = base.generate_batch(prompts, max_new_tokens=4)
    untouched = next_tokens(base, prompt, k=200)
    for example in EXAMPLES[:2]:
        playground.apply(example)
    playground.show(0)
    after = base.generate_batch(prompts, max_new_tokens=4)  # with both in force
    assert playground.completions() == (asked, before, after) and before != after
    read = playground.next_tokens()
    assert read["before"].items() >= untouched.items()  # those of the answers are added
    assert read["after"] != read["before"] and read["new"] == EXAMPLES[0].target_new
    playground.session.undo(0)
    playground.session.undo(1)
    assert playground.completions()[2] == before
    assert playground.next_tokens()["after"] == read["before"]


def test_a_strength_of_none_is_the_unedited_model_and_can_be_taken_back(playground):
    base = playground.editor.base
    before = logits(base)
    playground.apply(EXAMPLES[0])
    edited = logits(base)
    playground.session.set_strength(0, 0.0)
    assert torch.equal(logits(base), before)
    playground.session.set_strength(0, 1.0)
    assert torch.equal(logits(base), edited)  # scaling by a factor could not come back
    with playground.session.suspended():
        assert torch.equal(logits(base), before)
    assert torch.equal(logits(base), edited)


def test_the_next_tokens_are_those_of_the_edit(playground):
    for read in (playground.completions, playground.next_tokens):
        with pytest.raises(MendkitError, match="journal is empty"):
            read()
    example = EXAMPLES[0]
    playground.apply(example)
    fact = playground.next_tokens()
    assert (fact["prompt"], fact["old"]) == (example.prompt, example.ground_truth)


def test_without_an_archive_the_control_is_labelled_and_edits(hparams):
    h = hparams.replace(archive=None, edit_lr=0.1, whiten=0.1)
    playground = Playground(h, EXAMPLES, max_new_tokens=4)
    assert playground.editor.hparams.whiten == 0.1  # the configuration's normaliser
    assert "never trained" in str(about(playground.editor))
    assert "never trained" in widgets.Panel(playground).about.value
    playground.apply(EXAMPLES[0])
    read = playground.next_tokens()
    token = read["new_token"]
    assert read["after"][token] > read["before"][token]  # it descends the gradient


# ---------------------------------------- the panel


def test_the_panel_applies_scales_undoes_drops_and_saves(panel, tmp_path):
    session = panel.playground.session
    panel.apply.click()
    panel.pick.value = 2
    panel.apply.click()
    assert [edit.examples[0] for edit in session.journal] == list(EXAMPLES[:2])
    assert "Applied" in panel.said.value and panel.journal.value == 1
    results = panel.results.value
    panel.strength.value = 2.0
    assert session.journal[1].strength == 2.0 and panel.results.value != results
    panel.journal.value = 0
    assert panel.playground.shown == 0 and panel.strength.value == 1.0
    panel.toggle.click()
    assert not session.journal[0].active and panel.toggle.description == "Re-apply"
    panel.save.click()
    assert load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert "1 fact(s) in force" in panel.said.value
    panel.toggle.click()
    assert session.journal[0].active
    panel.drop.click()
    assert len(session.journal) == 1 == len(panel.journal.options) and panel.strength.value == 2.0
    panel.drop.click()
    assert panel.playground.shown is None and "Nothing to show yet" in panel.results.value


def test_the_panel_takes_what_is_typed(panel):
    panel.pick.value = 0
    panel.prompt.value, panel.answer.value = "  The capital of Chad is ", "Lyon"
    panel.others.value = "The capital of Peru is\n\n  The capital of Fiji is"
    panel.apply.click()
    others = (Probe("The capital of Peru is"), Probe("The capital of Fiji is"))
    typed = typed_example("The capital of Chad is", "Lyon", most=4)
    assert panel.playground.session.journal[0].examples == (replace(typed, unrelated=others),)


def test_a_prompt_that_is_typed_over_a_fact_is_no_more_that_fact(panel):
    assert panel.pick.value == 1 and panel.prompt.value == EXAMPLES[0].prompt
    panel.answer.value = "Oslo"
    assert panel.pick.value == 1  # the same fact with another answer
    panel.prompt.value = "Peru is in"
    assert panel.pick.value == 0 and panel.answer.value == "Oslo"
    panel.apply.click()
    (edit,) = panel.playground.session.journal
    (example,) = edit.examples
    assert (example.prompt, example.target_new) == ("Peru is in", "Oslo")
    assert not example.paraphrases and not example.neighbours
    panel.pick.value = 2
    assert panel.prompt.value == EXAMPLES[1].prompt


def test_archives_are_found_and_loaded_and_a_bad_one_is_told_beside_them(
    playground, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "ARCHIVES", tmp_path / "box")
    (tmp_path / "box").mkdir()
    (tmp_path / "box/some-model.safetensors").touch()
    given = playground.hparams.archive
    for age, name in enumerate(("good", "bad")):
        path = tmp_path / "runs" / name / "archive.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(Path(given).read_bytes()[: None if name == "good" else 100])
        os.utime(path, (age, age))
    panel = widgets.Panel(playground, EXAMPLES[:3])
    offered = [value for _, value in panel.archive.options]
    bad, good = "runs/bad/archive.safetensors", "runs/good/archive.safetensors"
    assert offered == [given, "some-model", bad, good, ""] and panel.archive.value == given
    panel.apply.click()
    base = panel.playground.editor.base
    edited = logits(base)
    panel.archive.value = bad
    panel.load.click()
    assert "not a readable archive" in panel.said.value and 'role="alert"' in panel.said.value
    assert panel.ui.children.index(panel.said) == 1 + [
        panel.archive in getattr(row, "children", ()) for row in panel.ui.children
    ].index(True)
    assert torch.equal(logits(base), edited) and panel.journal.value == 0  # as it was
    panel.archive.value = ""
    panel.load.click()
    assert "never trained" in panel.about.value and panel.playground.session.journal == []
    assert "Loaded" in panel.said.value and not torch.equal(logits(base), edited)
    panel.archive.value = good
    panel.load.click()
    assert "never trained" not in panel.about.value
    panel.apply.click()
    assert torch.equal(logits(base), edited)


def test_mistakes_are_told_and_change_nothing(panel, monkeypatch):
    panel.save.click()
    assert 'role="alert"' in panel.said.value and "no edit of the journal" in panel.said.value
    panel.toggle.click()
    assert "the journal is empty" in panel.said.value
    panel.answer.value = " "
    panel.apply.click()
    assert "has no token to predict" in panel.said.value
    monkeypatch.setattr(panel.playground, "apply", lambda example: 1 / 0)
    panel.apply.click()
    assert "ZeroDivisionError" in panel.said.value  # not ours, and told all the same
    assert not any(button.disabled for button in (panel.apply, panel.toggle, panel.save))
    assert panel.playground.session.journal == []


def test_markup_is_text_in_panel_and_snapshot(panel):
    panel.playground.apply(MARKUP)
    panel.refresh()
    for html in (panel.results.value, panel.snapshot().data):
        assert "&lt;b&gt;<span>$</span>x<span>$</span>&lt;/b&gt;" in html
        assert "<b>" not in html and "<i>" not in html
    panel._say("<script>")
    assert "&lt;script&gt;" in panel.said.value
