"""The playground without a browser: what it reads, and its panel by pressing buttons."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mendkit.data.examples import EditExample, Probe
from mendkit.errors import ArchiveError, DataError, MendkitError
from mendkit.evaluation.inspection import about
from mendkit.hparams import MENDHyperParams
from mendkit.mend.archive import save_archive
from mendkit.mend.editor import MENDEditor
from mendkit.mend.validation import next_tokens
from mendkit.playground import widgets
from mendkit.playground.session import Playground
from mendkit.reporting import tables
from tests.oracles.claims import EXAMPLES, editor_for, logits
from tests.oracles.tiny import save_tiny, tiny_llama

MARKUP = EditExample(
    "The capital of Chad is",
    "<b>$x$</b>",
    neighbours=(Probe("The capital of <i>Peru</i> is", "Lima"),),
)


@pytest.fixture(scope="module")
def hparams(tmp_path_factory: pytest.TempPathFactory) -> MENDHyperParams:
    """Of a tiny model with an archive, both on disk."""
    folder, base = tmp_path_factory.mktemp("playground"), tiny_llama()
    archive = save_archive(folder / "archive.safetensors", base, editor_for(base).mend)
    return MENDHyperParams(model_name=str(save_tiny(folder / "model", base)), archive=str(archive))


@pytest.fixture
def playground(hparams: MENDHyperParams) -> Playground:
    return Playground(hparams, EXAMPLES[:4], max_new_tokens=4)


@pytest.fixture
def panel(playground: Playground, hparams: MENDHyperParams, tmp_path: Path) -> widgets.Panel:
    config = tmp_path / "tiny.yaml"
    config.write_text(f"model_name: {hparams.model_name}\n")
    folder = str(tmp_path / "adapter")
    return widgets.Panel(
        playground, EXAMPLES[:3], config=str(config), archive=str(hparams.archive), folder=folder
    )


# ------------------------------------------------------------------------------------- plain Python


def test_before_is_the_unedited_model_and_after_all_edits_in_force(playground: Playground) -> None:
    base, prompt = playground.editor.base, EXAMPLES[0].prompt
    asked = tables.prompts_of(EXAMPLES[0], most=None)
    prompts = [prompt for _, prompt, _ in asked]
    before, untouched = (
        base.generate_batch(prompts, max_new_tokens=4),
        next_tokens(base, prompt, k=200),
    )
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
    assert (
        playground.completions()[2] == before
        and playground.next_tokens()["after"] == read["before"]
    )


def test_a_strength_of_none_is_the_unedited_model_and_can_be_taken_back(
    playground: Playground,
) -> None:
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


def test_dropping_an_edit_leaves_the_shown_one_shown(playground: Playground) -> None:
    assert playground.shown is None and playground.journal() == []
    for example in EXAMPLES[:4]:
        playground.apply(example)
    assert playground.shown == 3
    playground.show(2)
    for index, shown in ((0, 1), (2, 1), (-1, 0), (0, None)):
        playground.drop(index)
        assert playground.shown == shown
    with pytest.raises(MendkitError, match="no edit 5"):
        playground.show(5)
    with pytest.raises(MendkitError, match="journal is empty"):
        playground.completions()


def test_the_old_answer_of_a_neighbour_is_its_own(playground: Playground) -> None:
    playground.apply(EXAMPLES[0])
    roles = [role for role, _, _ in playground.asked()]
    read = playground.next_tokens(roles.index("neighbours"))
    assert (read["prompt"], read["old"]) == (
        EXAMPLES[0].neighbours[0].prompt,
        EXAMPLES[0].neighbours[0].answer,
    )
    assert playground.next_tokens(roles.index("paraphrases"))["old"] == EXAMPLES[0].ground_truth


def test_without_an_archive_a_stand_in_is_labelled_and_edits(hparams: MENDHyperParams) -> None:
    playground = Playground(hparams.replace(archive=None, edit_lr=0.1), EXAMPLES, max_new_tokens=4)
    assert "never trained" in str(about(playground.editor))
    playground.apply(EXAMPLES[0])
    read = playground.next_tokens()
    assert (
        read["after"][read["new_token"]] > read["before"][read["new_token"]]
    )  # it descends the gradient


def test_loading_keeps_the_model_and_a_failure_all(
    playground: Playground, hparams: MENDHyperParams
) -> None:
    base = playground.editor.base
    before = logits(base)
    playground.apply(EXAMPLES[0])
    edited = logits(base)
    with pytest.raises(ArchiveError, match="no such archive"):
        playground.load(hparams.replace(archive="no/such.safetensors"))
    assert torch.equal(logits(base), edited) and playground.shown == 0
    playground.load(hparams.replace(archive=None))
    assert playground.editor.base.model is base.model and playground.editor.name == "untrained"
    assert torch.equal(logits(base), before) and playground.shown is None
    playground.load(hparams)
    assert (
        playground.editor.archive == MENDEditor.from_hparams(hparams, base=base).archive is not None
    )


@pytest.mark.parametrize(
    "example", [EditExample(" ", "Lyon"), EditExample("The capital of France is", "\n")]
)
def test_a_blank_fact_is_refused(playground: Playground, example: EditExample) -> None:
    with pytest.raises(DataError, match="is blank"):
        playground.apply(example)
    assert playground.shown is None


# ---------------------------------------------------------------------------------------- the panel


def said(panel: widgets.Panel) -> str:
    return panel.said.value


def test_the_panel_applies_scales_undoes_drops_and_saves(
    panel: widgets.Panel, tmp_path: Path
) -> None:
    session = panel.playground.session
    panel.apply.click()
    panel.pick.value = 1
    panel.apply.click()
    assert [edit.examples[0] for edit in session.journal] == list(
        EXAMPLES[:2]
    ) and "Applied" in said(panel)
    figure, table = panel.figure.value, panel.table.value
    first, second = panel._rows
    second.slider.value = 2.0
    assert (
        session.journal[1].strength == 2.0
        and panel.figure.value != figure
        and panel.table.value != table
    )
    first.toggle.click()
    assert not session.journal[0].active and first.toggle.description == "Re-apply"
    panel.save.click()
    assert load_file(
        tmp_path / "adapter/adapter_model.safetensors"
    ) and "1 fact(s) in force" in said(panel)
    first.toggle.click()
    assert session.journal[0].active and panel.playground.shown == 1
    panel._rows[0].box.children[-1].click()
    assert len(session.journal) == 1 == len(panel.journal.children) and first.slider.value == 2.0


def test_the_panel_takes_what_is_typed(panel: widgets.Panel) -> None:
    panel.pick.value = None
    panel.prompt.value, panel.answer.value = "  The capital of Chad is ", "Lyon"
    panel.lines["neighbours"].value = "The capital of Peru is\n\n  The capital of Fiji is"
    panel.apply.click()
    example = panel.playground.session.journal[0].examples[0]
    assert (example.prompt, example.target_new, example.paraphrases) == (
        "The capital of Chad is",
        "Lyon",
        (),
    )
    assert [probe.prompt for probe in example.neighbours] == [
        "The capital of Peru is",
        "The capital of Fiji is",
    ]
    assert example.unrelated == tuple(
        Probe(probe.prompt) for probe in EXAMPLES[0].unrelated
    )  # they stayed


def test_mistakes_are_told_and_change_nothing(
    panel: widgets.Panel, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel.save.click()
    assert 'role="alert"' in said(panel) and "no edit of the journal" in said(panel)
    panel.answer.value = " "
    panel.apply.click()
    assert "the new answer is blank" in said(panel)
    panel.archive.value = "no/such.safetensors"
    panel.load.click()
    assert "no such archive" in said(panel)
    monkeypatch.setattr(panel.playground, "load", lambda hparams: 1 / 0)
    panel.load.click()
    assert "ZeroDivisionError" in said(panel)  # not ours, and told all the same
    assert not any(button.disabled for button in (panel.load, panel.apply, panel.save))
    assert panel.playground.session.journal == []


def test_the_panel_loads_an_archive_and_says_when_nothing_was_trained(panel: widgets.Panel) -> None:
    assert "hypernetwork: trained" in panel.about.value
    panel.apply.click()
    panel.archive.value = ""
    panel.load.click()
    assert "never trained" in panel.about.value and "Nothing to show yet" in panel.table.value
    assert panel.playground.editor.name == "untrained" and panel.playground.session.journal == []


def test_markup_is_text_in_panel_and_snapshot(panel: widgets.Panel) -> None:
    panel.playground.apply(MARKUP)
    panel.refresh()
    for html in (panel._rows[0].text.value, panel.table.value, panel.snapshot().data):
        assert "&lt;b&gt;<span>$</span>x<span>$</span>&lt;/b&gt;" in html
        assert "<b>" not in html and "<i>" not in html
    panel._say("<script>")
    assert "&lt;script&gt;" in said(panel)


def test_a_snapshot_has_no_widget_and_shows_journal_table_and_figure(panel: widgets.Panel) -> None:
    panel.apply.click()
    html = panel.snapshot().data
    assert panel.table.value in html and "in force" in html and "data:image/png;base64," in html
    assert f"{EXAMPLES[0].prompt} → {EXAMPLES[0].target_new}" in html


def test_the_package_does_not_import_widgets() -> None:
    heavy = ("ipywidgets", "matplotlib", "IPython")
    code = f"import sys, mendkit; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )
