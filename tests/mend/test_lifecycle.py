"""A model of every family, from its folder to an exported archive and scored edits."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from mendkit.errors import MendkitError
from mendkit.evaluation.evaluate import evaluate
from mendkit.evaluation.prepare import EvaluationSet
from mendkit.hparams import MENDHyperParams
from mendkit.interop.foreign import export_archive, import_archive
from mendkit.mend.archive import load_archive
from mendkit.mend.batches import edit_tokens, prepare_texts
from mendkit.mend.editor import MENDEditor
from mendkit.mend.training import train
from mendkit.models.load import load_model
from tests.oracles.claims import examples_of, hparams, plain_logits
from tests.oracles.families import FAMILIES, NO_ADAPTER, NO_CHAIN, REFUSED, other_base, table_row
from tests.oracles.tiny import save_tiny


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """A saved model of a family, loaded again and trained for three steps, and its archive."""
    folder = tmp_path_factory.mktemp("family")
    saved = other_base(request.param)
    path = save_tiny(folder / "model", saved)
    inner = tuple(site.name for site in saved.sites)
    base = load_model(MENDHyperParams(model_name=str(path), inner_params=inner))
    assert base.family == saved.family and base.sites == saved.sites and base.name == "model"
    assert (base.blocks is None) == (request.param in NO_CHAIN)
    h = hparams(norm_stats="shape", z_clip=None, inner_params=inner, edit_lr=1e-2, lr=1e-2).replace(
        model_name=str(path), max_iters=3, val_interval=3, batch_size=2
    )
    result = train(h, examples_of(base), examples_of(base)[:2], base=base, run_dir=folder / "run")
    assert result.history[-1]["step"] == 3 and 0 <= result.best["val.score"] <= 1
    return h.replace(archive=str(result.archive)), base, folder


def test_the_table_of_families_is_that_of_the_tests():
    page = (Path(__file__).parents[2] / "docs/DATA_AND_MODELS.md").read_text(encoding="utf-8")
    table = page.partition("| family | transformers' class |")[2].partition("\n\n")[0]
    assert table.splitlines()[2:] == [table_row(name) for name in (*FAMILIES, *REFUSED)]


def reading(base):
    """Logits of some texts, each by itself."""
    examples = prepare_texts(base, hparams(), examples_of(base)[:2])
    texts = [text for example in examples for text in example.all()]
    with torch.no_grad():
        return torch.cat([plain_logits(base, text) for text in texts])


def test_edits_are_made_added_up_undone_and_merged(trained):
    h, base, _ = trained
    editor = MENDEditor.from_hparams(h, base=base)
    a, b, c, *_ = examples_of(base)
    before = reading(base)
    bits = {name: value.clone() for name, value in base.model.state_dict().items()}
    for edit in (editor.edit(a), editor.edit([a, b, c])):
        with edit.applied():
            edited = reading(base)
        assert torch.equal(reading(base), before) and float((edited - before).abs().max()) > 1e-3
        merged = reading(edit.merged().base)
        torch.testing.assert_close(merged, edited, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    with editor.session() as session:
        first = session.edit(a)
        once = reading(base)
        second = session.edit(b)
        last = base.sites[-1].name
        assert not torch.equal(second.updates[last].u, editor.edit(b).updates[last].u)
        session.undo()
        assert torch.equal(reading(base), once) and first.active
    assert torch.equal(reading(base), before)
    assert all(torch.equal(value, bits[name]) for name, value in base.model.state_dict().items())


def test_a_merged_folder_and_an_adapter_give_the_edited_logits_or_are_refused_by_name(trained):
    h, base, folder = trained
    edit = MENDEditor.from_hparams(h, base=base).edit(examples_of(base)[0])
    with edit.applied():
        edited = reading(base)
    near = 1e-4 * float(edited.abs().max())
    edit.save_merged(folder / "merged")
    merged = load_model(h.replace(model_name=str(folder / "merged")))
    torch.testing.assert_close(reading(merged), edited, rtol=1e-3, atol=near)
    if base.model.config.model_type in NO_ADAPTER:
        with pytest.raises(MendkitError, match=f"PEFT reads .*{base.sites[0].module}"):
            edit.save_adapter(folder / "adapter")
        return
    edit.save_adapter(folder / "adapter")
    other = copy.copy(base)
    other.model = PeftModel.from_pretrained(copy.deepcopy(base.model), folder / "adapter").eval()
    torch.testing.assert_close(reading(other), edited, rtol=1e-3, atol=near)


def test_an_archive_goes_out_and_comes_back_with_every_bit(trained):
    h, base, folder = trained
    export_archive(h.archive, folder / "archive.pt", base=base)
    path = import_archive(folder / "archive.pt", h, out=folder / "back.safetensors", base=base)
    again, original = (load_archive(p, base=base) for p in (path, h.archive))
    texts = [edit_tokens(base, h, example) for example in examples_of(base)]
    editors = [MENDEditor(base, archive.mend) for archive in (again, original)]
    for name, update in editors[0].updates(texts).items():
        other = editors[1].updates(texts)[name]
        assert torch.equal(update.u, other.u) and torch.equal(update.delta, other.delta)
        assert float(update.coefficient) == pytest.approx(float(other.coefficient), rel=1e-6)


def test_evaluation_reads_and_writes_under_each_edit(trained):
    """Oracle: each edit applied by itself, the prompt read and answered by the plain model."""
    h, base, _ = trained
    editor, examples = MENDEditor.from_hparams(h, base=base), examples_of(base)[:2]
    prepared = EvaluationSet(base, h, examples, max_new_tokens=6)
    assert not prepared.skipped
    edits = [prompts[0].text for prompts in prepared.prompts]
    updates = editor.updates(edits, trunk=prepared.trunk)
    scores = prepared.score(updates, range(len(examples)))
    for example, prompts, found in zip(examples, prepared.prompts, scores, strict=True):
        text, asked = prompts[0].text, [p.prompt for p in prompts if p.role != "reworded"]
        with editor.edit(example).applied(), torch.no_grad():
            log_p = plain_logits(base, text).log_softmax(-1)
            alone = base.generate_batch(asked, max_new_tokens=6)
        length = len(text.targets) - text.ends
        nll = nn.functional.nll_loss(log_p[:length], torch.tensor(text.targets[:length]))
        assert found.values["log_p.new"] == pytest.approx(-float(nll), rel=1e-3, abs=1e-4)
        said = [output["after"] for output in found.outputs]
        written = [pair for pair in zip(said, alone, strict=False) if pair[0] is not None]
        assert all(one.strip() == other.strip() for one, other in written) and len(written) > 3
        asked = "edit_success.free_exact_question" in found.values
        assert asked == (base.labels is None)
    if base.labels is None:
        greedy = next(p.greedy for p in prepared.prompts[0] if p.greedy is not None)
        prompt = base.prompt_of(greedy)
        assert plain_logits(base, greedy).argmax(-1).tolist() == list(greedy.targets)
        assert base.write_all([prompt], max_new_tokens=6)[0] == list(greedy.targets)
    report = evaluate(editor, prepared, strength=0.0)
    assert report.summary["neighbourhood.argmax_agreement"].mean == 1.0
