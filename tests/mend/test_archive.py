"""The archive: bits, refusals and damage (CORRECTNESS rows 1, 3, 23, 24)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mendkit.errors import ArchiveError, MendkitError
from mendkit.mend.archive import load_archive, save_archive
from mendkit.mend.editor import MENDEditor
from mendkit.mend.hypernetwork import MEND
from tests.oracles.attacks import Layout, signed
from tests.oracles.claims import EXAMPLES, hparams, scrambled, with_statistics
from tests.oracles.tiny import tiny_gpt2, tiny_llama


@pytest.fixture
def saved(llama, tmp_path):
    mend = scrambled(with_statistics(llama, MEND(llama.sites, hparams())))
    return save_archive(tmp_path / "a.safetensors", llama, mend, training={"steps": 7}), mend


def rewrite(path, change, sign=signed):
    """The file after a change of its tensors and metadata, its checksum made anew."""
    metadata, tensors = Layout.of(path.read_bytes()).metadata, load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata={"mendkit": json.dumps(sign(metadata, tensors))})


def test_round_trip_gives_the_same_edits_bit_for_bit(llama, saved):
    path, mend = saved
    loaded = load_archive(path, base=llama)
    assert all(torch.equal(v, loaded.mend.state_dict()[k]) for k, v in mend.state_dict().items())
    a, b = (MENDEditor(llama, m).edit(EXAMPLES[0]).dense() for m in (mend, loaded.mend))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert loaded.mend.hparams == mend.hparams


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: tiny_llama(seed=5), "other weights"),
        (lambda: tiny_gpt2(), "cannot be edited"),
        (lambda: tiny_llama(d=48), "other shapes"),
    ],
)
def test_another_model_is_refused_by_name_of_the_difference(saved, other, words):
    with pytest.raises(ArchiveError, match=words) as error:
        load_archive(saved[0], base=other())
    assert "archive: null" in str(error.value)


def test_an_edited_model_is_another_model(saved, llama):
    weight = llama.site_module(llama.sites[0]).weight
    kept = weight.clone()
    base = tiny_llama()
    base.site_module(base.sites[0]).weight.add_(1e-3)
    with pytest.raises(ArchiveError, match="already edited"):
        load_archive(saved[0], base=base)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop("log_edit_lr"), 'Missing key.*"log_edit_lr"'),
        (lambda t, m: t.update(extra=torch.ones(1)), 'Unexpected key.*"extra"'),
        (lambda t, m: t.update(log_edit_lr=torch.zeros(1)), "size mismatch for log_edit_lr"),
        (lambda t, m: t.update(log_edit_lr=t["log_edit_lr"].half()), "is torch.float16"),
        (lambda t, m: m.update(format="other"), "unknown format"),
        (lambda t, m: m["hparams"].update(rank=-3), "damaged metadata"),
    ],
)
def test_damaged_contents_are_named(llama, saved, change, words):
    rewrite(saved[0], change)
    with pytest.raises(ArchiveError, match=words):
        load_archive(saved[0], base=llama)


def test_what_is_not_finite_is_not_written(llama, tmp_path):
    mend = MEND(llama.sites, hparams())
    mend.load_state_dict(
        mend.state_dict() | {"log_edit_lr": mend.log_edit_lr.detach() + float("nan")}
    )
    with pytest.raises(ArchiveError, match=r"not written: log_edit_lr not finite"):
        save_archive(tmp_path / "a.safetensors", llama, mend)
    assert not any(tmp_path.iterdir())


def test_no_file_and_foreign_files(llama, tmp_path):
    with pytest.raises(ArchiveError, match="no such archive"):
        load_archive(tmp_path / "none.safetensors", base=llama)
    save_file({"x": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ArchiveError, match="no archive of mendkit"):
        load_archive(tmp_path / "plain.safetensors", base=llama)


def test_a_failed_write_leaves_the_old_archive_and_no_rubbish(llama, saved, monkeypatch):
    path, mend = saved
    before = path.read_bytes()
    monkeypatch.setattr(
        "mendkit.mend.files.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(
        MendkitError, match=r"cannot write the archive .*disk full; what was there is as it was"
    ):
        save_archive(path, llama, mend)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
