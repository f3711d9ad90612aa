"""Side branches against dense weight changes; undo, merging and files to the bit (rows 10, 16)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mendkit.errors import ArchiveError, MendkitError
from mendkit.mend.edit import Edit
from mendkit.mend.editor import MENDEditor
from mendkit.mend.updates import LowRankUpdate, side_branches
from mendkit.models.load import load_model
from tests.oracles.attacks import Layout
from tests.oracles.claims import EXAMPLES, editor_for, hparams, logits
from tests.oracles.tiny import save_tiny, tiny_gpt2, tiny_llama

PROMPT = "The capital of France is"


def test_a_side_branch_is_the_dense_weight_change(base64):
    edit = editor_for(base64).edit(list(EXAMPLES[:2]))
    with edit.applied():
        branch = logits(base64)
    weights = {site.name: base64.site_module(site).weight for site in base64.sites}
    kept = {name: weight.clone() for name, weight in weights.items()}
    for name, change in edit.dense().items():
        weights[name].add_(change)
    dense = logits(base64)
    for name, weight in kept.items():
        weights[name].copy_(weight)
    torch.testing.assert_close(branch, dense, rtol=1e-9, atol=1e-11)
    assert float((branch - logits(base64)).abs().max()) > 1e-3


def test_undo_restores_the_bits(base32):
    weights = {name: p.clone() for name, p in base32.model.named_parameters()}
    before = logits(base32)
    edit = editor_for(base32).edit(EXAMPLES[0])
    for _ in range(50):
        with edit.applied():
            assert not torch.equal(logits(base32), before)
    edit.apply()
    edit.undo()
    with pytest.raises(ZeroDivisionError), edit.applied():
        raise ZeroDivisionError
    assert torch.equal(logits(base32), before)
    assert all(torch.equal(p, weights[name]) for name, p in base32.model.named_parameters())
    assert not any(m._forward_hooks for m in base32.model.modules())


def test_strength_scales_the_weight_change(llama):
    edit = editor_for(llama).edit(EXAMPLES[0])
    for name, change in edit.scale(-0.5).dense().items():
        torch.testing.assert_close(change, -0.5 * edit.dense()[name])
    with edit.scale(0.0).applied():
        changed = logits(llama)
    torch.testing.assert_close(changed, logits(llama))


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


def test_misuse_is_named(llama):
    editor = editor_for(llama)
    edit = editor.edit(EXAMPLES[0])
    with pytest.raises(MendkitError, match="not applied"):
        edit.undo()
    with edit.applied(), pytest.raises(MendkitError, match="applied already"):
        edit.apply()
    with pytest.raises(MendkitError, match="no example"):
        editor.edit([])
    with pytest.raises(MendkitError, match="no new answer"):
        editor.edit(PROMPT)
    with pytest.raises(MendkitError, match="has a new answer"):
        editor.edit(EXAMPLES[0], "Rome")
    with pytest.raises(Exception, match="EditExample"):  # of ours, or of the types in tests
        editor.edit([{"prompt": PROMPT, "target_new": "Rome"}])
    with pytest.raises(MendkitError, match="same model"):
        Edit.combined([edit, editor_for(tiny_llama()).edit(EXAMPLES[0])])
    with pytest.raises(ArchiveError, match="train"):
        MENDEditor.from_hparams(hparams(), base=llama)


def test_half_precision_models_take_edits(llama_bf16):
    before = logits(llama_bf16)
    with editor_for(llama_bf16).edit(EXAMPLES[0]).applied():
        after = logits(llama_bf16)
    assert after.dtype == torch.bfloat16 and float((after - before).abs().max()) > 0
    assert torch.equal(logits(llama_bf16), before)


# ---------------------------------------- merged


def constant_edit(value: float) -> Edit:
    """The edit that adds `value` to each weight of a bfloat16 model's one site, where all are 1."""
    base = tiny_llama(dtype=torch.bfloat16)
    base = base.with_sites((base.sites[-1].name,))
    (site,) = base.sites
    base.site_module(site).weight.fill_(1.0)
    update = LowRankUpdate(torch.ones(1, 1, site.d_in), torch.full((1, 1, site.d_out), value), 1.0)
    return Edit(base, {site.name: update}, EXAMPLES[:1])


# bfloat16 has steps of 1/128 above 1: less than half a step is lost, more becomes a whole one
@pytest.mark.parametrize(
    ("value", "kept", "error"), [(1 / 512, 0, 1), (3 / 512, 4 / 3, 1 / 3), (1 / 64, 1, 0)]
)
def test_a_half_precision_merge_reports_what_rounding_left(value, kept, error, caplog):
    merged = constant_edit(value).merged()
    (site,) = merged.sites
    assert (site.kept, site.relative_error) == (pytest.approx(kept), pytest.approx(error))
    weight = merged.base.site_module(merged.base.sites[0]).weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, torch.full_like(weight, 1 + kept * value))
    assert ("keeps 0 % of the edit" in caplog.text) == (kept == 0)


def test_a_merged_model_is_the_edited_one_and_the_base_stays(base32):
    before, weights = (
        logits(base32),
        {name: p.clone() for name, p in base32.model.named_parameters()},
    )
    edit = editor_for(base32).edit(list(EXAMPLES[:2]))
    other = editor_for(base32).edit(EXAMPLES[2])
    with edit.applied():
        wanted = logits(base32)
        with other.applied():
            merged = edit.merged()  # what is in force is not taken along
    torch.testing.assert_close(logits(merged.base), wanted, rtol=1e-4, atol=5e-6)
    assert torch.equal(logits(base32), before)
    edited = {site.name for site in base32.sites}
    for name, p in base32.model.named_parameters():
        theirs = merged.base.model.get_parameter(name)
        assert torch.equal(p, weights[name])
        assert (theirs.data_ptr() == p.data_ptr()) == (name not in edited)
    assert {site.name for site in merged.sites} == edited
    assert all(0.999 < site.kept < 1.001 for site in merged.sites)
    with edit.applied():  # hooks are the base32's own
        torch.testing.assert_close(logits(merged.base), wanted, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_merged_folder_is_plain_transformers(build, tmp_path):
    base = load_model(save_tiny(tmp_path / "model", build()))
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with editor_for(base).session() as session:
        session.edit(EXAMPLES[0])
        session.edit(EXAMPLES[1])
        wanted = logits(base)
        session.combined().save_merged(tmp_path / "merged")
        with pytest.raises(MendkitError, match="holds the base model itself"):
            session.combined().save_merged(tmp_path / "model" / ".." / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        got = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=5e-6)
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


# ---------------------------------------- saved


@pytest.fixture
def saved(llama, tmp_path):
    edit = editor_for(llama).edit(list(EXAMPLES[:2])).scale(0.3)
    return edit, edit.save(tmp_path / "edit.safetensors")


def test_a_saved_edit_has_the_same_bits_and_examples(llama, saved):
    edit, path = saved
    fewer = tiny_llama().with_sites((llama.sites[0].name,))
    loaded = Edit.load(path, fewer)  # the file decides the sites
    assert loaded.examples == edit.examples
    assert loaded.strength == edit.strength and not loaded.active
    assert list(loaded.updates) == list(edit.updates)
    for name, update in edit.updates.items():
        for part in ("u", "delta", "coefficient"):
            assert torch.equal(getattr(loaded.updates[name], part), getattr(update, part))
    with edit.applied():
        wanted = logits(llama)
    with loaded.applied():
        assert torch.equal(logits(loaded.base), wanted)


@pytest.mark.parametrize("change", ["strength", "answer", "format", "cut", "another", "merged"])
def test_a_changed_file_and_another_model_are_refused(llama, saved, change):
    edit, path = saved
    base = {"another": tiny_llama(seed=5), "merged": edit.merged().base}.get(change, llama)
    metadata, tensors = Layout.of(path.read_bytes()).metadata, load_file(path)
    told = metadata["edits"][0]
    if change == "strength":
        told["strength"] = 9.0
    elif change == "answer":
        told["examples"][0]["target_new"] = "Oslo"
    elif change == "format":
        metadata["format"] = "mendkit-2"
    save_file(tensors, path, metadata={"mendkit": json.dumps(metadata)})
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    words = {"format": "unknown format", "cut": "not a readable", "another": "other weights"}
    words["merged"] = "already edited"
    with pytest.raises(ArchiveError, match=words.get(change, "checksum")):
        Edit.load(path, base)
    with pytest.raises(ArchiveError, match="no such saved edit"):
        Edit.load(path.with_name("none"), llama)
