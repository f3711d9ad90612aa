"""Settings beside an archive: each is honoured, or refused by name, before a model is loaded."""

import pytest

from mendkit.errors import ArchiveError, HyperParamError
from mendkit.hparams import MENDHyperParams
from mendkit.mend import editor as editors
from mendkit.mend.archive import OF_EDITING, save_archive
from mendkit.mend.editor import MENDEditor
from mendkit.mend.training import train
from tests.oracles.claims import EXAMPLES, editor_for, hparams

OTHERS = {
    "add_eos": False,
    "edit_lr": 5.0,
    "edit_tokens": "scored",
    "inner_params": ["model.layers.0.mlp.up_proj.weight"],
    "loss_reduction": "sum",
    "max_iters": 7,
    "rank": 4,
    "ridge": 1.0,
    "shared": False,
    "update_sign": 1,
    "z_clip": None,
}


@pytest.fixture
def archive(llama, tmp_path):
    return str(save_archive(tmp_path / "archive.safetensors", llama, editor_for(llama).mend))


@pytest.mark.parametrize("key", OTHERS)
def test_what_belongs_to_the_archive_is_refused_by_name_before_loading(key, archive, monkeypatch):
    monkeypatch.setattr(editors, "load_model", lambda hparams: pytest.fail("the model was loaded"))
    with pytest.raises(HyperParamError, match=f"{key}: .* belongs to the archive"):
        MENDEditor.from_hparams(hparams().replace(archive=archive, **{key: OTHERS[key]}))


def test_a_files_settings_do_not_hold_and_that_is_said(llama, archive, tmp_path, caplog):
    file = tmp_path / "tiny.yaml"
    file.write_text("model_name: tiny\nrank: 4\nmax_iters: 7\nmax_target_tokens: 9\n")
    h = MENDHyperParams.from_hparams(file, archive=archive, seed=3)
    editor = MENDEditor.from_hparams(h, base=llama)
    assert (editor.hparams.rank, editor.hparams.max_target_tokens, editor.hparams.seed) == (8, 9, 3)
    assert (
        f"the archive {archive} decides these settings, not the file: rank 8, not 4" in caplog.text
        and "max_iters" not in caplog.text
    )


def test_what_whoever_edits_decides_is_honoured(llama, archive):
    more = {"max_length": 60, "max_target_tokens": 3, "lr_scale": 0.5, "max_relative_norm": 0.1}
    more |= {"lifelong_norm": True, "seed": 5, "cache_dir": "/tmp/else", "device": "cpu"}
    assert more.keys() <= set(OF_EDITING)
    editor = MENDEditor.from_hparams(hparams(archive=archive, **more), base=llama)
    assert {key: getattr(editor.hparams, key) for key in more} == more
    with pytest.raises(Exception, match="max_target_tokens"):
        editor.edit("The capital of France is", "one two three four five six")
    plain = MENDEditor.from_hparams(hparams(archive=archive), base=llama).hparams
    assert (plain.max_target_tokens, plain.lifelong_norm) == (32, False)


def test_training_goes_on_with_its_own_settings_but_not_the_archives(llama, archive, tmp_path):
    h = hparams(archive=archive, max_iters=1, val_interval=1, batch_size=2)
    with pytest.raises(HyperParamError, match="rank: 4, but that belongs to the archive"):
        train(h.replace(rank=4), EXAMPLES, EXAMPLES, base=llama, run_dir=tmp_path / "run")
    train(h, EXAMPLES, EXAMPLES[:2], base=llama, run_dir=tmp_path / "run")


def test_a_folder_is_its_archive_and_a_wrong_path_is_said_before_loading(
    llama, archive, tmp_path, monkeypatch
):
    assert MENDEditor.from_hparams(hparams(archive=str(tmp_path)), base=llama).archive
    monkeypatch.setattr(editors, "load_model", lambda hparams: pytest.fail("the model was loaded"))
    (tmp_path / "empty").mkdir()
    for path, words in (("empty", "a folder without an archive"), ("none", "no such archive")):
        with pytest.raises(ArchiveError, match=words):
            MENDEditor.from_hparams(hparams(archive=str(tmp_path / path)))
